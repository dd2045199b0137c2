"""Packed ternary kernels: on the host under the sanitizers, on emulated machines, and what they hold and ask for.

Expected codes come from plain loops over outputs and taps, which share nothing with the kernels.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from edgemat import formats
from edgemat.errors import UnsupportedOpError
from edgemat.op import Call
from edgemat.ops import BY_NAME
from edgemat.ops.cases import constant, tensor
from edgemat.report.targets import target_cost
from edgemat.targets import toolchain
from edgemat.targets.layout import to_native
from edgemat.targets.mcu import emulator
from edgemat.targets.mcu.generator import project
from edgemat.targets.mcu.host import SANITIZE, STRICT, HostProgram
from edgemat.targets.mcu.sample import run_reference
from edgemat.targets.mcu.ternary import choose_trits, packed_rows
from tests.binary.cases import plain_sum
from tests.mcu.case_graphs import CaseGraph, feeds, side_by_side
from tests.mcu.test_kernels import mutated

TERNARY = "fixed<2,0,RND,SAT_SYM>"
INPUTS = ("fixed<8,3>", "ufixed<8,8>", "fixed<8,3>", "fixed<16,3>", "fixed<8,3>")
RESULTS = ("", "fixed<8,8,RND,SAT>")
PACKINGS = ("2", "1.6")
needs_emulator = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))


def weights(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """-1, 0 and +1 at random; of some seeds all alike, which drives the sums to their rails."""
    rng = np.random.default_rng(seed)
    if seed % 7 == 3:
        return np.full(shape, (-1, 1)[seed % 2], np.int64)
    return rng.integers(-1, 2, shape)


def linear(seed: int, inputs: int, outputs: int, x_format: str = "", rows: int = 0) -> Call:
    """A fully connected layer; with ``rows`` over that many rows of inputs."""
    x = tensor(x_format or INPUTS[seed % len(INPUTS)], (None, rows, inputs) if rows else (None, inputs))
    w, codes = constant(TERNARY, weights(seed, (outputs, inputs)))
    attrs = {"w_format": TERNARY, "requantize": RESULTS[seed % len(RESULTS)]}
    if seed % 3:
        return Call(BY_NAME["Linear"], f"fc{seed}", [x, w], attrs, {1: codes})
    b, bias = constant("fixed<16,8>", np.random.default_rng(seed).integers(-300, 300, outputs), "b")
    return Call(BY_NAME["Linear"], f"fc{seed}", [x, w, b], attrs, {1: codes, 2: bias})


def convolution(seed: int) -> Call:
    """A convolution of odd geometry: strides, dilations, one-sided padding, groups, 1-D, pointwise and depthwise."""
    rng = np.random.default_rng(seed + 1000)
    axes = 1 if seed % 6 == 5 else 2
    depthwise = seed % 8 == 4
    groups = int(rng.choice([1, 1, 2, 3]))
    in_c = int(rng.integers(3, 9)) if depthwise else groups * int(rng.integers(1, 24))
    groups = in_c if depthwise else groups
    out_c = in_c if depthwise else groups * int(rng.integers(4, 14))
    pointwise = seed % 5 == 2
    kernel = (1,) * axes if pointwise else tuple(map(int, rng.integers(1, 4, axes)))
    dilations = tuple(map(int, rng.integers(1, 3, axes)))
    size = [(k - 1) * d + 1 + int(rng.integers(0, 4)) for k, d in zip(kernel, dilations, strict=True)]
    pads = tuple(map(int, rng.integers(0, 3, 2 * axes))) if seed % 3 else (0,) * 2 * axes
    w, codes = constant(TERNARY, weights(seed, (out_c, in_c // groups, *kernel)))
    attrs = {
        "w_format": TERNARY, "strides": tuple(map(int, rng.integers(1, 3, axes))), "pads": pads,
        "dilations": dilations, "groups": groups, "requantize": RESULTS[int(rng.integers(len(RESULTS)))],
    }  # fmt: skip
    x = tensor(INPUTS[seed % len(INPUTS)], (None, in_c, *size))
    if seed % 2:
        return Call(BY_NAME["Conv"], f"conv{seed}", [x, w], attrs, {1: codes})
    b, bias = constant("fixed<16,8>", rng.integers(-300, 300, out_c), "b")
    return Call(BY_NAME["Conv"], f"conv{seed}", [x, w, b], attrs, {1: codes, 2: bias})


def calls(convolutions: int = 16) -> list[Call]:
    """Rows around the ends of bytes and passes, outputs around the turns of eight, rows of inputs one and two."""
    lengths = (1, 15, 16, 17, 20, 21, 31, 32, 33, 39, 40, 41, 60, 65, 75, 79, 81, 161)
    made = [linear(seed, n, 4 + seed % 15) for seed, n in enumerate(lengths)]
    made += [linear(50 + i, 37 + i, 5 + i, x, rows) for i, x in enumerate(INPUTS[:4]) for rows in (1, 2, 3)]
    # Sums beyond 16 bits in one lane, and, of 300 inputs of -128 to 127 with weights alike, rails of two.
    made += [linear(3, 300, 4, "fixed<8,3>", 2), linear(4, 300, 4, "fixed<8,3>", 2), linear(3, 255, 4, "fixed<8,3>", 3)]
    made += [linear(8, 40, 9, "fixed<32,3>"), linear(10, 130, 9, "ufixed<8,8>")]
    # One position, and maps whose windows sum up beyond 16 bits: one lane with entries of 16 bits.
    made += [window(5, 20, 3, 0), window(3, 40, 4, 1), window(10, 40, 5, 1)]
    return made + [convolution(seed) for seed in range(convolutions)]


def extremes() -> list[Call]:
    """Rows of one input to 641, one output, weights all 0, all +1 and all -1, biases at the rails, 4-bit inputs."""
    rails = np.array([(1 << 31) - 1, -(1 << 31), 0, 5])
    made = []
    for i, (inputs, outputs, kind) in enumerate(
        [(1, 1, 1), (4, 1, -1), (5, 4, 0), (6, 4, 1), (639, 1, -1), (641, 1, 1), (639, 4, 0), (641, 4, -1), (641, 4, 1)]
    ):
        x = tensor(("fixed<8,3>", "fixed<4,2>")[i % 2], (None, inputs))
        w, codes = constant(TERNARY, np.full((outputs, inputs), kind))
        attrs = {"w_format": TERNARY, "requantize": RESULTS[i // 2 % 2]}
        b, bias = constant("fixed<32,8>", np.resize(rails, outputs), "b")
        made.append(Call(BY_NAME["Linear"], f"extreme{i}", [x, w, b], attrs, {1: codes, 2: bias}))
    return made


def scaled_rows(outputs: int = 9, requantize: str = "fixed<8,9,RND,SAT>", bias: bool = True) -> Call:
    """Three rows of 40 inputs, a scale for each output: points lie on the last axis, behind the sums."""
    w_format = f"fixed<2,[{','.join(str(2 - 3 * o % 7) for o in range(outputs))}],RND,SAT_SYM>"
    x = tensor("fixed<8,3>", (None, 3, 40))
    w, codes = constant(w_format, weights(11, (outputs, 40)))
    attrs = {"w_format": w_format, "requantize": requantize}
    if not bias:
        return Call(BY_NAME["Linear"], "scaled", [x, w], attrs, {1: codes})
    b, added = constant("fixed<16,8>", np.random.default_rng(3).integers(-300, 300, outputs), "b")
    return Call(BY_NAME["Linear"], "scaled", [x, w, b], attrs, {1: codes, 2: added})


def window(seed: int, channels: int, size: int, pad: int) -> Call:
    """A 3 x 3 convolution of 8-bit inputs to six channels."""
    x = tensor("fixed<8,3>", (None, channels, size, size))
    w, codes = constant(TERNARY, weights(seed, (6, channels, 3, 3)))
    attrs = {
        "w_format": TERNARY, "strides": (1, 1), "pads": (pad,) * 4, "dilations": (1, 1),
        "requantize": RESULTS[seed % len(RESULTS)],
    }  # fmt: skip
    return Call(BY_NAME["Conv"], f"window{seed}", [x, w], attrs, {1: codes})


def differing(graph: CaseGraph, cases: list[Call], codes: dict, found: dict) -> list[str]:
    """Cases whose codes differ from the plain sums, requantised by the dossier where they have an epilogue."""
    wrong = []
    for number, call in enumerate(cases):
        x = codes[f"c{number}_x0"]
        expected = rows_sum(call, x)
        if call.epilogue is not None:
            expected = formats.requantize(expected, call.exact[0].format, call.epilogue.format)
        if not np.array_equal(found[f"c{number}_y"], expected):
            wrong.append(call.name)
    return wrong


def rows_sum(call: Call, x: np.ndarray) -> np.ndarray:
    """`plain_sum`, also of layers over rows and of 1-D convolutions."""
    if call.op.name == "Linear":
        w, b = call.constants[1], call.constants.get(2)
        sums = np.zeros((*x.shape[:-1], len(w)), np.int64)
        for i in range(w.shape[1]):
            sums += np.where(w[:, i] > 0, x[..., i, None], np.where(w[:, i] < 0, -x[..., i, None], 0))
        return sums if b is None else sums + b
    if x.ndim == 4:
        return plain_sum(call, x)
    attrs = {**call.attrs, **{key: (1, *call.attrs[key]) for key in ("strides", "dilations")}}
    attrs["pads"] = (0, call.attrs["pads"][0], 0, call.attrs["pads"][1])
    w = dataclasses.replace(call.x[1], shape=(*call.x[1].shape[:2], 1, call.x[1].shape[2]))
    wide = dataclasses.replace(call.x[0], shape=(*call.x[0].shape[:2], 1, call.x[0].shape[2]))
    constants = {**call.constants, 1: call.constants[1][:, :, None]}
    return plain_sum(Call(call.op, call.name, [wide, w, *call.x[2:]], attrs, constants), x[:, :, None])[:, :, 0]


def variants(graph: CaseGraph, packing: str) -> set[tuple[str, str, str, str]]:
    """(file, trits, lanes, bits of an entry) of the packed kernels."""
    found = [(v.file, dict(v.macros)) for v in project(graph, ternary_packing=packing).variants]
    keys = ("EM_TRITS", "EM_LANES", "EM_ENTRY_BITS")
    return {(file, *(macros[key] for key in keys)) for file, macros in found if file.endswith("__trits.c")}


@pytest.mark.parametrize("packing", PACKINGS)
def test_equal_under_the_sanitizers(packing) -> None:
    cases = calls() + extremes()
    graph = side_by_side("trits", cases)
    trits = "4" if packing == "2" else "5"
    kinds = {("1", "16"), ("2", "32"), ("1", "32")}
    assert variants(graph, packing) >= {
        (f"{stem}__trits.c", trits, *kind) for stem in ("linear", "conv") for kind in kinds
    }
    assert ("linear__trits.c", trits, "1", "64") in variants(graph, packing)
    codes = feeds(graph, 7)
    flags = (*STRICT, *(SANITIZE if toolchain.find_c().name == "gcc" else ()))
    with HostProgram(project(graph, ternary_packing=packing), flags=flags, optimize="0") as program:
        assert differing(graph, cases, codes, program.run(codes)) == []


@needs_emulator
@pytest.mark.parametrize("machine", emulator.MACHINES)
@pytest.mark.parametrize("packing", PACKINGS)
def test_equal_on_emulated_machines(machine, packing) -> None:
    cases = calls()
    graph = side_by_side("trits", cases)
    codes = feeds(graph, 4)
    found = emulator.run_emulated(project(graph, ternary_packing=packing), codes, machine)
    assert differing(graph, cases, codes, found) == []


@pytest.mark.parametrize("packing", PACKINGS)
def test_control_one_flipped_trit_is_seen_by_every_case(packing) -> None:
    cases = [linear(1, n, 9, "fixed<8,3>") for n in (16, 40, 81)] + [convolution(s) for s in (1, 7, 13)]
    cases = [Call(c.op, c.name, c.x, {**c.attrs, "requantize": "", "pads": (0,) * 4} if "pads" in c.attrs
                  else {**c.attrs, "requantize": ""}, c.constants) for c in cases]  # fmt: skip
    flipped = []
    for call in cases:
        codes = call.constants[1].copy()
        codes.flat[codes.size // 2] = (codes.flat[codes.size // 2] + 2) % 3 - 1
        flipped.append(Call(call.op, call.name, call.x, call.attrs, {**call.constants, 1: codes}))
    graph = side_by_side("trits", flipped)
    codes = feeds(graph, 7)
    with HostProgram(project(graph, ternary_packing=packing), optimize="1") as program:
        found = program.run(codes)
    assert differing(graph, flipped, codes, found) == []
    assert differing(graph, cases, codes, found) == [call.name for call in cases]


@pytest.mark.parametrize("change", ["weight", "offset", "lane"])
def test_control_a_change_of_the_files_is_seen(change, tmp_path) -> None:
    call = linear(1, 40, 8, "fixed<8,3>", 2 if change == "lane" else 0)
    call = Call(call.op, call.name, call.x, {**call.attrs, "requantize": ""}, call.constants)
    graph = side_by_side("one", [call])
    codes = feeds(graph, 9)
    first = packed_rows(call.constants[1], 1, 4)[:2].tolist()
    file, old, new = {
        "weight": ("weights.c", f"{first[0]}, {first[1]},", f"{first[0]}, {(first[1] + 1) % 84},"),
        "offset": ("kernels/edgemat_trits.h", "start -= (EM_TOTAL)EM_OFFSET", "start -= (EM_TOTAL)EM_OFFSET - 1"),
        "lane": ("kernels/edgemat_trits.h", "sums[i] - (uint32_t)low", "sums[i]"),
    }[change]
    with HostProgram(graph) as program:
        assert differing(graph, [call], codes, program.run(codes)) == []
    found = mutated(graph, codes, file, old, new, tmp_path, toolchain.find_c())
    assert differing(graph, [call], codes, found) == [call.name]


def preprocessed(cases: list[Call], thumb: bool, folder, packing: str = "1.6") -> str:
    """kernels.c of a library behind the preprocessor."""
    made = project(side_by_side("trits", cases), ternary_packing=packing)
    for name, text in made.files(example=False).items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text, encoding="utf-8")
    command = list(toolchain.find_c().command)
    if thumb:
        command = [*(toolchain.zig_command() or pytest.skip("ziglang is missing")), "cc"]
        command += ["-target", "thumb-freestanding-eabi", "-mcpu=cortex_m4"]
    done = toolchain.finish([*command, "-E", "-P", f"-I{folder}", str(folder / "kernels.c")], timeout_s=120.0)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def bodies(text: str, name: str) -> list[str]:
    """The bodies of the functions whose names match."""
    found = []
    for start in re.finditer(name + r"\([^;{}]*\)\s*\{", text):
        depth, at = 1, start.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        found.append(text[start.end() : at - 1])
    return found


def products(body: str) -> list[tuple[str, str]]:
    """The factors around each multiplication sign of C code."""
    return re.findall(r"([\w\])]+)\s*\*=?\s*([\w(]+)", re.sub(r'"[^"]*"|(?:\w+_t|void)\s*\*', "", body))


WEIGHT_PRODUCT = r"\bw(?:eight)?\[[^]]*\]\s*\)*\s*\*|\*\s*\(*(?:\w+\)\s*)?\(*w(?:eight)?\["


@pytest.mark.parametrize("thumb", [False, True], ids=["host", "thumb"])
def test_no_weight_is_multiplied(thumb, tmp_path) -> None:
    """Behind the preprocessor no kernel multiplies a weight; those that see packed ones multiply only counts by 5."""
    cases = [linear(0, 40, 8), linear(2, 40, 8, "fixed<8,3>", 2), convolution(1), convolution(4), linear(1, 5, 3)]
    text = preprocessed(cases, thumb, tmp_path / "ternary")
    packed = bodies(text, r"__trits_(?:fill|blocks|add\d|sums|results)") + bodies(text, r"em_thumb_\w+")
    assert len(packed) >= 15
    counts = {("pass", "5"), ("whole", "5"), ("28", "(5"), ("28", "(")}
    for body in packed:
        assert set(products(body)) <= counts, products(body)
        assert not re.search(r"\b(mul|mla|smul\w+|smla\w+)\b", body)
    # Controls: one product put into a kernel.
    one = next(body for body in packed if "t0[w[(0)]]" in body)
    for product in ("t0[w[(0)]] * x[0]", "t0[w[(0)]]*3", "w[(0)] * t0[0]"):
        changed = one.replace("t0[w[(0)]]", product, 1)
        assert not set(products(changed)) <= counts or re.search(WEIGHT_PRODUCT, changed)
    assert not re.search(WEIGHT_PRODUCT, text)
    w, codes = constant("fixed<8,1>", cases[0].constants[1])
    attrs = {**cases[0].attrs, "w_format": "fixed<8,1>"}
    control = Call(cases[0].op, "fc", [cases[0].x[0], w, *cases[0].x[2:]], attrs, {**cases[0].constants, 1: codes})
    assert re.search(WEIGHT_PRODUCT, preprocessed([control], thumb, tmp_path / "int8", "auto"))


@pytest.mark.parametrize(("packing", "byte"), [("2", 4), ("1.6", 5)])
def test_flash_and_arena(packing, byte) -> None:
    call = linear(1, 640, 128, "fixed<8,3>")
    graph = side_by_side("fc", [Call(call.op, "fc", call.x, {**call.attrs, "requantize": ""}, call.constants)])
    made = project(graph, ternary_packing=packing)
    assert made.weight_bytes == 640 // byte * 128
    (step,) = (s for s in to_native(graph).steps if s.params.get("ternary"))
    choice = choose_trits(dataclasses.replace(step, params={**step.params, "trits": byte}))
    assert choice is not None
    assert made.arena_bytes == made.arena_lower_bound_bytes == -(-choice.scratch_bytes // 8) * 8
    assert choice.scratch_bytes == 8 * {4: 84, 5: 252}[byte] * 2 + 128 * 4


def test_inspect_reports_packed_bytes() -> None:
    call = linear(1, 640, 128, "fixed<8,3>")
    cost = target_cost(side_by_side("fc", [call]), "mcu")
    assert cost.totals["multiplies"] == 0
    assert cost.rows[0][1].endswith("__trits") and 640 * 128 // 5 <= cost.rows[0][3] < 640 * 128 // 5 + 8


def test_bytes_name_entries_once() -> None:
    """Every pattern of weights has a byte of its own inside its table, in the order that the header states."""
    for trits in (4, 5):
        blocks = 3 ** (trits - 3)
        patterns = np.stack(np.meshgrid(*[[-1, 0, 1]] * trits, indexing="ij"), -1).reshape(-1, trits)
        found = packed_rows(patterns, 1, trits)
        c = (patterns[:, :3] + 1) @ [1, 3, 9]
        b = (patterns[:, 3:] + 1) @ [1, 3][: trits - 3]
        assert found.tolist() == np.where(c < 14, 14 * b + c, 14 * (blocks + b) + c - 14).tolist()
        assert len(set(found.tolist())) == 3**trits and found.max() < 28 * blocks


def test_short_rows_and_few_outputs_add_by_a_byte_each() -> None:
    cases = [linear(1, 15, 8), linear(1, 40, 3), convolution(4), convolution(12)]
    graph = side_by_side("small", cases)
    found = {v.file: dict(v.macros) for v in project(graph).variants}
    assert set(found) <= {"linear.c", "conv.c", "conv__depthwise.c"} and "conv__depthwise.c" in found
    assert all(macros["EM_SIGNED"] == "2" for macros in found.values())
    codes = feeds(graph, 6)
    expected = run_reference(graph, codes)
    with HostProgram(graph, flags=STRICT, optimize="1") as program:
        found_codes = program.run(codes)
    assert all(np.array_equal(found_codes[name], expected[name]) for name in graph.outputs)


@pytest.mark.parametrize("requantize", ["fixed<8,9,RND,SAT>", ""], ids=["requantized", "exact"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_with_a_scale_for_each_output_stay_packed(packing, requantize) -> None:
    calls = [scaled_rows(9, requantize), scaled_rows(3, requantize, bias=False)]
    graph = side_by_side("rows", calls)
    codes = feeds(graph, 5)
    expected = run_reference(graph, codes)
    made = project(graph, ternary_packing=packing)
    assert {v.file for v in made.variants} == {"linear__trits.c", "linear.c", "transpose.c"}
    assert [call.op.cost(call).multiplies for call in calls] == [0, 0]
    with HostProgram(made, flags=STRICT, optimize="1") as program:
        found = program.run(codes)
    assert all(np.array_equal(found[name], expected[name]) for name in graph.outputs)
    step = next(step for step in to_native(graph).steps if step.stem == "linear")
    assert step.params["ternary"] == 1 and len(set(step.epilogue.shift)) == 7
    # The control: the point of one channel off by one is another result.
    call = calls[0]
    wrong = Call(call.op, "wrong", call.x, {**call.attrs, "w_format": call.attrs["w_format"].replace("[2,", "[1,")},
                 call.constants)  # fmt: skip
    assert not np.array_equal(run_reference(side_by_side("rows", [wrong]), codes)["c0_y"], expected["c0_y"])


def test_an_unknown_packing_is_refused() -> None:
    graph = side_by_side("fc", [linear(1, 40, 8)])
    with pytest.raises(UnsupportedOpError, match=r"ternary_packing is '3', expected one of auto, 2, 1.6"):
        project(graph, ternary_packing="3")
    layer = linear(1, 40, 8)
    wide = {**layer.attrs, "w_format": TERNARY.replace("fixed<2", "fixed<3")}
    other = side_by_side("fc", [Call(layer.op, "fc", layer.x, wide, layer.constants)])
    with pytest.raises(UnsupportedOpError, match=r"ternary_packing is '1.6', and no layer of 'fc' has ternary weights"):
        project(other, ternary_packing="1.6")
    project(other)
