"""The arithmetic of the evidence: what is counted, compared and written into docs/evidence.md."""

import json
from dataclasses import replace

import numpy as np
import pytest

from edgemat.ops.bit_operations import constant_bits
from tests.benchmarks.qat import bits, campaign, page, protocol, statistics


def point(cost, validation, test=0.0):
    return {"ebops": cost, "validation": validation, "test": test}


def test_enclosed_bits_are_those_of_the_definition():
    codes = np.arange(-300, 301)
    expected = [len(bin(abs(c)).rstrip("0")) - 2 if c else 0 for c in codes.tolist()]
    assert bits.enclosed_bits(codes).tolist() == expected
    assert np.array_equal(bits.enclosed_bits(codes), constant_bits(codes)), "the same as `edgemat inspect` counts"
    assert bits.enclosed_bits(np.array([6])) != bits.enclosed_bits(np.array([5])), (
        "the control: 6 has two bits, 5 three"
    )


def test_a_dense_layer_costs_the_products_of_its_bits():
    codes = np.array([[3, 0, -4], [5, 1, 0]])  # bits 2, 0, 1 and 3, 1, 0
    assert bits.dense(codes, np.array([4, 5, 6])) == 2 * 4 + 1 * 6 + 3 * 4 + 1 * 5
    assert bits.dense(codes, 8) == 7 * 8
    assert bits.dense(codes, np.array([4, 0, 6])) == 2 * 4 + 1 * 6 + 3 * 4, "a pruned input costs nothing"
    assert bits.biases(np.array([0, -12, 7])) == 5


def test_every_method_sees_the_same_samples_in_the_same_order():
    job = protocol.Job("fixed", "edgemat", "mlp", 4, 1, protocol.NETWORKS["mlp"])
    rows = protocol.order(job, 3, 1_000)
    assert rows.shape == (7, 128) and len(np.unique(rows)) == rows.size
    assert np.array_equal(rows, protocol.order(replace(job, method="hgq2", bits=2), 3, 1_000))
    assert not np.array_equal(rows, protocol.order(job, 4, 1_000)), "the control: another epoch"
    assert not np.array_equal(rows, protocol.order(replace(job, seed=2), 3, 1_000)), "the control: another seed"


def test_inputs_lie_on_the_grid_that_every_method_gets():
    x = np.array([-9.0, -0.03125, 0.03125, 0.09, 7.99, 20.0], np.float32)
    assert protocol.on_grid(x, (8, 4, True)).tolist() == [-8.0, 0.0, 0.0625, 0.0625, 7.9375, 7.9375]
    assert protocol.on_grid(x, (8, 8, False)).tolist() == [0.0, 0.0, 0.03125, 0.08984375, 0.99609375, 0.99609375]


def test_the_learning_rate_rises_then_falls_to_zero():
    rates = [protocol.learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[9] == max(rates) == 2.0 and rates[0] == pytest.approx(0.2) and rates[-1] < 1e-2
    assert protocol.cost_weight(0, 50, 1e-6, 1e-3) == 1e-6
    assert protocol.cost_weight(49, 50, 1e-6, 1e-3) == pytest.approx(1e-3)


def test_a_job_is_what_its_text_says_and_every_setting_has_a_key_of_its_own():
    jobs = campaign.jobs("full")
    assert all(protocol.Job.read(job.dump()) == job for job in jobs)
    everything = [*jobs, *(job.start() for job in jobs), *campaign.jobs("short")]
    assert len({job.key for job in everything}) == len(set(everything))
    starts = {job.start() for job in jobs}
    assert len(starts) == 9, "one float start for each network and seed, whatever the method"


def test_a_result_is_read_back_and_another_jobs_is_not(tmp_path):
    first, second = campaign.jobs("short")[:2]
    cache = campaign.Cache(tmp_path)
    cache.put(first, {"test": 0.5})
    assert campaign.Cache(tmp_path).get(first) == {"test": 0.5}
    assert cache.get(second) is None
    assert cache.get(replace(first, budget=replace(first.budget, epochs=99))) is None


def test_the_front_keeps_what_no_other_point_beats():
    points = [point(300, 0.8), point(200, 0.7), point(250, 0.6), point(900, 0.8), point(950, 0.9)]
    assert [points[i]["ebops"] for i in statistics.undominated(points)] == [200, 300, 950]


def test_a_budget_gets_the_test_accuracy_of_the_point_that_validation_prefers():
    points = [point(1_000, 0.7, 0.5), point(2_000, 0.8, 0.4), point(3_000, 0.6, 0.9)]
    found = dict(zip(statistics.GRID.tolist(), statistics.at_budgets(points).tolist(), strict=True))
    budgets = sorted(found)
    assert np.isnan(found[budgets[0]])
    assert found[max(b for b in budgets if b < 2_000)] == 0.5
    assert found[budgets[-1]] == 0.4, "not 0.9: the test split chooses nothing"


def test_knee_and_cost_at_equal_accuracy():
    theirs = np.where(statistics.GRID < 1_000, 0.5, 0.8) + 1e-6 * np.arange(len(statistics.GRID))
    ours = np.where(statistics.GRID < 500, 0.5, 0.81)
    at = statistics.knee(theirs)
    assert statistics.GRID[at] == min(g for g in statistics.GRID if g >= 1_000)
    assert statistics.cost_of(ours, theirs[at]) == min(g for g in statistics.GRID if g >= 500)
    assert statistics.cost_of(ours, 0.9) is None
    said = page.verdict({"edgemat": ours, "hgq2": theirs})
    ratio = statistics.cost_of(ours, theirs[at]) / statistics.GRID[at]
    assert "below at" in said and f"{ratio:.2f} times as many" in said and ratio < 0.6
    assert "nowhere below" in page.verdict({"edgemat": theirs + 0.001, "hgq2": theirs})
    assert "never reaches" in page.verdict({"edgemat": theirs - 0.31, "hgq2": theirs})


def test_the_page_shows_the_stored_results():
    rows = json.loads(page.DATA.read_text("utf-8"))
    text = page.PAGE.read_text("utf-8")
    assert page.tables(rows) in text, "run: EDGEMAT_BENCH_FULL=1 EDGEMAT_BENCH_REPORT=1 python -m tests.benchmarks qat"
    moved = json.loads(json.dumps(rows))
    next(row for row in moved if row["job"]["task"] == "fixed")["result"]["test"] += 0.01
    assert page.tables(moved) not in text, "the control: another result"
