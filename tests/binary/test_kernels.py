"""Sums of signs on every native backend, against a definition that shares nothing with the kernels."""

from __future__ import annotations

import numpy as np
import pytest

from edgemat import formats
from edgemat.op import Call
from edgemat.ops import BY_NAME
from edgemat.ops.cases import constant, tensor
from edgemat.targets import toolchain
from edgemat.targets.hls import Plan, Simulation, model_cost
from edgemat.targets.hls import project as hls_project
from edgemat.targets.mcu import emulator
from edgemat.targets.mcu.generator import project
from edgemat.targets.mcu.host import SANITIZE, STRICT, HostProgram
from edgemat.targets.mcu.sample import run_reference
from edgemat.targets.mcu.variants import STACK_WORDS, sign_rows
from tests.binary.cases import calls, exact, plain_sum, signs
from tests.hls.test_operators import Mutated
from tests.mcu.case_graphs import CaseGraph, feeds, side_by_side
from tests.mcu.test_kernels import mutated

MCU_FILES = {f"{stem}.c" for stem in ("conv", "conv__depthwise", "linear")} | {
    f"{stem}__{kind}.c" for stem in ("conv", "linear") for kind in ("bipolar", "subsets", "xnor")
}


def fed(graph: CaseGraph, samples: int) -> dict[str, np.ndarray]:
    """Codes of every input; of bipolar ones only -1 and +1."""
    found = feeds(graph, samples)
    return {name: graph.tensors[name].legal(codes) for name, codes in found.items()}


def small(count: int) -> list[Call]:
    """Cases that a C++ compiler takes in seconds."""
    return [call for call in calls(16) if call.constants[1].size < 300][:count]


def differing(graph: CaseGraph, cases: list[Call], codes: dict, found: dict) -> list[str]:
    """Cases whose codes differ from the plain sums, requantised by the dossier where they have an epilogue."""
    wrong = []
    for number, call in enumerate(cases):
        expected = plain_sum(call, codes[f"c{number}_x0"])
        if call.epilogue is not None:
            expected = formats.requantize(expected, call.exact[0].format, call.epilogue.format)
        if not np.array_equal(found[f"c{number}_y"], expected):
            wrong.append(call.name)
    return wrong


@pytest.mark.parametrize("requantized", [False, True])
def test_c_kernels_under_the_sanitizers(requantized) -> None:
    cases = calls() if requantized else [exact(call) for call in calls()]
    graph = side_by_side("signs", cases)
    assert {v.file for v in project(graph).variants} == MCU_FILES
    codes = fed(graph, 7)
    flags = (*STRICT, *(SANITIZE if toolchain.find_c().name == "gcc" else ()))
    with HostProgram(graph, flags=flags, optimize="0") as program:
        assert differing(graph, cases, codes, program.run(codes)) == []


@pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))
@pytest.mark.parametrize("machine", emulator.MACHINES)
def test_c_kernels_on_emulated_machines(machine) -> None:
    cases = calls()
    graph = side_by_side("signs", cases)
    codes = fed(graph, 3)
    assert differing(graph, cases, codes, emulator.run_emulated(graph, codes, machine)) == []


@pytest.mark.parametrize("defines", [{}, {"EDGEMAT_HARDWARE_TYPES": None}], ids=["native", "hardware types"])
@pytest.mark.parametrize("io", ["parallel", "stream"])
def test_hls_templates(io, defines) -> None:
    cases = small(8)
    graph = side_by_side("signs", cases)
    codes = fed(graph, 5)
    with Simulation(graph, Plan(io=io, reuse=3), optimize="0", defines=defines) as simulation:
        assert differing(graph, cases, codes, simulation.run(codes)) == []


def test_weights_take_a_bit_each() -> None:
    graph = side_by_side("signs", [linear(640, 128)])
    assert project(graph).weight_bytes == 640 * 128 // 8
    rows = np.array([[1, -1, 1, -1] * 8 + [-1]])
    assert sign_rows(rows).tolist() == [0xAAAAAAAA, 1]


def linear(inputs: int, outputs: int, x: str = "bipolar") -> Call:
    w, codes = constant("bipolar", signs(np.random.default_rng(3), (outputs, inputs)))
    return Call(BY_NAME["Linear"], "fc", [tensor(x, (None, inputs)), w], {"w_format": "bipolar"}, {1: codes})


def test_no_multiplication_is_counted() -> None:
    for x in ("bipolar", "fixed<8,3>"):
        call = linear(40, 3, x)
        assert call.op.cost(call).multiplies == 0
        assert call.op.cost(call).additions == 120
        assert model_cost(side_by_side("signs", [call]), Plan()).multipliers == 0
    byte, _ = constant("fixed<8,1>", call.constants[1])
    other = Call(call.op, "fc", [call.x[0], byte], {"w_format": "fixed<8,1>"}, call.constants)
    assert other.op.cost(other).multiplies == 120


def test_rows_beyond_the_stack_add_instead() -> None:
    for inputs, file in ((32 * STACK_WORDS, "linear__xnor.c"), (32 * STACK_WORDS + 1, "linear__bipolar.c")):
        call = linear(inputs, 2)
        graph = side_by_side("long", [call])
        assert {v.file for v in project(graph).variants} == {file}
        codes = fed(graph, 5)
        with HostProgram(graph, optimize="1") as program:
            assert differing(graph, [call], codes, program.run(codes)) == []


