"""The written project: small, deterministic, atomic, safe against names, and built by its own Makefile."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from edgemat.errors import EdgematError, UnsupportedOpError
from edgemat.op import Call
from edgemat.ops import BY_NAME
from edgemat.ops.cases import constant, random_codes, tensor
from edgemat.targets import destination, toolchain
from edgemat.targets.apheaders import require_ap_headers
from edgemat.targets.hls import Plan, Simulation, export, model_cost, project
from edgemat.targets.hls.config import reciprocal
from edgemat.targets.hls.simulation import STRICT
from edgemat.targets.hls.vectors import decode, encode, run_reference
from edgemat.targets.layout import to_native

from .graphs import graph_of, rebuilt
from .networks import branches, feed, residual

HOSTILE = 'a"; system("rm -rf /"); //\n../\\x {} $(touch x) ]]'


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("io", ["parallel", "stream"])
def test_export_is_deterministic_and_replaces_an_earlier_one(tmp_path, io):
    first = contents(export(residual(), tmp_path / "a", io=io))
    assert contents(export(residual(), tmp_path / "b", io=io)) == first
    (tmp_path / "a" / "stale").write_text("x")
    assert contents(export(residual(), tmp_path / "a", io=io)) == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_only_what_is_used_is_copied(tmp_path):
    found = contents(export(residual(), tmp_path / "a", io="stream"))
    headers = {name for name in found if name.startswith("include/")}
    assert "include/edgemat/conv.hpp" in headers and "include/edgemat/softmax.hpp" not in headers
    assert len(found) < 40 and sum(map(len, found.values())) < 200_000
    for name in ("build_hls.tcl", "hls_config.cfg", "Makefile", "testbench.cpp", "vectors/expected.bin"):
        assert name in found


@pytest.mark.parametrize("io", ["parallel", "stream"])
def test_the_tool_scripts_say_what_the_plan_says(tmp_path, io):
    folder = export(residual(), tmp_path / "a", io=io, clock_ns=3.5, part="xc7z020clg400-1")
    tcl, cfg = (folder / "build_hls.tcl").read_text(), (folder / "hls_config.cfg").read_text()
    assert "set_part {xc7z020clg400-1}" in tcl and "create_clock -period 3.5" in tcl
    assert "part=xc7z020clg400-1\n" in cfg and "clock=3.5ns\n" in cfg and "syn.top=em_residual\n" in cfg
    for step in ("csim_design", "csynth_design", "cosim_design", "export_design"):
        assert step in tcl
    assert ("pipeline_style frp" in tcl) == ("pipeline_style=frp" in cfg) == (io == "stream")
    tclsh = shutil.which("tclsh")
    if tclsh is not None:
        commands = "open_project set_top add_files open_solution set_part create_clock config_dataflow config_compile"
        stubs = "".join(f"proc {name} args {{}}\n" for name in f"{commands} csim_design csynth_design".split())
        done = subprocess.run([tclsh], input=stubs + tcl, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and not done.stderr


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(EdgematError, match="is not an edgemat hls project"):
        export(residual(), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch, error):
    export(residual(), tmp_path / "a")
    before = contents(tmp_path)

    def fail(files, folder):
        folder.mkdir(parents=True)
        (folder / "parameters.hpp").write_text("half")
        raise error

    monkeypatch.setattr(destination, "write_files", fail)
    with pytest.raises((EdgematError, KeyboardInterrupt)):
        export(residual(), tmp_path / "a")
    assert contents(tmp_path) == before


def hostile():
    """A residual network whose every name is an attack."""
    graph = residual()
    table = {name: f"{HOSTILE}{i}" for i, name in enumerate(graph.tensors)}
    calls = [
        rebuilt(c, HOSTILE + c.name, [table.get(n, n) for n in c.inputs], table[c.outputs[0]]) for c in graph.nodes
    ]
    inputs = [replace(graph.tensors[n], name=table[n]) for n in graph.inputs]
    return graph_of(calls, inputs, [table[n] for n in graph.outputs], HOSTILE)


@pytest.mark.parametrize("io", ["parallel", "stream"])
def test_names_never_reach_code_raw(tmp_path, compiler, io):
    graph = hostile()
    found = contents(export(graph, tmp_path / "a", io=io))
    for name, data in found.items():
        assert re.fullmatch(r"[A-Za-z0-9_./]+", name)
        if not name.startswith(("vectors/", "include/", "sim/")):
            assert b'system("' not in data and b"rm -rf" not in data and b"]]" not in data, name
            assert b"touch x" not in data
    codes = {graph.inputs[0]: feed(residual(), 2)["x"]}
    with Simulation(graph, Plan(io=io), compiler=compiler, optimize="0") as simulation:
        result = simulation.run(codes)[graph.outputs[0]]
    assert np.array_equal(result, run_reference(to_native(graph), codes)[graph.outputs[0]])


def test_names_that_collide_after_sanitising_stay_apart(compiler):
    x = tensor("ufixed<6,4>", (None, 4))
    w = constant("fixed<4,1>", random_codes("fixed<4,1>", (4, 4), 1), "w")
    calls, last = [], x
    for name in ("a", "A", "a_weight", "a weight", "a_exp", "main", "int", "x", "parameters", "em_case_", "edgemat"):
        attrs = {"w_format": "fixed<4,1>", "requantize": "ufixed<6,4,RND,SAT>"}
        calls.append(Call(BY_NAME["Linear"], name, [last, w[0]], attrs, {1: w[1]}, (f"{name}",)))
        last = calls[-1].y[0]
    calls[7] = rebuilt(calls[7], "x", calls[7].inputs, "x.")
    calls[8] = rebuilt(calls[8], "parameters", ("x.", "w"), "parameters")
    graph = graph_of(calls, [x], [last.name])
    codes = feed(graph, 3)
    expected = run_reference(to_native(graph), codes)
    for io in ("parallel", "stream"):
        with Simulation(graph, Plan(io=io), compiler=compiler, optimize="0") as simulation:
            assert np.array_equal(simulation.run(codes)[last.name], expected[last.name])


def test_a_constant_larger_than_the_stream_it_meets(compiler):
    x = tensor("fixed<6,3>", (None, 1, 3))
    one = constant("fixed<5,3>", random_codes("fixed<5,3>", (4, 3), 3), "c")
    total = Call(BY_NAME["Sub"], "total", [one[0], x], {}, {0: one[1]}, ("total",))
    graph = graph_of([total], [x], ["total"])
    codes = feed(graph, 3)
    expected = run_reference(to_native(graph), codes)
    for io in ("parallel", "stream"):
        with Simulation(graph, Plan(io=io), compiler=compiler, optimize="0") as simulation:
            assert np.array_equal(simulation.run(codes)["total"], expected["total"])


def test_two_outputs_of_one_tensor_and_an_input_passed_on(compiler):
    x = tensor("fixed<6,3>", (None, 5))
    relu = Call(BY_NAME["Relu"], "r", [x], {}, None, ("r",))
    graph = graph_of([relu], [x], ["r", "x"])
    codes = feed(graph, 3)
    for io in ("parallel", "stream"):
        with Simulation(graph, Plan(io=io), compiler=compiler, optimize="0") as simulation:
            found = simulation.run(codes)
        assert np.array_equal(found["x"], codes["x"]) and np.array_equal(found["r"], np.maximum(codes["x"], 0))


def test_a_tensor_that_nothing_reads_is_drained(compiler):
    x, unused = tensor("fixed<6,3>", (None, 5)), tensor("fixed<6,3>", (None, 4), "unused")
    calls = [Call(BY_NAME["Relu"], name, [x], {}, None, (name,)) for name in ("read", "dead")]
    graph = graph_of(calls, [x, unused], ["read"])
    codes = feed(graph, 3)
    for io, threads in (("parallel", False), ("stream", False), ("stream", True)):
        with Simulation(graph, Plan(io=io), compiler=compiler, optimize="0", threads=threads) as simulation:
            assert np.array_equal(simulation.run(codes)["read"], np.maximum(codes["x"], 0))


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("io", ["parallel", "stream"])
def test_its_makefile_runs_the_simulation(tmp_path, compiler, io):
    folder = export(residual(size=4), tmp_path / "a", io=io)
    command = ["make", "-C", str(folder), f"PYTHON={sys.executable}", f"AP_INCLUDE={require_ap_headers()}"]
    command += ["CXXFLAGS=-O0", f"CXX={' '.join(compiler.command)}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=compiler.environment())
    assert done.returncode == 0 and "exact" in done.stdout, done.stderr
    data = bytearray((folder / "vectors" / "expected.bin").read_bytes())
    data[0] ^= 1
    (folder / "vectors" / "expected.bin").write_bytes(data)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=compiler.environment())
    assert done.returncode != 0 and "WRONG" in done.stdout


def test_zig_compiles_it(tmp_path):
    command = toolchain.zig_command()
    if command is None:
        pytest.skip('pip install "edgemat[mcu]" brings zig')
    zig = next(c for c in toolchain.compilers("c++") if c.name == "zig")
    graph = residual(size=4)
    codes = feed(graph, 2)
    with Simulation(graph, Plan(io="stream"), compiler=zig, optimize="0") as simulation:
        found = simulation.run(codes)
    assert np.array_equal(found["pooled"], run_reference(to_native(graph), codes)["pooled"])


def test_host_functions_quantise_as_the_definition(tmp_path, compiler):
    from edgemat import formats
    from edgemat.formats import OVERFLOWS, ROUNDINGS, Fixed

    values = np.concatenate([np.arange(-40, 40) / 16, [0.49999997, -0.49999997, 1e30, -1e30, 3e-40]]).astype(np.float32)
    modes = [(q, o) for q in ROUNDINGS for o in OVERFLOWS]
    lines = ["#include <cstdio>", '#include "edgemat/boundary.hpp"', "int main() {", "const float values[] = {"]
    lines += [", ".join(f"{v.hex()}f" for v in values.astype(float).tolist()), "};", f"const int n = {len(values)};"]
    for kind in ("ap_int<5>", "ap_uint<5>"):
        for q, o in modes:
            lines.append(
                f"for (int i = 0; i < n; i++) {{ {kind} code; edgemat::quantize_code<edgemat::{q}, edgemat::{o}>"
                '(values[i], 2, code); std::printf("%d\\n", code.to_int()); }'
            )
    narrow = [("ap_int<5>", "RND_CONV", "SAT_SYM", bits) for bits in (0, 1, 3)]
    narrow += [("ap_uint<5>", "TRN_ZERO", "SAT", bits) for bits in (0, 1, 4)] + [("ap_int<2>", "TRN", "SIGN", 2)]
    for kind, q, o, bits in narrow:
        lines.append(
            f"for (int i = 0; i < n; i++) {{ {kind} code; edgemat::quantize_code<edgemat::{q}, edgemat::{o}>"
            f'(values[i], 2, code, {bits}); std::printf("%d\\n", code.to_int()); }}'
        )
    source = tmp_path / "host.cpp"
    source.write_text("\n".join([*lines, "return 0; }"]))
    from pathlib import Path

    from edgemat.targets.hls.project import library

    program = toolchain.compile(
        compiler, [source], tmp_path / "host", standard="c++17", optimize="0",
        include=[Path(str(library())) / "include"], system_include=[require_ap_headers()],
        flags=[*compiler.ap_flags, "-Wno-unknown-pragmas"],
    )  # fmt: skip
    found = np.array(subprocess.run([str(program)], capture_output=True, check=True).stdout.split(), np.int64)
    expected = [formats.quantize(values, Fixed(5, 3, signed, q, o)) for signed in (True, False) for q, o in modes]
    for kind, q, o, bits in narrow:
        channel = Fixed.of_channels((5, bits), (2, 2), kind == "ap_int<5>", q, o) if o != "SIGN" else formats.BIPOLAR
        expected.append(formats.quantize(np.stack([values, values], 1), channel)[:, 1])
    assert np.array_equal(found, np.concatenate(expected))


def test_the_headers_compile_in_any_order(tmp_path, compiler):
    from pathlib import Path

    from edgemat.targets.hls.project import library

    folder = Path(str(library()))
    headers = sorted(header.name for header in (folder / "include" / "edgemat").glob("*.hpp"))
    # Forwards and backwards: a header that needs another one first fails in one of the orders.
    for order in (headers, headers[::-1]):
        source = tmp_path / "all.cpp"
        source.write_text("".join(f'#include "edgemat/{name}"\n' for name in order))
        command = [*compiler.command, "-std=c++14", "-fsyntax-only", *STRICT, "-pedantic", *compiler.ap_flags]
        command += ["-isystem", str(require_ap_headers()), "-I", str(folder / "include"), "-I", str(folder / "sim")]
        toolchain.run([*command, str(source)], what="compiling the library", env=compiler.environment())


def test_the_example_of_the_library_runs(tmp_path, compiler):
    from pathlib import Path

    from edgemat.targets.hls.project import library

    folder = Path(str(library()))
    example = re.search(r"```cpp\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert example is not None
    main = "int main() { ap_int<8> x[3] = {10, 3, 1}; ap_uint<6> y[2]; top(x, y); return y[0] * 10 + y[1]; }\n"
    (tmp_path / "example.cpp").write_text(example[1] + main)
    program = toolchain.compile(
        compiler, [tmp_path / "example.cpp"], tmp_path / "example", standard="c++14", optimize="0",
        include=[folder / "include", folder / "sim"], system_include=[require_ap_headers()],
        flags=[*compiler.ap_flags, "-Wno-unknown-pragmas"],
    )  # fmt: skip
    # 10 - 6 + 3 + 4 = 11 -> 2.75 -> 3; 3 - 1 - 4 = -2 -> -0.5 -> 0
    assert subprocess.run([str(program)], check=False).returncode == 30


def test_vectors_round_trip():
    network = to_native(branches())
    codes = run_reference(network, feed(branches(), 3))
    data = encode(network.outputs, codes)
    assert all(np.array_equal(array, codes[name]) for name, array in decode(network.outputs, data).items())


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 9, 49, 64, 121])
def test_the_reciprocal_is_exact_over_its_whole_range(divisor):
    lo, hi = -3000, 5000
    multiplier, shift, offset = reciprocal(lo, hi, divisor)
    n = np.arange(lo, hi + 1)
    assert np.array_equal(((n + offset * divisor) * multiplier >> shift) - offset, n // divisor)


def test_a_sum_of_more_than_64_bits_is_refused():
    x = tensor("fixed<40,20>", (None, 2))
    call = Call(BY_NAME["Relu"], "r", [x], {}, None, ("r",))
    graph = graph_of([call], [x], ["r"])
    from edgemat.op import Bounds

    call.bounds = Bounds((0, 1 << 70), (0, 1 << 70))
    with pytest.raises(UnsupportedOpError, match="needs 72 bits"):
        project(graph)


def test_cost_is_modelled_and_says_so():
    slow, fast = (model_cost(residual(), Plan(io="stream", reuse=reuse)) for reuse in (27, 1))
    assert fast.to_dict()["basis"] == "modelled"
    assert slow.multipliers < fast.multipliers and slow.ii_cycles > fast.ii_cycles
    assert slow.macs == fast.macs == 2 * 8 * 8 * 27 * 3
    assert slow.latency_cycles > fast.latency_cycles >= 64
    assert [p.node for p in fast.processes] == ["clone_x", "first", "second", "joined", "pooled"]
    clone = fast.processes[0]
    assert sorted(clone.fifo_depths.values())[0] == 2 and clone.fifo_bits > 0
    assert fast.samples_per_second == pytest.approx(1e9 / (fast.ii_cycles * fast.clock_ns))
