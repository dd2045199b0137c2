"""The exported folder: what it holds, how it is written, its API, and names that mean harm."""

from __future__ import annotations

import re
import subprocess

import numpy as np
import pytest

from edgemat import formats
from edgemat.errors import EdgematError
from edgemat.formats import OVERFLOWS, ROUNDINGS, Fixed
from edgemat.ops.cases import tensor
from edgemat.targets import destination, toolchain
from edgemat.targets.identifiers import Identifiers, identifier
from edgemat.targets.mcu.generator import export, project
from edgemat.targets.mcu.host import STRICT
from tests.mcu import networks
from tests.mcu.networks import Network

NASTY = ['"; system("x"); "', "../../etc/x", "int", "*/ #error\n", "a\nb", "9lives", "", "ünï", "em_conv", "x" * 300]


def tree(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_export_is_deterministic_and_small(tmp_path) -> None:
    one = tree(export(networks.residual(), tmp_path / "one"))
    two = tree(export(networks.residual(), tmp_path / "two"))
    assert one == two
    expected = {"model.h", "model.c", "weights.h", "weights.c", "kernels.h", "kernels.c", "main.c", "sample.h"}
    assert {name for name in one if "/" not in name} == expected | {"Makefile", "CMakeLists.txt"}
    assert "kernels/conv.c" in one and "kernels/table.c" not in one and "kernels/softmax.c" not in one


def test_exported_example_builds_and_agrees(tmp_path, cc) -> None:
    for name, make in networks.ALL.items():
        folder = export(make(), tmp_path / name)
        sources = [folder / file for file in ("main.c", "model.c", "kernels.c", "weights.c")]
        program = toolchain.compile(cc, sources, folder / "example", standard="c99", flags=STRICT)
        done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        assert done.stdout.endswith("exact: 0 codes differ from the reference\n")


def test_makefile_builds(tmp_path, cc) -> None:
    make = toolchain.find_program("make")
    if make is None or cc.name == "zig":
        pytest.skip("make or a system compiler is missing (make toolchains)")
    folder = export(networks.branching(), tmp_path / "net")
    command = [str(make), "-C", str(folder), "run", f"CC={cc.command[0]}", "CFLAGS=-O1 -Werror"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "exact: 0" in done.stdout, done.stderr


def test_cmake_builds(tmp_path) -> None:
    cmake = toolchain.find_program("cmake")
    if cmake is None:
        pytest.skip("cmake is missing (make toolchains)")
    folder = export(networks.branching(), tmp_path / "net")
    build = str(tmp_path / "build")
    for command in ([str(cmake), "-S", str(folder), "-B", build], [str(cmake), "--build", build]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_control_a_wrong_weight_fails_the_example(tmp_path, cc) -> None:
    folder = export(networks.residual(), tmp_path / "net")
    text = (folder / "weights.c").read_text()
    at = text.index("head_weight")
    changed = re.sub(r"\n    (-?\d+),", lambda m: f"\n    {int(m[1]) - 3},", text[at:], count=1)
    (folder / "weights.c").write_text(text[:at] + changed)
    sources = [folder / file for file in ("main.c", "model.c", "kernels.c", "weights.c")]
    program = toolchain.compile(cc, sources, folder / "example", standard="c99")
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "WRONG" in done.stdout


def test_an_existing_project_is_replaced_and_nothing_else(tmp_path) -> None:
    folder = export(networks.residual(), tmp_path / "net")
    (folder / "stale.c").write_text("old")
    export(networks.residual(), folder)
    assert not (folder / "stale.c").exists()
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.txt").write_text("precious")
    with pytest.raises(EdgematError, match="is not an edgemat mcu project"):
        export(networks.residual(), other)
    assert (other / "chapter1.txt").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net", "thesis"]


@pytest.mark.parametrize("interruption", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch, interruption) -> None:
    def fail(files, folder) -> None:
        folder.mkdir()
        (folder / "model.h").write_text("half")
        raise interruption

    monkeypatch.setattr(destination, "write_files", fail)
    expected = EdgematError if isinstance(interruption, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if expected is EdgematError else None):
        export(networks.residual(), tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_names_from_strangers_become_identifiers(tmp_path, cc) -> None:
    for name in NASTY:
        assert re.fullmatch(r"[a-z][a-z0-9_]{0,63}", identifier(name)), name
    table = Identifiers(["model"])
    assert len({table[name] for name in [*NASTY, "model", "a b", "a-b", "A_B"]}) == len(NASTY) + 4
    net = Network(NASTY[0])
    x = net.add_input(tensor("fixed<8,3>", (None, 6), NASTY[3]))
    for number, name in enumerate(NASTY):
        x = net.linear(name or f"n{number}", x, 4)
    net.output(x)
    net.output_names[0] = NASTY[1]
    folder = export(net, tmp_path / "net")
    sources = [folder / file for file in ("main.c", "model.c", "kernels.c", "weights.c")]
    program = toolchain.compile(cc, sources, folder / "example", standard="c99", flags=STRICT)
    assert subprocess.run([str(program)], capture_output=True, check=False).returncode == 0
    for text in tree(folder).values():
        assert not any(word in text for word in (b"system(", b"#error", b"../", b'em_system_x_"', b"\n9"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net"]


@pytest.mark.parametrize("name", ["conv", "conv_s8_s8_s32", "status", "linear_params", "model", "x", "requantize"])
def test_model_names_never_meet_names_of_the_library(name, tmp_path, cc) -> None:
    net = Network(name)
    net.output(net.linear("conv", net.add_input(tensor("fixed<8,3>", (None, 3), "x")), 2))
    folder = export(net, tmp_path / "net")
    sources = [folder / file for file in ("main.c", "model.c", "kernels.c", "weights.c")]
    toolchain.compile(cc, sources, folder / "example", standard="c99", flags=STRICT)


API = """
#include <math.h>
#include <stdio.h>
#include "model.h"
static {p}_input_t codes[{u}_INPUT_SIZE];
static {p}_output_t out[{u}_OUTPUT_SIZE];
static int64_t arena[{u}_ARENA_BYTES / 8 + 1];
int main(void) {{
    {p} model = {{0}};
    float values[{u}_INPUT_SIZE] = {{0}};
    if ({p}_arena_bytes() != {u}_ARENA_BYTES) return 1;
    if ({p}_run(&model, codes, out) != EM_ERROR_STATE) return 2;
    if ({p}_init(NULL, arena, sizeof arena) != EM_ERROR_NULL) return 3;
    if ({p}_init(&model, NULL, sizeof arena) != EM_ERROR_NULL) return 4;
    if ({p}_init(&model, arena, {u}_ARENA_BYTES - 1) != EM_ERROR_ARENA) return 5;
    if ({p}_init(&model, (char *)arena + 4, sizeof arena) != EM_ERROR_ARENA) return 6;
    if ({p}_init(&model, arena, sizeof arena) != EM_OK) return 7;
    if ({p}_run(&model, NULL, out) != EM_ERROR_NULL || {p}_run(&model, codes, NULL) != EM_ERROR_NULL) return 8;
    if ({p}_quantize_input(values, codes) != EM_OK || {p}_run(&model, codes, out) != EM_OK) return 9;
    values[1] = NAN;
    if ({p}_quantize_input(values, codes) != EM_ERROR_NAN) return 10;
    values[1] = -INFINITY;
    if ({p}_quantize_input(values, codes) != EM_OK || codes[1] != {u}_INPUT_MIN_CODE) return 11;
    return 0;
}}
"""


def test_status_codes_of_the_api(tmp_path, cc) -> None:
    folder = export(networks.residual(), tmp_path / "net")
    (folder / "api.c").write_text(API.format(p="em_residual_net", u="EM_RESIDUAL_NET"))
    sources = [folder / file for file in ("api.c", "model.c", "kernels.c", "weights.c")]
    program = toolchain.compile(cc, sources, folder / "api", standard="c99")
    assert subprocess.run([str(program)], check=False).returncode == 0


REAL = """
#include <stdio.h>
#include "model.h"
int main(void) {{
    static float values[{u}_INPUT_SIZE];
    static {p}_input_t codes[{u}_INPUT_SIZE];
    static {real} back[{u}_OUTPUT_SIZE];
    while (fread(values, sizeof values, 1, stdin) == 1) {{
        int32_t status = {p}_quantize_input(values, codes);
        {p}_dequantize_output(codes, back);
        fwrite(&status, 4, 1, stdout);
        fwrite(codes, sizeof codes, 1, stdout);
        fwrite(back, sizeof back, 1, stdout);
    }}
    return 0;
}}
"""


def real_values(fmt: Fixed, size: int) -> np.ndarray:
    """Ties, neighbours of ties, rails, subnormals, infinities and random numbers for a format."""
    rng = np.random.default_rng(0)
    lsb = np.ldexp(1.0, -np.asarray(fmt.fracs, dtype=np.int64).max())
    low, high = fmt.rails
    rails = np.concatenate(fmt.channel_rails())
    near = np.concatenate([np.arange(-9, 10), *(rail + np.arange(-3, 4) for rail in rails)]) + 0.5
    ties = np.concatenate([near * lsb, (near + 0.5) * lsb]).astype(np.float32)
    spread = np.concatenate([ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))])
    odd = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-38, 3.4e38, -3.4e38, 1.0, -1.0, 0.49999997, -0.49999997])
    random = rng.normal(size=200) * lsb * (high - low)
    values = np.concatenate([spread, odd, random]).astype(np.float32)
    if fmt.overflow != "WRAP":
        values = np.concatenate([values, np.array([np.inf, -np.inf], np.float32)])
    return np.resize(values, (-(-len(values) // size), size))


@pytest.mark.parametrize("text", ["fixed<8,3", "ufixed<6,-3", "fixed<16,20", "fixed<7,[1,4,-2]", "fixed<30,8"])
def test_quantize_and_dequantize_equal_the_reference(text, tmp_path, cc) -> None:
    check_ports([f"{text},{q},{o}>" for q, o in zip(ROUNDINGS, OVERFLOWS * 2, strict=False)], tmp_path, cc)


def test_ports_with_channels_of_their_own_width_and_with_signs(tmp_path, cc) -> None:
    texts = ["fixed<[7,3,0],[1,4,-2],RND,SAT>", "ufixed<[1,0,12],[3,1,2],RND_CONV,SAT>", "bipolar"]
    check_ports([*texts, "fixed<[40,1,2],[8,1,2],TRN_ZERO,SAT_SYM>"], tmp_path, cc)


def check_ports(texts, tmp_path, cc) -> None:
    """The generated functions between real values and codes, for each format of three channels."""
    for index, text in enumerate(texts):
        fmt = Fixed.parse(text)
        net = Network("real")
        x = net.add_input(tensor(str(fmt), (None, 3, 1, 5), "x"))
        net.output(net.reshape("view", x, (3, 5, 1)))
        folder = tmp_path / str(index)
        made = project(net)
        destination.write_files(made.files(example=False), folder)
        real = made.outputs[0].real_type
        (folder / "real.c").write_text(REAL.format(p="em_real", u="EM_REAL", real=real))
        sources = [folder / file for file in ("real.c", "model.c", "kernels.c", "weights.c")]
        program = toolchain.compile(cc, sources, folder / "real", standard="c99", optimize="1")
        values = real_values(fmt, 15)
        native = values.reshape(-1, 3, 1, 5).transpose(0, 2, 3, 1)
        done = subprocess.run([str(program)], input=native.tobytes(), capture_output=True, check=True)
        code = np.dtype(f"<{made.inputs[0].element[0].replace('s', 'i')}{int(made.inputs[0].element[1:]) // 8}")
        row = np.dtype([("status", "<i4"), ("codes", code, 15), ("back", "<f4" if real == "float" else "<f8", 15)])
        table = np.frombuffer(done.stdout, dtype=row)
        expected = formats.quantize(values.reshape(-1, 3, 1, 5), fmt)
        found = table["codes"].astype(np.int64).reshape(-1, 1, 5, 3).transpose(0, 3, 1, 2)
        assert not table["status"].any()
        np.testing.assert_array_equal(found, expected, err_msg=str(fmt))
        back = table["back"].reshape(-1, 1, 5, 3).transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(back, formats.dequantize(expected, fmt))
