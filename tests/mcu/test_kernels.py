"""Every C kernel against its dossier's reference, under the sanitizers and with every warning an error."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgemat.formats import OVERFLOWS, ROUNDINGS
from edgemat.op import Call
from edgemat.ops import BY_NAME, OPS
from edgemat.ops.cases import constant, random_codes, tensor
from edgemat.targets import toolchain
from edgemat.targets.destination import write_files
from edgemat.targets.mcu import emulator, variants
from edgemat.targets.mcu.generator import project
from edgemat.targets.mcu.host import SANITIZE, STRICT, HostProgram
from edgemat.targets.mcu.library import kernel_folder
from edgemat.targets.mcu.sample import run_reference
from tests.mcu.case_graphs import CaseGraph, feeds, side_by_side

# What the generator makes of these has no kernel: ends of the graph, data, and the states kept beside it (tests/state).
BOUNDARY = {"quantize", "dequantize", "constant", "literal", "state", "next_state"}
NATIVE = [op for op in OPS if op.stem not in BOUNDARY]


@pytest.fixture(scope="module")
def checked_flags() -> tuple[str, ...]:
    """Strict warnings, and the sanitizers where the compiler has their runtime."""
    compiler = toolchain.find_c()
    return (*STRICT, *(SANITIZE if compiler.name == "gcc" else ()))


def assert_equal(graph: CaseGraph, flags: tuple[str, ...], samples: int = 12) -> None:
    codes = feeds(graph, samples)
    expected = run_reference(graph, codes)
    with HostProgram(graph, flags=flags, optimize="0") as program:
        found = program.run(codes)
    for name in graph.outputs:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def native_cases(op) -> list[Call]:
    """The dossier's cases whose variable operands have a batch axis."""
    return [c for c in op.cases() if all(x.batched or i in c.constants for i, x in enumerate(c.x))]


@pytest.mark.parametrize("op", NATIVE, ids=lambda op: op.stem)
def test_kernel_equals_the_reference_on_every_case(op, checked_flags) -> None:
    calls = native_cases(op)
    assert calls
    assert_equal(side_by_side(op.stem, calls), checked_flags)


@pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))
@pytest.mark.parametrize("machine", emulator.MACHINES)
def test_every_case_on_emulated_machines(machine) -> None:
    graph = side_by_side("all", [call for op in NATIVE for call in native_cases(op)])
    codes = feeds(graph, 7)
    expected = run_reference(graph, codes)
    found = emulator.run_emulated(graph, codes, machine)
    differ = [name for name in graph.outputs if not np.array_equal(found[name], expected[name])]
    assert differ == []


def test_every_operator_has_a_kernel() -> None:
    assert {op.stem for op in NATIVE} - {"reshape"} <= set(variants.KERNELS)


