"""FIFO depths: computed, sufficient, and needed; one sample after the other or many back to back."""

from __future__ import annotations

import numpy as np
import pytest

from edgemat.targets.hls import DeadlockError, Plan, Simulation, project
from edgemat.targets.hls.depths import fifo_depths
from edgemat.targets.hls.vectors import run_reference
from edgemat.targets.layout import to_native

from .networks import branches, feed, residual

NETWORKS = {"residual": residual, "branches": branches}


def exact(found, expected):
    return all(np.array_equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("reuse", [1, 6])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_computed_depths_do_not_deadlock(compiler, make, reuse):
    graph = make()
    codes = feed(graph, 3)
    with Simulation(graph, Plan(io="stream", reuse=reuse), threads=True, compiler=compiler) as simulation:
        assert exact(simulation.run(codes), run_reference(to_native(graph), codes))


def test_the_depth_of_a_shortcut_is_that_of_the_rows_in_flight():
    made = project(residual(size=8), Plan(io="stream"))
    deep = {c.name: c.depth for c in made.design.channels if c.depth > 2}
    assert list(deep.values()) == [fork_depth(made)]


def fork_depth(made):
    """The shortcut's depth, by running the two convolutions' demand by hand."""
    first, second = (p.pattern for p in made.design.processes if p.label in ("first", "second"))
    needed_of = []
    for pattern in (second, first):
        reads, table = 0, []
        for event in pattern.events():
            if event < 0:
                table.append(reads)
            else:
                reads += 1
        needed_of.append(table)
    demand = [needed_of[1][needed_of[0][k] - 1] for k in range(len(needed_of[0]))]
    return max(count - k for k, count in enumerate(demand))


def test_half_the_depth_deadlocks_and_names_process_and_fifo(compiler):
    graph = residual()
    codes = feed(graph, 3)
    made = project(graph, Plan(io="stream"))
    channel = max(made.design.channels, key=lambda c: c.depth)
    computed = channel.depth
    for depth, deadlocks in ((computed // 2, True), (computed - 1, True), (computed, False)):
        channel.depth = depth
        changed = type(made)(made.design)
        with Simulation(changed, threads=True, compiler=compiler) as simulation:
            if not deadlocks:
                assert exact(simulation.run(codes), run_reference(to_native(graph), codes))
                continue
            with pytest.raises(DeadlockError) as error:
                simulation.run(codes)
            message = str(error.value)
            assert f"waits to write the full FIFO {channel.name} (depth {depth})" in message
            assert "process first waits" in message


@pytest.mark.parametrize("io", ["parallel", "stream"])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_back_to_back_equals_one_by_one(compiler, make, io):
    graph = make()
    codes = feed(graph, 1000)
    expected = run_reference(to_native(graph), codes)
    with Simulation(graph, Plan(io=io), compiler=compiler, trace=True) as simulation:
        found = simulation.run(codes)
        assert exact(found, expected)
        assert set(found) == set(graph.tensors) - set(graph.inputs)
        for i in (0, 1, 999):
            one = simulation.run({name: array[i : i + 1] for name, array in codes.items()})
            assert all(np.array_equal(one[name][0], expected[name][i]) for name in one)


@pytest.mark.parametrize("ports", ["axis", "axis_last", "memory"])
def test_ports_of_streams(compiler, ports):
    graph = residual(size=4)
    codes = feed(graph, 4)
    with Simulation(graph, Plan(io="stream", ports=ports), compiler=compiler, optimize="0") as simulation:
        assert exact(simulation.run(codes), run_reference(to_native(graph), codes))


def test_depths_are_at_least_two_everywhere():
    made = project(branches(), Plan(io="stream"))
    depths = fifo_depths(made.design.processes)
    assert set(depths) == {c.name for c in made.design.channels}
    assert min(depths.values()) == 2 and max(depths.values()) > 2


def test_lanes_fold_and_stay_exact(compiler):
    graph = residual(size=4, channels=6)
    from edgemat.targets.hls import NodePlan

    nodes = {"first": NodePlan(pe=2, simd=3, lanes=2), "second": NodePlan(pe=3, simd=6, lanes=3)}
    made = project(graph, Plan(io="stream", nodes=nodes))
    assert {c.lanes for c in made.design.channels} >= {2, 3}
    codes = feed(graph, 3)
    with Simulation(made, threads=True, compiler=compiler, optimize="0") as simulation:
        assert exact(simulation.run(codes), run_reference(to_native(graph), codes))
