"""Channels of their own width in the HLS project: what the synthesiser is told, both interfaces, and controls."""

from __future__ import annotations

import numpy as np
import pytest

from edgemat.formats import Fixed
from edgemat.op import Call
from edgemat.ops import BY_NAME
from edgemat.ops.cases import constant, random_codes, tensor
from edgemat.targets.hls import Plan, Simulation, project
from edgemat.targets.hls.vectors import run_reference
from edgemat.targets.layout import to_native

from .graphs import graph_of
from .test_operators import Mutated

NARROW = "fixed<[6,3,0,8,1],[1,2,9,-1,3],RND,SAT>"
RESULT = "ufixed<[4,0,6,2],[3,1,3,2],RND,SAT>"


def layers():
    """A dense layer by channel and one that reads it: one pipeline in parallel io."""
    linear = BY_NAME["Linear"]
    w, b = constant("fixed<6,1>", random_codes("fixed<6,1>", (4, 5), 1)), constant("fixed<16,8>", np.arange(-2, 2), "b")
    x = tensor(NARROW, (None, 5))
    first = Call(
        linear, "fc1", [x, w[0], b[0]], {"w_format": "fixed<6,1>", "requantize": RESULT}, {1: w[1], 2: b[1]}, ("h",)
    )
    w = constant("fixed<6,1>", random_codes("fixed<6,1>", (3, 4), 2))
    last = Call(
        linear, "fc2", [first.y[0], w[0]], {"w_format": "fixed<6,1>", "requantize": "bipolar"}, {1: w[1]}, ("y",)
    )
    graph = graph_of([first, last], [x], ["h", "y"])
    codes = x.legal(np.random.default_rng(0).integers(x.lo, x.hi, (400, 5), np.int64, endpoint=True))
    return graph, {"x": codes}, run_reference(to_native(graph), {"x": codes})


@pytest.mark.parametrize("defines", [{}, {"EDGEMAT_HARDWARE_TYPES": None}], ids=["native", "hardware"])
@pytest.mark.parametrize("io", ["parallel", "stream"])
def test_both_interfaces_and_types(compiler, io, defines):
    graph, codes, expected = layers()
    with Simulation(graph, Plan(io=io), compiler=compiler, optimize="0", defines=defines) as simulation:
        found = simulation.run(codes)
    assert all(np.array_equal(found[name], expected[name]) for name in ("h", "y"))


def test_what_the_synthesiser_is_told():
    """Bits of each channel behind every result, and in one pipeline behind the input as well; signs take two bits."""
    graph, _, _ = layers()
    made = project(graph, Plan(io="parallel"))
    files = made.files(vectors=False)
    text, top = files["parameters.hpp"].decode(), files[f"{made.top}.cpp"].decode()
    assert "fc1_bits[4] = {\n    4, 0, 6, 2\n}" in text and "x_narrow_bits[5] = {\n    6, 3, 0, 8, 1\n}" in text
    assert top.count("edgemat::requantize<parameters::x_narrow_config>") == 1 and "ap_int<2> y[3]" in top
    assert text.count("narrowed = true") == 2 and text.count("narrowed = false") == 1
    streamed = project(graph, Plan(io="stream")).files(vectors=False)
    assert b"narrow_config" not in streamed[f"{made.top}.cpp"]
    # Weights of the input channel that is always 0 are gone; the others lie on the grid of the finest one.
    stored, codes = to_native(graph).steps[0].arrays["weight"], graph.nodes[0].constants[1]
    shifts = [Fixed.parse(NARROW).finest - frac for frac in Fixed.parse(NARROW).fracs]
    assert not stored[:, 2].any() and shifts[3] == 0 and shifts[0] == 4
    assert all(np.array_equal(stored[:, i], codes[:, i] << shifts[i]) for i in (0, 1, 3, 4))


MUTATIONS = {
    "a bit fewer": ("    4, 0, 6, 2", "    3, 0, 6, 2"),
    "a pruned channel": ("    4, 0, 6, 2", "    4, 1, 6, 2"),
    "rails of the element": (
        "narrowed = true;\n    static const int product",
        "narrowed = false;\n    static const int product",
    ),
    "no sign": ("overflow = edgemat::SIGN", "overflow = edgemat::SAT"),
    "input bits": ("    6, 3, 0, 8, 1", "    6, 3, 0, 7, 1"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_control_a_mutation_is_noticed(compiler, monkeypatch, mutation):
    graph, codes, expected = layers()
    made = project(graph, Plan(io="parallel"))
    monkeypatch.setattr("edgemat.targets.hls.simulation.Project", (type(made), Mutated))
    with Simulation(
        Mutated(made, "parameters.hpp", *MUTATIONS[mutation]), compiler=compiler, optimize="0"
    ) as simulation:
        found = simulation.run(codes)
    assert not all(np.array_equal(found[name], expected[name]) for name in ("h", "y"))