def test_control_one_flipped_bit_is_seen_by_every_case() -> None:
    cases = [exact(call) for call in calls(20)]
    flipped = []
    for call in cases:
        codes = call.constants[1].copy()
        codes.flat[codes.size // 2] *= -1
        flipped.append(Call(call.op, call.name, call.x, call.attrs, {**call.constants, 1: codes}))
    graph = side_by_side("signs", flipped)
    codes = fed(graph, 7)
    with HostProgram(graph, optimize="0") as program:
        found = program.run(codes)
    assert differing(graph, flipped, codes, found) == []
    seen = differing(graph, cases, codes, found)
    # A weight that meets only padding changes nothing; all others must show.
    assert set(seen) == {c.name for c, f in zip(cases, flipped, strict=True) if _reaches(c, f, graph, codes)}
    assert len(seen) > 15


def _reaches(call: Call, other: Call, graph: CaseGraph, codes: dict) -> bool:
    number = next(i for i, node in enumerate(graph.nodes) if node.constants[1] is other.constants[1])
    x = codes[f"c{number}_x0"]
    return not np.array_equal(plain_sum(call, x), plain_sum(other, x))


def test_control_padding_is_left_out_of_the_count(tmp_path) -> None:
    """A padded tap taken for +1, as XNOR without its mask would, changes the codes."""
    case = next(c for c in calls() if c.x[0].format.bipolar and c.op.name == "Conv" and any(c.attrs["pads"])
                and c.constants[1][0].size >= 16)  # fmt: skip
    graph = side_by_side("pad", [exact(case)])
    codes = fed(graph, 7)
    with HostProgram(graph, optimize="0") as program:
        assert differing(graph, [exact(case)], codes, program.run(codes)) == []
    file, old = "kernels/conv__xnor.c", "em_signs_differ_inside(signs, w, mask, words)"
    found = mutated(graph, codes, file, old, "em_signs_differ(signs, w, words)", tmp_path, toolchain.find_c())
    assert differing(graph, [exact(case)], codes, found) == [case.name]


def tie() -> tuple[CaseGraph, dict[str, np.ndarray], list[list[int]]]:
    """The sign of a sum of two signs: sums 0 (+1), -2, 2 and again 0."""
    w, codes = constant("bipolar", np.array([[1, -1]]))
    attrs = {"w_format": "bipolar", "requantize": "bipolar"}
    call = Call(BY_NAME["Linear"], "tie", [tensor("bipolar", (None, 2)), w], attrs, {1: codes})
    rows = np.array([[1, 1], [-1, 1], [1, -1], [-1, -1]])
    return side_by_side("tie", [call]), {"c0_x0": rows}, [[1], [-1], [1], [1]]


def test_a_sum_of_zero_gives_plus_one_in_c(tmp_path) -> None:
    graph, rows, expected = tie()
    assert run_reference(graph, rows)["c0_y"].tolist() == expected
    with HostProgram(graph, optimize="0") as program:
        assert program.run(rows)["c0_y"].tolist() == expected
    change = "kernels/edgemat_requantize.h", "return v < 0 ? -1 : 1;", "return v <= 0 ? -1 : 1;"
    assert mutated(graph, rows, *change, tmp_path, toolchain.find_c())["c0_y"].tolist() == [[-1], [-1], [1], [-1]]


HLS_CHANGES = {
    "threshold": ("edgemat/rounding.hpp", "return code < 0 ? Y(-1) : Y(1);", "return code <= 0 ? Y(-1) : Y(1);"),
    "weight": ("parameters.hpp", "{0, 1}", "{1, 1}"),
    "padding": ("parameters.hpp", "padded = true", "padded = false"),
}


@pytest.mark.parametrize("change", HLS_CHANGES)
def test_control_a_change_of_hls_is_seen(change, monkeypatch) -> None:
    graph, codes, expected = tie()
    name, wanted = "c0_y", np.array(expected)
    if change == "padding":
        w, weights = constant("bipolar", signs(np.random.default_rng(5), (1, 3, 2, 2)))
        attrs = {"w_format": "bipolar", "strides": (1, 1), "pads": (0, 0, 1, 1), "dilations": (1, 1)}
        case = Call(BY_NAME["Conv"], "c", [tensor("bipolar", (None, 3, 3, 3)), w], attrs, {1: weights})
        graph = side_by_side("pad", [case])
        codes = fed(graph, 7)
        wanted = plain_sum(case, codes["c0_x0"])
    made = hls_project(graph, Plan(io="parallel"))
    files = made.files()
    file, old, new = HLS_CHANGES[change]
    file = next(f for f in files if f.endswith(file))
    monkeypatch.setattr("edgemat.targets.hls.simulation.Project", (type(made), Mutated))
    for program, same in ((made, True), (Mutated(made, file, old, new), False)):
        with Simulation(program, optimize="0") as simulation:
            assert np.array_equal(simulation.run(codes)[name], wanted) == same
