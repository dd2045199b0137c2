"""The arena: nothing alive overlaps, nothing alive is overwritten, and the size meets its lower bound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemat.ops.cases import tensor
from edgemat.targets.layout import to_native
from edgemat.targets.mcu.arena import Buffer, place, plan_arena, tensor_bytes
from edgemat.targets.mcu.host import HostProgram
from edgemat.targets.mcu.sample import run_reference
from tests.mcu import networks
from tests.mcu.case_graphs import feeds
from tests.mcu.networks import Network

buffers = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 12), st.integers(0, 6)).map(
        lambda t: Buffer(t[0] * 8, t[1], t[1] + t[2])
    ),
    min_size=1,
    max_size=14,
)


def lower_bound(live: list[Buffer]) -> int:
    return max(sum(b.size_bytes for b in live if b.first <= step <= b.last) for step in range(30))


@given(buffers)
@settings(max_examples=150)
def test_no_two_living_buffers_overlap(live) -> None:
    size = place(live, lower_bound(live))
    assert lower_bound(live) <= size <= sum(b.size_bytes for b in live)
    for i, a in enumerate(live):
        assert a.offset % 8 == 0 and a.offset + a.size_bytes <= size
        for b in live[:i]:
            together = a.first <= b.last and b.first <= a.last
            apart = a.offset + a.size_bytes <= b.offset or b.offset + b.size_bytes <= a.offset
            assert apart or not together


@pytest.mark.parametrize("name", networks.ALL)
def test_arena_meets_the_lower_bound(name) -> None:
    arena = plan_arena(to_native(networks.ALL[name]()))
    assert arena.size_bytes == arena.lower_bound_bytes


def test_elementwise_results_take_their_operands_memory() -> None:
    network = to_native(networks.branching())
    arena = plan_arena(network)
    relu = next(step for step in network.steps if step.name == "relu")
    assert arena.places[relu.inputs[0].name] == arena.places[relu.outputs[0].name]
    # a result of one byte may take the memory of a wider operand, but not where it is an output array
    narrow = next(step for step in network.steps if step.name == "narrow")
    assert tensor_bytes(narrow.inputs[0]) > tensor_bytes(narrow.outputs[0])


def test_an_operand_that_is_read_again_is_kept() -> None:
    net = Network("twice")
    x = net.add_input(tensor("fixed<8,3>", (None, 2, 3, 3), "x"))
    a = net.conv("a", x, 4, y="fixed<6,3>")
    r = net.plain("Relu", "relu", a)
    net.output(net.join("sum", a, r))
    arena = plan_arena(to_native(net))
    assert arena.places["a_y"] != arena.places["relu_y"]


def test_an_input_is_never_written() -> None:
    net = Network("input")
    x = net.add_input(tensor("fixed<8,3>", (None, 2, 3, 3), "x"))
    r = net.plain("Relu", "relu", x)
    net.output(net.plain("Relu", "again", net.plain("Clip", "clip", r, low=0, high=50)))
    arena = plan_arena(to_native(net))
    assert arena.places["x"].kind == "input"
    assert [arena.places[f"{n}_y"].kind for n in ("relu", "clip", "again")] == ["output"] * 3
    assert arena.size_bytes == 0


def test_outputs_that_share_memory_are_copied(cc) -> None:
    net = Network("shared")
    x = net.add_input(tensor("fixed<8,3>", (None, 6), "x"))
    y = net.linear("fc", x, 4, y="")
    net.output(y)
    net.output(net.reshape("view", y, (2, 2)))
    net.output(net.reshape("passed", x, (6, 1)))
    wide = net.linear("wide", x, 5, y="")
    net.output(net.plain("Requantize", "narrow", wide, requantize="fixed<4,2>"))
    arena = plan_arena(to_native(net))
    assert len(arena.copies) >= 2
    codes = feeds(net, 9)
    expected = run_reference(net, codes)
    with HostProgram(net) as program:
        found = program.run(codes)
    for name in net.outputs:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
