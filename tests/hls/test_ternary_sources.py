"""No weight is multiplied: what the generated C++ of a ternary network says, and its units on their own."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import edgemat
from edgemat.errors import ToolchainError
from edgemat.lower import read
from edgemat.op import Call
from edgemat.ops import BY_NAME
from edgemat.ops.cases import constant, tensor
from edgemat.report import inspect
from edgemat.targets import toolchain
from edgemat.targets.apheaders import require_ap_headers
from edgemat.targets.destination import write_files
from edgemat.targets.hls import Plan, Simulation, model_cost, project
from edgemat.targets.hls.project import library
from edgemat.targets.hls.vectors import run_reference, sample_vectors

PLANS = {
    "parallel": Plan(),
    "folded": Plan(reuse=8),
    "axi": Plan(weights="axi", packing="1.6"),
    "stream": Plan(io="stream", reuse=4),
    "uram": Plan(io="stream", weights="uram"),
}
TERNARY = "fixed<2,0,RND,SAT_SYM>"
# clang-format sets a space on both sides of a multiplication, and none before a pointer's star.
PRODUCT = re.compile(r"[^\n;{]* \*=? [^\n;{]*")
SIZE = re.compile(r" \* (C::(in|out|kernel|stride|dilation)_\w+|C::(rows|pe|simd|chunks|row_bytes|step_words)\b"
                  r"|CHANNELS\b|GROUPS\b|group_channels\b|word_bytes<W>::count)")  # fmt: skip
NO_PRODUCTS = """
#include <type_traits>
#include <ap_int.h>
template <class T> struct is_code { static const bool value = false; };
template <int W> struct is_code<ap_int<W> > { static const bool value = true; };
template <int W> struct is_code<ap_uint<W> > { static const bool value = true; };
template <class A, class B, class = typename std::enable_if<is_code<A>::value || is_code<B>::value>::type>
void operator*(const A&, const B&) = delete;
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Lowered files of one network, with ternary weights and with four-bit ones."""
    torch = pytest.importorskip("torch")
    found = {}
    for name, weights in (("ternary", TERNARY), ("ordinary", "fixed<4,0,RND,SAT>")):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten(),
            torch.nn.Linear(36, 5),
        )  # fmt: skip
        q = edgemat.quantize(net, edgemat.Recipe(input="fixed<8,1>", weights=weights, activations="fixed<6>"))
        x = torch.rand(16, 2, 6, 6)
        edgemat.calibrate(q, [x])
        found[name] = tmp_path_factory.mktemp("files") / f"{name}.onnx"
        edgemat.to_onnx(q.eval(), x[:1], found[name])
    return found


def preprocessed(made, folder):
    """The top function's translation unit without the headers that are not edgemat's."""
    write_files(made.files(vectors=False), folder / "project")
    (folder / "stubs").mkdir()
    for name in ("ap_int.h", "hls_stream.h"):
        (folder / "stubs" / name).write_text("")
    command = [*toolchain.find_cxx().command, "-E", "-P", "-std=c++14"]
    for place in ("stubs", "project/include", "project"):
        command += ["-I", str(folder / place)]
    command.append(str(folder / "project" / f"{made.top}.cpp"))
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def products_of_codes(text):
    """Lines with a multiplication whose right factor is not a size of the layer."""
    lines = [line for line in PRODUCT.findall(text) if PRODUCT.match(SIZE.sub("", line))]
    return [line.strip() for line in lines]


@pytest.mark.parametrize("plan", PLANS)
def test_the_source_of_a_ternary_network_multiplies_positions_only(compiler, files, tmp_path, plan):
    made = project(read(files["ternary"]), PLANS[plan])
    text = preprocessed(made, tmp_path)
    assert f"void {made.top}(" in text and "struct ternary_constants" in text
    assert products_of_codes(text) == []


def test_the_source_of_another_network_multiplies(compiler, files, tmp_path):
    text = preprocessed(project(read(files["ordinary"]), Plan()), tmp_path)
    assert any("Sum(operand(a))" in line for line in products_of_codes(text))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sum += codes[C::tap(i)];", "sum += codes[C::tap(i)] * 1;"),
        ("sum -= codes[C::tap(i)];", "sum -= 1 * codes[C::tap(i)];"),
        ("sum += ((code ^ -minus) + minus) &", "sum += code *"),
        (".total();", ".total(), partial[p] *= 1;"),
    ],
    ids=["tree", "left", "packed", "compound"],
)
def test_one_product_put_in_is_seen(compiler, files, tmp_path, old, new):
    made = project(read(files["ternary"]), PLANS["folded"])
    found = made.files(vectors=False)
    unit = "include/edgemat/ternary.hpp"
    assert found[unit].count(old.encode()) == 1

    class Multiplying:
        top = made.top

        def files(self, **_):
            return found | {unit: found[unit].replace(old.encode(), new.encode())}

    assert len(products_of_codes(preprocessed(Multiplying(), tmp_path))) == 1


@pytest.mark.parametrize("plan", PLANS)
def test_no_code_is_multiplied_where_that_does_not_compile(compiler, files, tmp_path, plan):
    poison = tmp_path / "no_products.hpp"
    poison.write_text(NO_PRODUCTS)
    options = {
        "compiler": compiler, "optimize": "0", "defines": {"EDGEMAT_HARDWARE_TYPES": None},
        "flags": ("-include", str(poison)),
    }  # fmt: skip
    graph = read(files["ternary"])
    with Simulation(graph, PLANS[plan], **options) as simulation:
        codes, expected = sample_vectors(simulation.project.design.network)
        found = simulation.run(codes)
    assert all(np.array_equal(found[name], expected[name]) for name in graph.outputs)
    if plan == "parallel":
        with pytest.raises(ToolchainError):
            Simulation(read(files["ordinary"]), PLANS[plan], **options)


def test_nothing_multiplies_by_count(files):
    assert inspect(files["ternary"]).totals["multiplies"] == 0
    assert inspect(files["ordinary"]).totals["multiplies"] > 0
    w = constant("fixed<2,0,RND,SAT>", np.array([[1]]))
    attrs = {"w_format": "fixed<2,0,RND,SAT>"}  # may hold -2: one weight, one multiplication
    call = Call(BY_NAME["Linear"], "one", [tensor("fixed<8,3>", (None, 1)), w[0]], attrs, {1: w[1]})
    assert call.op.cost(call).multiplies == 1
    for plan in PLANS.values():
        cost = model_cost(read(files["ternary"]), plan)
        assert cost.multipliers == cost.macs == 0 and cost.adders > 0 and cost.adder_luts > cost.adders
        assert (cost.memory_bytes > 0) == (plan.weights == "axi")


def test_the_makefile_of_a_project_with_memories(compiler, files, tmp_path):
    folder = edgemat.export(files["ternary"], target="hls", output=tmp_path / "p", plan=Plan(weights="axi"))
    assert len(list((folder / "memory").iterdir())) == 2
    assert "add_files -tb memory" in (folder / "build_hls.tcl").read_text()
    assert "tb.file=memory" in (folder / "hls_config.cfg").read_text()
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed; install it (make toolchains)")
    headers = f"AP_INCLUDE={require_ap_headers()}"
    done = subprocess.run([make, "-C", str(folder), headers, "CXXFLAGS=-O0"], capture_output=True, text=True)
    assert done.returncode == 0 and "exact" in done.stdout, done.stdout + done.stderr
    memory = next((folder / "memory").iterdir())
    memory.write_bytes(bytes(byte ^ 0x22 if byte & 0x11 else byte for byte in memory.read_bytes()))
    wrong = subprocess.run([str(folder / "testbench")], cwd=folder, capture_output=True, text=True)
    assert wrong.returncode == 1 and "WRONG" in wrong.stdout


def test_a_memory_travels_with_a_run_of_steps(compiler, files):
    graph = read(files["ternary"])
    with Simulation(graph, PLANS["uram"], compiler=compiler, optimize="0", threads=True) as simulation:
        codes, _ = sample_vectors(simulation.project.design.network)
        many = {name: np.tile(data, (5, *[1] * (data.ndim - 1))) for name, data in codes.items()}
        expected = run_reference(simulation.project.design.network, many)
        for _ in range(2):
            found = simulation.run(many)
            assert all(np.array_equal(found[name], expected[name]) for name in graph.outputs)


@pytest.mark.parametrize("defines", [{}, {"EDGEMAT_HARDWARE_TYPES": None}], ids=["native", "hardware"])
def test_units_stand_alone(compiler, tmp_path, defines):
    source = Path(__file__).with_name("ternary_units.cpp")
    base = Path(str(library()))
    program = toolchain.compile(
        compiler, [source], tmp_path / "units", standard="c++14", optimize="0",
        include=[base / "include", base / "sim"], system_include=[require_ap_headers()], defines=defines,
        flags=[*compiler.ap_flags, "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-uninitialized",
               "-Wno-maybe-uninitialized"],
    )  # fmt: skip
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.stdout == "exact\n"
