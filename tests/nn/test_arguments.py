"""Public functions given a wrong type, or a float network: one sentence, and beside each the right call that works."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edgemat
from edgemat.errors import EdgematError, FormatError
from edgemat.nn import arguments

x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def q() -> nn.Module:
    """A calibrated network that has seen an input; one layer bounds its accumulator."""
    torch.manual_seed(0)
    made = edgemat.quantize(network(), edgemat.Recipe(input="fixed<8,3>", rules={"0": {"accumulator": 16}}))
    edgemat.calibrate(made, [x])
    made.eval()(x)
    return made


def network() -> nn.Module:
    """The float network."""
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def front(folder: Any) -> edgemat.Front:
    return edgemat.Front(folder)


def recorded(q: nn.Module, *steps: Any) -> edgemat.FormatHistory:
    history = edgemat.FormatHistory(q)
    for step in steps:
        history.record(step)
    return history


Use = Callable[[nn.Module, Any], Any]
NUMBER, MODULE, PATH = "expected a finite number", r"expected a torch\.nn\.Module", "expected a path"
WRONG: dict[str, tuple[Use, tuple[Any, ...], str]] = {
    "CostTarget: at_most": (lambda q, v: edgemat.CostTarget(q, at_most=v), ("a", None, True, 0, math.nan), NUMBER),
    "CostTarget: margin": (lambda q, v: edgemat.CostTarget(q, margin=v), ("a", 1, -0.1), "least 0 and less than 1"),
    "cost model": (
        lambda q, v: (edgemat.CostRamp if v is None else edgemat.CostTarget)(q, v),
        (None, "arena", 3),
        "ebops",
    ),
    "CostTarget": (lambda q, v: edgemat.CostTarget(v), (None, nn.Linear), MODULE),
    "CostRamp: start": (lambda q, v: edgemat.CostRamp(q, start=v), ("a", None, [1], math.inf, -1), NUMBER),
    "CostRamp: steps": (lambda q, v: edgemat.CostRamp(q, steps=v), ("a", 1.5, 0, True), "whole number of at least 1"),
    "CostRamp": (lambda q, v: edgemat.CostRamp(v), (None,), MODULE),
    "cost": (lambda q, v: edgemat.cost(v), (None,), MODULE),
    "Front: folder": (lambda q, v: front(v), (None, 3), PATH),
    "FormatHistory": (lambda q, v: edgemat.FormatHistory(v), (None,), MODULE),
    "FormatHistory: step": (lambda q, v: recorded(q, v), ("a", math.nan, 2.5, None, -1), "whole number of at least 0"),
    "FormatHistory: path": (lambda q, v: recorded(q).save(v), (None,), PATH),
    "summary": (lambda q, v: edgemat.summary(v), (None, "q"), MODULE),
    "freeze_batch_norm": (lambda q, v: edgemat.freeze_batch_norm(v), (None,), MODULE),
    "accumulator_penalty": (lambda q, v: edgemat.accumulator_penalty(v), (None,), MODULE),
    "load_float": (lambda q, v: edgemat.load_float(v, q), (None,), MODULE),
    "load_float: prefix": (lambda q, v: edgemat.load_float(q, network(), v), (3, None), "expected a text"),
    "DistillationLoss: temperature": (lambda q, v: edgemat.DistillationLoss(v), ("a", None), NUMBER),
    "DistillationLoss: alpha": (lambda q, v: edgemat.DistillationLoss(alpha=v), ("a", -1), "number from 0 to 1"),
    "DistillationLoss: loss": (lambda q, v: edgemat.DistillationLoss(loss=v), ("a",), "expected a module"),
    "DistillationLoss: dim": (lambda q, v: edgemat.DistillationLoss(dim=v), ("a", 1.0), "expected a whole number"),
    "DistillationLoss: weights": (lambda q, v: edgemat.DistillationLoss(weights=v), ("a", 3), "a list or a dict"),
    "DistillationLoss: a weight": (lambda q, v: edgemat.DistillationLoss(weights=v), (["a"], {"x": None}), NUMBER),
    "DistillationLoss: the student": (lambda q, v: edgemat.DistillationLoss()(v, v), (None, "a"), "expected logits"),
    "parameter_groups: lr": (lambda q, v: edgemat.parameter_groups(q, lr=v), ("a", None, -1, math.nan), NUMBER),
    "parameter_groups: format_lr": (lambda q, v: edgemat.parameter_groups(q, 1e-3, v), ("a",), NUMBER),
    "parameter_groups": (lambda q, v: edgemat.parameter_groups(v, 1e-3), (None,), MODULE),
    "ptq": (lambda q, v: edgemat.ptq(network(), v), (None, 3, "x", x), "expected an iterable of batches"),
    "ptq: max_batches": (lambda q, v: edgemat.ptq(network(), [x], max_batches=v), ("a", 0, 1.5), "whole number"),
    "calibrate": (lambda q, v: edgemat.calibrate(v, [x]), (None,), MODULE),
    "calibration: percentile": (lambda q, v: edgemat.calibrate(q, [x], percentile=v), ("a", None, 50, 101), NUMBER),
    "clip_latent_weights": (lambda q, v: edgemat.nn.clip_latent_weights(v), (None,), MODULE),
    "OscillationTracker": (lambda q, v: edgemat.OscillationTracker(v), (None,), MODULE),
}


@pytest.mark.parametrize("label", WRONG)
def test_a_wrong_type_gets_one_sentence_that_names_the_argument(label: str, q: nn.Module) -> None:
    use, values, words = WRONG[label]
    for value in values:
        with pytest.raises(FormatError, match=rf"^{label}[^a-z_].*{words}") as caught:
            use(q, value)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_the_right_calls_still_work(q: nn.Module, tmp_path) -> None:
    """Numbers of Python, numpy and torch, texts and paths."""
    for value in (100, 1e2, np.float32(100), np.int64(100), torch.tensor(100.0), Fraction(100)):
        assert edgemat.CostTarget(q, at_most=value).at_most == 100.0
        assert edgemat.CostRamp(q, start=value, stop=1000, steps=np.int64(3)).start == 100.0
    folder = edgemat.Front(str(tmp_path / "front"))
    assert folder.offer(q, torch.tensor(0.5), np.float64(3)) and folder.offer(q, 0.75, 4)
    assert folder.load(q, -1) == folder.load(q, folder.points[1]) == folder.points[1]
    history = recorded(q, 0, np.int64(1), torch.tensor(2))
    history.save(str(tmp_path / "history.json"))
    assert history.steps == [0, 1, 2] and all(type(step) is int for step in history.steps)
    with edgemat.freeze_batch_norm(q) as frozen:
        assert frozen.names
    assert edgemat.accumulator_penalty(q).item() >= 0.0
    rate = torch.tensor(1e-3)
    assert edgemat.parameter_groups(q, rate)[0]["lr"] is rate
    assert edgemat.DistillationLoss(4, 1)(x, x).item() == 0.0
    assert edgemat.DistillationLoss(weights={"a": 1, "b": 0.5}, alpha=1)({"a": x, "b": x}, {"a": x, "b": x}) == 0.0
    assert "Linear" in str(edgemat.summary(q))
    again = edgemat.ptq(network().eval(), (batch for batch in (x, x)), max_batches=np.int64(1))
    edgemat.load_float(again, network())


@pytest.mark.parametrize("value", ["a", None, math.nan])
def test_a_front_takes_numbers_and_its_own_points_only(value: Any, q: nn.Module, tmp_path) -> None:
    made = front(tmp_path)
    for accuracy, cost, label in ((value, 1, "accuracy"), (0.5, value, "cost")):
        with pytest.raises(FormatError, match=f"Front: {label} is {value!r}, expected a finite number"):
            made.offer(q, accuracy, cost)
    with pytest.raises(FormatError, match=MODULE):
        made.offer(None, 0.5, 1)
    assert made.points == [] and list(tmp_path.iterdir()) == []
    made.offer(q, 0.5, 1)
    for point in (value, 1, -2, True):
        with pytest.raises(FormatError, match="expected one of its 1 points"):
            made.load(q, point)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("freeze_batch_norm", lambda net: edgemat.freeze_batch_norm(net)),
        ("accumulator_penalty", lambda net: edgemat.accumulator_penalty(net)),
        ("load_float", lambda net: edgemat.load_float(net, network())),
    ],
)
def test_a_float_network_is_refused_where_nothing_would_be_done(name: str, use, q: nn.Module) -> None:
    with pytest.raises(FormatError, match=rf"{name}: Sequential holds no layer.*call edgemat\.quantize first"):
        use(network())
    if name != "load_float":  # what it loads into gives up its binary points
        use(q)


def test_a_quantised_network_without_batch_norm_or_bound_is_left_as_it_is() -> None:
    made = edgemat.quantize(nn.Sequential(nn.Linear(3, 2)))
    assert edgemat.freeze_batch_norm(made).names == () and edgemat.accumulator_penalty(made).item() == 0.0


def test_what_is_no_module_cannot_be_lowered(tmp_path) -> None:
    with pytest.raises(EdgematError, match=r"to_onnx got a NoneType, expected a torch\.nn\.Module"):
        edgemat.to_onnx(None, x, tmp_path / "net.onnx")


def test_long_and_large_values_are_shown_by_what_they_are() -> None:
    large = ("a" * 99, "a" * 50), (torch.zeros(9), "a Tensor"), ([0] * 999, "a list"), (10**9999, "an integer of")
    for value, shown in large:
        with pytest.raises(FormatError, match=shown) as caught:
            arguments.number("f: x", value)
        assert len(str(caught.value)) < 120
