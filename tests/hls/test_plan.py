"""Plans: validation, hints, TOML, and the folding they lead to."""

from __future__ import annotations

import pytest

from edgemat.targets.hls import NodePlan, Plan, PlanError, load_plan, plan_from, project
from edgemat.targets.hls.plan import divisors, folding, make_plan

from .networks import residual


def write(folder, text):
    path = folder / "plan.toml"
    path.write_text(text)
    return path


def test_toml_with_nodes_and_overrides(tmp_path):
    path = write(tmp_path, 'io = "stream"\nreuse = 4\nclock_ns = 4\n[node.first]\npe = 1\nsimd = 9\n')
    plan = load_plan(path, part="xc7z020clg400-1")
    assert plan == Plan("stream", 4, 4, "xc7z020clg400-1", nodes={"first": NodePlan(pe=1, simd=9)})
    assert plan_from(plan=path, io="parallel").io == "parallel"
    assert plan.node("first") == NodePlan(4, 1, 9) and plan.node("other") == NodePlan(4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("reus = 4", "did you mean 'reuse'"),
        ("io = 'streams'", "did you mean 'stream'"),
        ("reuse = 0", "reuse is 0, expected an integer of at least 1"),
        ("reuse = true", "reuse is True"),
        ("clock_ns = 'fast'", "clock_ns is 'fast'"),
        ("clock_ns = -1", "clock_ns is -1"),
        ("part = 'a}; exec rm'", "expected a device name"),
        ("ports = 'registers'\nio = 'stream'", "expected one of axis, axis_last, memory"),
        ("[node.first]\npes = 2", "did you mean 'pe'"),
        ("[node.first]\npe = 0", "node 'first' of the plan: pe is 0"),
        ("node = 3", "expected tables such as [node.conv1]"),
        ("io = ", "is not TOML"),
    ],
)
def test_a_bad_plan_is_refused_with_its_reason(tmp_path, text, words):
    with pytest.raises(PlanError) as error:
        load_plan(write(tmp_path, text))
    assert words in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(PlanError, match="cannot be read"):
        load_plan(tmp_path / "none.toml")


def test_an_unknown_node_is_refused_with_the_nearest():
    with pytest.raises(PlanError, match="did you mean 'first'"):
        project(residual(), Plan(nodes={"frist": NodePlan(pe=1)}))


def test_a_factor_that_does_not_divide_is_refused():
    with pytest.raises(PlanError, match="node 'first': pe is 2, expected a divisor of its 3 output channels: 1, 3"):
        project(residual(), Plan(nodes={"first": NodePlan(pe=2)}))
    with pytest.raises(PlanError, match="simd is 5, expected a divisor of its 27 terms"):
        project(residual(), Plan(nodes={"first": NodePlan(simd=5)}))


def test_folding_comes_nearest_to_the_reuse_factor():
    assert folding(64, 16, NodePlan(1), "n") == (64, 16)
    assert folding(64, 16, NodePlan(64 * 16), "n") == (1, 1)
    for reuse in (2, 4, 8, 64):
        pe, simd = folding(64, 16, NodePlan(reuse), "n")
        assert (64 // pe) * (16 // simd) == reuse
    pe, simd = folding(5, 7, NodePlan(6), "n")
    assert (5 // pe) * (7 // simd) in (5, 7)
    assert folding(6, 9, NodePlan(4, pe=2), "n")[0] == 2
    assert divisors(12) == [1, 2, 3, 4, 6, 12] and divisors(1) == [1] and divisors(9) == [1, 3, 9]


def test_a_table_may_come_from_anywhere():
    assert make_plan({"reuse": 3}).reuse == 3