def convolution(seed: int) -> Call:
    """A convolution of random odd geometry, formats and modes."""
    rng = np.random.default_rng(seed)
    groups = int(rng.choice([1, 1, 2, 3]))
    depthwise = seed % 4 == 3
    in_c = int(rng.integers(2, 10)) if depthwise else groups * int(rng.integers(1, 6))
    groups = in_c if depthwise else groups
    out_c = in_c if depthwise else groups * int(rng.integers(1, 7))
    kernel = rng.integers(1, 4, 2)
    dilations = rng.integers(1, 3, 2)
    extent = (kernel - 1) * dilations + 1
    size = extent + rng.integers(0, 5, 2)
    pads = rng.integers(0, 3, 4)
    x_format = str(rng.choice(["fixed<8,3>", "ufixed<8,3>", "fixed<5,0>", "fixed<16,3>", "ufixed<12,3>"]))
    w_format = str(rng.choice(["fixed<8,1>", "fixed<2,1>", "fixed<12,1>"]))
    width = int(rng.integers(2, 18))
    signed = "" if rng.random() < 0.5 else "u"
    modes = f"{rng.choice(ROUNDINGS)},{rng.choice(OVERFLOWS)}"
    points = (rng.integers(-1, 4, out_c) + width // 2).tolist() if rng.random() < 0.5 else [width // 2]
    y_format = f"{signed}fixed<{width},{points if len(points) > 1 else points[0]},{modes}>".replace(" ", "")
    shape = (out_c, in_c // groups, *map(int, kernel))
    w, codes = constant(w_format, random_codes(w_format, shape, seed))
    b, biases = constant("fixed<20,0>", rng.integers(-500, 500, out_c), "b")
    attrs = {
        "w_format": w_format, "strides": tuple(map(int, rng.integers(1, 4, 2))), "pads": tuple(map(int, pads)),
        "dilations": tuple(map(int, dilations)), "groups": groups, "requantize": y_format,
    }  # fmt: skip
    x = tensor(x_format, (None, in_c, *map(int, size)))
    operands = [x, w, b] if seed % 2 else [x, w]
    constants = {1: codes, 2: biases} if seed % 2 else {1: codes}
    return Call(BY_NAME["Conv"], f"conv{seed}", operands, attrs, constants)


def plain_convolution(call: Call, x: np.ndarray) -> np.ndarray:
    """The definition as four loops, padding by absence: an oracle that shares nothing with the dossier."""
    w, b = call.constants[1], call.constants.get(2)
    n, _, height, width = x.shape
    out_c, per_group, kernel_h, kernel_w = w.shape
    (stride_h, stride_w), (dil_h, dil_w) = call.attrs["strides"], call.attrs["dilations"]
    top, left = call.attrs["pads"][:2]
    group_out = out_c // call.attrs["groups"]
    out_h, out_w = call.exact[0].shape[2:]
    y = np.zeros((n, out_c, out_h, out_w), dtype=np.int64)
    for o, oy, ox in itertools.product(range(out_c), range(out_h), range(out_w)):
        start = o // group_out * per_group
        for ky, kx in itertools.product(range(kernel_h), range(kernel_w)):
            iy, ix = oy * stride_h - top + ky * dil_h, ox * stride_w - left + kx * dil_w
            if 0 <= iy < height and 0 <= ix < width:
                y[:, o, oy, ox] += x[:, start : start + per_group, iy, ix] @ w[o, :, ky, kx]
        if b is not None:
            y[:, o, oy, ox] += b[o]
    return y


def test_convolutions_of_random_geometry(checked_flags) -> None:
    calls = [convolution(seed) for seed in range(40)]
    graph = side_by_side("geometry", calls)
    assert_equal(graph, checked_flags, 7)
    exact = [Call(c.op, c.name, c.x, {**c.attrs, "requantize": ""}, c.constants) for c in calls]
    plain = side_by_side("plain", exact)
    codes = feeds(plain, 7)
    with HostProgram(plain, flags=checked_flags, optimize="0") as program:
        found = program.run(codes)
    for number, call in enumerate(exact):
        np.testing.assert_array_equal(found[f"c{number}_y"], plain_convolution(call, codes[f"c{number}_x0"]))


@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
def test_every_mode_of_the_epilogue_behind_a_product(wide, checked_flags) -> None:
    calls = []
    x_format = "fixed<24,3>" if wide else "fixed<8,3>"
    weights = np.array([[1, -2, 3], [5, 7, -7], [0, 1, 1]]) * (200 if wide else 1)
    w, codes = constant("fixed<12,1>" if wide else "fixed<4,1>", weights)
    targets = ("fixed<5,2", "ufixed<4,3", "fixed<3,[1,2,3]", "fixed<9,[4,12,-2]", "fixed<20,-9")
    for number, (rounding, overflow) in enumerate(itertools.product(ROUNDINGS, OVERFLOWS)):
        for target in (targets[number % 5], targets[(number + 2) % 5]):
            attrs = {"w_format": str(w.format), "requantize": f"{target},{rounding},{overflow}>"}
            calls.append(Call(BY_NAME["Linear"], "fc", [tensor(x_format, (None, 3)), w], attrs, {1: codes}))
    graph = side_by_side("modes", calls)
    names = {v.function for v in project(graph).variants}
    assert all("acc64" in name for name in names) if wide else not any("acc64" in name for name in names)
    assert_equal(graph, checked_flags, 60)


def test_shifts_beyond_the_accumulator(checked_flags) -> None:
    """Right shifts of 40 and 100 bits, left shifts past every rail, under every mode."""
    calls = []
    targets = ("fixed<8,48", "fixed<8,108", "fixed<8,-40", "ufixed<8,-100", "fixed<32,-30", "ufixed<31,2")
    for number, (rounding, overflow) in enumerate(itertools.product(ROUNDINGS, OVERFLOWS)):
        for step, x_format in enumerate(("ufixed<7,4>", "fixed<32,16>", "fixed<32,16>")):
            attrs = {"requantize": f"{targets[(number + 2 * step) % 6]},{rounding},{overflow}>"}
            calls.append(Call(BY_NAME["Requantize"], "r", [tensor(x_format, (None, 5))], attrs))
    assert_equal(side_by_side("far", calls), checked_flags, 20)


def test_each_kernel_file_compiles_alone(tmp_path, cc) -> None:
    for file in sorted(kernel_folder().iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".c"):
            flags = ["-c", *STRICT, "-Wmissing-prototypes"]
            toolchain.compile(cc, [str(file)], tmp_path / "alone.o", standard="c99", flags=flags)


def test_kernels_need_neither_heap_nor_input_output() -> None:
    for file in kernel_folder().iterdir():
        text = file.read_text(encoding="utf-8")
        for word in ("malloc", "calloc", "free(", "printf", "stdio", "alloca", "double *", "goto"):
            assert word not in text, f"{file.name} holds {word}"


def mutated(graph: CaseGraph, codes: dict, file: str, old: str, new: str, tmp_path, cc) -> dict:
    """Output codes after replacing ``old`` by ``new`` once in a generated file."""
    made = project(graph)
    files = made.files(example=False)
    assert old in files[file], f"{file} does not hold {old!r}"
    files[file] = files[file].replace(old, new, 1)
    write_files({**files, "harness.c": made.harness()}, tmp_path)
    program = HostProgram.__new__(HostProgram)
    program.project, program.trace, program.folder = made, False, tmp_path
    sources = [tmp_path / name for name in ("model.c", "kernels.c", "weights.c", "harness.c")]
    program.program = toolchain.compile(cc, sources, tmp_path / "harness", standard="c99", include=[tmp_path])
    return program.run(codes)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("weights.c", "-4, 0, 4", "-4, 1, 4"),
        ("weights.c", "-4, 0, 4", "-5, 0, 4"),
        ("model.c", ".step = 2", ".step = 1"),
    ],
)
def test_control_one_changed_threshold_is_seen(file, old, new, tmp_path, cc) -> None:
    t, codes = constant("fixed<64,64>", np.array([[-8, -4, 0, 4, 8]]))
    attrs = {"y_format": "ufixed<8,8>", "start": 3, "step": 2}
    graph = side_by_side(
        "control", [Call(BY_NAME["Thresholds"], "t", [tensor("fixed<6,6>", (None, 64)), t], attrs, {1: codes})]
    )
    fed = feeds(graph)
    expected = run_reference(graph, fed)["c0_y"]
    with HostProgram(graph) as program:
        np.testing.assert_array_equal(program.run(fed)["c0_y"], expected)
    assert not np.array_equal(mutated(graph, fed, file, old, new, tmp_path, cc)["c0_y"], expected)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("weights.c", "3, -5", "3, -4"),
        ("weights.c", "\n    5,\n};", "\n    6,\n};"),
        ("kernels.c", "EM_RND\n", "EM_RND_MIN_INF\n"),
        ("kernels.c", "EM_RND\n", "EM_RND_CONV\n"),
        ("kernels.c", "EM_OVERFLOW EM_SAT", "EM_OVERFLOW EM_WRAP"),
        ("kernels.c", "EM_OVERFLOW EM_SAT", "EM_OVERFLOW EM_SAT_ZERO"),
        ("kernels.c", "EM_Y_MIN -8", "EM_Y_MIN -7"),
        ("model.c", ".has_bias = 1", ".has_bias = 0"),
        ("model.c", ".in_features = 3", ".in_features = 2"),
    ],
)
def test_control_one_changed_bit_is_seen(file, old, new, tmp_path, cc) -> None:
    w, codes = constant("fixed<4,1>", np.array([[3, -5, 7]]))
    b, bias = constant("fixed<8,4>", np.array([9]), "b")
    attrs = {"w_format": "fixed<4,1>", "requantize": "fixed<4,0,RND,SAT>"}
    call = Call(BY_NAME["Linear"], "fc", [tensor("fixed<6,3>", (None, 3)), w, b], attrs, {1: codes, 2: bias})
    call = Call(call.op, "fc", call.x, {**attrs, "requantize": "fixed<4,-1,RND,SAT>"}, call.constants)
    graph = side_by_side("control", [call])
    if file == "weights.c" and old.startswith("\n"):
        shift = call.epilogue.shift[0]
        old, new = f"\n    {shift},\n}};", f"\n    {shift + 1},\n}};"
    fed = feeds(graph, 200)
    expected = run_reference(graph, fed)["c0_y"]
    with HostProgram(graph) as program:
        np.testing.assert_array_equal(program.run(fed)["c0_y"], expected)
    assert not np.array_equal(mutated(graph, fed, file, old, new, tmp_path, cc)["c0_y"], expected)
