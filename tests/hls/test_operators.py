"""Every operator template against the reference of its dossier, on all of the dossier's cases, in both io modes."""

from __future__ import annotations

import numpy as np
import pytest

from edgemat.formats import Fixed
from edgemat.op import Call, Tensor
from edgemat.ops import BY_NAME, OPS
from edgemat.ops.cases import tensor
from edgemat.targets.hls import Plan, Simulation, project
from edgemat.targets.hls.config import STEMS
from edgemat.targets.hls.simulation import SANITIZE, STRICT

from .graphs import graph_of, side_by_side

TEMPLATES = [op for op in OPS if op.stem in STEMS]
PER_PROGRAM = 60
SMALL_ARRAY = 300


def differing(found, expected, calls):
    return [call.name for i, call in enumerate(calls) if not np.array_equal(found[f"y{i}"], expected[f"y{i}"])]


def test_every_operator_has_a_template_or_needs_none():
    without = {op.stem for op in OPS} - set(STEMS)
    assert without == {"quantize", "dequantize", "constant", "reshape", "state", "next_state"}


@pytest.mark.parametrize("io", ["parallel", "stream"])
@pytest.mark.parametrize("op", TEMPLATES, ids=lambda op: op.stem)
def test_equals_the_reference(compiler, op, io):
    cases = op.cases()
    assert cases
    for start in range(0, len(cases), PER_PROGRAM):
        calls = cases[start : start + PER_PROGRAM]
        graph, codes, expected = side_by_side(calls)
        with Simulation(graph, Plan(io=io, reuse=3), compiler=compiler, optimize="0") as simulation:
            assert differing(simulation.run(codes), expected, calls) == []


def small_cases(count):
    """A few cases of every operator, without large constant arrays."""
    for op in TEMPLATES:
        small = [c for c in op.cases() if all(a.size <= SMALL_ARRAY for a in op.native(c).arrays.values())]
        yield from small[-count:]


@pytest.mark.parametrize("io", ["parallel", "stream"])
def test_hardware_types_give_the_same(compiler, io):
    calls = list(small_cases(2))
    graph, codes, expected = side_by_side(calls)
    defines = {"EDGEMAT_HARDWARE_TYPES": None}
    with Simulation(graph, Plan(io=io), compiler=compiler, optimize="0", defines=defines) as simulation:
        assert differing(simulation.run(codes), expected, calls) == []


@pytest.mark.parametrize("io", ["parallel", "stream"])
def test_warnings_and_sanitizers_stay_silent(compiler, io):
    if compiler.name == "zig":
        pytest.skip("zig ships no AddressSanitizer runtime; install g++ (make toolchains)")
    calls = list(small_cases(1))
    graph, codes, expected = side_by_side(calls)
    # The vendor's headers shift negative codes, which C++20 defines.
    options = {"compiler": compiler, "standard": "c++20", "optimize": "0"}
    with Simulation(graph, Plan(io=io), flags=(*STRICT, *SANITIZE), **options) as simulation:
        assert differing(simulation.run(codes), expected, calls) == []


def test_cpp14_without_warnings(compiler):
    graph, _, _ = side_by_side(list(small_cases(1)))
    for io in ("parallel", "stream"):
        Simulation(graph, Plan(io=io), compiler=compiler, flags=(*STRICT, "-pedantic"), optimize="0").close()


class Mutated:
    """A project with one text of one file replaced."""

    def __init__(self, made, file, old, new):
        self.made, self.change = made, (file, old, new)
        self.design, self.top, self.trace_channels = made.design, made.top, made.trace_channels

    def files(self, *, vectors=True):
        found = self.made.files(vectors=vectors)
        file, old, new = self.change
        assert old.encode() in found[file]
        found[file] = found[file].replace(old.encode(), new.encode(), 1)
        return found


def every_code():
    """One Requantize with a tie in every fourth code, fed every code there is."""
    call = Call(BY_NAME["Requantize"], "r", [tensor("fixed<8,4>", (None, 1))], {"requantize": "fixed<5,3,RND,SAT>"})
    codes = np.arange(-128, 128).reshape(-1, 1)
    return graph_of([call], call.x, ["y"]), {"x": codes}, {"y": call.op.reference(call, codes)}


def one_layer():
    linear = BY_NAME["Linear"]
    call = next(c for c in linear.cases() if c.name == "b3x7_fixed<8,3>_fixed<8,4>")
    graph, codes, expected = side_by_side([call])
    return graph, codes, expected


def staircase(levels):
    """Thresholds every four codes, by comparators or by search, fed every code there is."""
    rows = np.array([[-8 + 4 * i for i in range(levels)]])
    t = Tensor("t", rows.shape, Fixed.parse("fixed<64,64>"), -128, 127)
    attrs = {"y_format": "ufixed<8,8>", "start": 3, "step": 2}
    call = Call(BY_NAME["Thresholds"], "t", [tensor("fixed<8,8>", (None, 1)), t], attrs, {1: rows})
    codes = np.arange(-128, 128).reshape(-1, 1)
    return graph_of([call], [call.x[0]], ["y"]), {"x": codes}, {"y": call.op.reference(call, codes)}


SHIFTS = "shift_min = {};\n    static const int shift_max = {};"
MUTATIONS = {
    "rounding": (every_code, "rounding = edgemat::RND;", "rounding = edgemat::RND_CONV;"),
    "overflow": (every_code, "overflow = edgemat::SAT;", "overflow = edgemat::SAT_SYM;"),
    "shift": (every_code, SHIFTS.format(2, 2), SHIFTS.format(1, 1)),
    "weight": (one_layer, "{-", "{1-"),
    "threshold": (lambda: staircase(3), "    -4\n", "    -3\n"),
    "level": (lambda: staircase(9), "    20\n", "    19\n"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("io", ["parallel", "stream"])
def test_a_mutation_is_noticed(compiler, monkeypatch, mutation, io):
    make, old, new = MUTATIONS[mutation]
    graph, codes, expected = make()
    made = project(graph, Plan(io=io))
    monkeypatch.setattr("edgemat.targets.hls.simulation.Project", (type(made), Mutated))
    wrong = Mutated(made, "parameters.hpp", old, new)
    for program, same in ((made, True), (wrong, False)):
        with Simulation(program, compiler=compiler, optimize="0") as simulation:
            found = simulation.run(codes)
        assert all(np.array_equal(found[name], expected[name]) for name in expected) == same
