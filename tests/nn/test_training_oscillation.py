"""OscillationTracker: the published algorithm on numbers worked out by hand, frozen weights, resuming, annealing."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import edgemat
from edgemat.errors import FormatError
from edgemat.nn import QuantLinear
from tests.networks import models


def linear(rows: int, columns: int, weights: str = "fixed<4,1>") -> QuantLinear:
    """A layer with a stated grid of step 1/8, so that codes are plain numbers."""
    layer = QuantLinear(columns, rows, bias=False, weights=weights, input="fixed<8,3>")
    layer.weight.data.zero_()
    return layer


def drive(layer: QuantLinear, tracker: edgemat.OscillationTracker, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """Plays the optimiser: puts in each tensor, calls `step`, returns the deployed codes."""
    found = []
    for weight in weights:
        layer.weight.data.copy_(weight)
        tracker.step()
        found.append(layer.weight_quantizer.codes(layer.weight_quantizer(layer.weight)).flatten())
    return found


class Reference:
    """Algorithm 1 of arXiv 2203.08114 for one weight, on Python numbers."""

    def __init__(self, momentum: float, threshold: float):
        self.m, self.threshold = momentum, threshold
        self.code: int | None = None
        self.direction, self.f, self.mean = 0, 0.0, 0.0
        self.frozen: int | None = None

    def step(self, weight: float) -> int:
        code = self.frozen if self.frozen is not None else max(-8, min(7, math.floor(weight * 8 + 0.5)))
        if self.code is None:
            self.code, self.mean = code, float(code)
            return code
        change = (code > self.code) - (code < self.code)
        self.f += self.m * ((change * self.direction < 0) - self.f)
        self.mean += self.m * (code - self.mean)
        self.direction = change or self.direction
        self.code = code
        if self.frozen is None and self.f > self.threshold:
            self.frozen = self.code = round(self.mean)
        return self.code


@pytest.mark.parametrize(("momentum", "threshold"), [(0.1, 0.15), (0.25, 0.3), (0.5, 0.6)])
def test_the_published_algorithm(momentum: float, threshold: float) -> None:
    torch.manual_seed(0)
    # Around thresholds, so that codes jump to and fro; some jump far, and some beyond the rails.
    centre = (torch.randint(-10, 10, (6, 8)) + 0.5) / 8
    weights = [centre + torch.randn(6, 8) * 0.1 * torch.rand(6, 1) for _ in range(60)]
    layer = linear(6, 8)
    tracker = edgemat.OscillationTracker(layer, momentum=momentum, threshold=threshold)
    found = drive(layer, tracker, weights)
    references = [Reference(momentum, threshold) for _ in range(48)]
    expected = [[r.step(w) for r, w in zip(references, weight.flatten().tolist())] for weight in weights]
    assert [codes.tolist() for codes in found] == expected
    frozen = sum(r.frozen is not None for r in references)
    assert 0 < frozen < 48 and tracker.frozen_share == frozen / 48
    other = [Reference(momentum, threshold * 0.6) for _ in range(48)]  # the control: another threshold
    assert expected != [[r.step(w) for r, w in zip(other, weight.flatten().tolist())] for weight in weights]


def test_a_weight_that_only_climbs_does_not_oscillate() -> None:
    layer = linear(1, 2)
    tracker = edgemat.OscillationTracker(layer, momentum=0.5, threshold=0.4)
    climb = [torch.tensor([[i / 8, 0.125 * (i % 2)]]) for i in range(7)]
    found = drive(layer, tracker, climb)
    assert [codes[0].item() for codes in found] == list(range(7))
    assert tracker.frozen == {"": 0.5} and tracker.frequency[""] > 0


def trained(steps: int, tracker_options: dict | None, seed: int = 0, resume_at: int | None = None, folder=None):
    """A small convolutional network with folded batch norm, trained by SGD with momentum and decay."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))
    recipe = edgemat.Recipe(weights="fixed<3>", activations="fixed<4>")
    batches = [(torch.randn(32, 1, 8, 8), torch.randint(0, 4, (32,))) for _ in range(4)]

    def fresh():
        q = edgemat.calibrate(edgemat.quantize(copy.deepcopy(model), recipe), [x for x, _ in batches]).train()
        groups = edgemat.parameter_groups(q, lr=0.1, format_lr=1e-2, weight_decay=0.05, momentum=0.9)
        tracker = None if tracker_options is None else edgemat.OscillationTracker(q, **tracker_options)
        return q, torch.optim.SGD(groups, lr=0.1), tracker

    q, optimizer, tracker = fresh()
    history = []
    for step in range(steps):
        if step == resume_at:
            states = {"q": q.state_dict(), "optimizer": optimizer.state_dict(), "tracker": tracker.state_dict()}
            torch.save(states, folder / "state.pt")
            q, optimizer, tracker = fresh()
            loaded = torch.load(folder / "state.pt", weights_only=True)
            q.load_state_dict(loaded["q"])
            optimizer.load_state_dict(loaded["optimizer"])
            tracker.load_state_dict(loaded["tracker"])
        x, y = batches[step % 4]
        loss = nn.functional.cross_entropy(q(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if tracker is not None:
            tracker.step()
        history.append(deployed(q))
    return q, tracker, history


def deployed(q: nn.Module) -> dict[str, torch.Tensor]:
    """The weights as they would be exported now."""
    mode = q.training
    q.eval()
    found = {name: q.get_submodule(name).quantized()[0].detach().clone() for name in ("0", "4")}
    q.train(mode)
    return found


OPTIONS = {"momentum": 0.1, "threshold": 0.12}


def test_frozen_weights_really_stay() -> None:
    _, tracker, history = trained(60, OPTIONS)
    assert 0.02 < tracker.frozen_share < 1
    # A second training up to step 40 shows which were frozen then.
    _, early, _ = trained(40, OPTIONS)
    moved, stayed = 0, 0
    for name in ("0", "4"):
        frozen = early._states[name]["frozen"]
        for later in history[40:]:
            assert torch.equal(later[name][frozen], history[39][name][frozen])
            moved += int((later[name] != history[39][name]).sum())
        stayed += int(frozen.sum())
    assert stayed > 5 and moved > 0


def test_without_the_tracker_they_move() -> None:
    """The control of the test above: the same weights under the same steps."""
    _, early, _ = trained(40, OPTIONS)
    _, _, history = trained(60, None)
    moved = sum(
        int((later[name] != history[39][name])[early._states[name]["frozen"]].sum())
        for name in ("0", "4")
        for later in history[40:]
    )
    assert moved > 0


@pytest.mark.parametrize(
    "options", [OPTIONS, {"momentum": 0.1, "mode": "anneal", "threshold": 0.3, "steps": 20}, {"mode": "cga"}]
)
def test_resuming_gives_the_same_bits(options: dict, tmp_path: Path) -> None:
    q, tracker, _ = trained(24, options)
    again, resumed, _ = trained(24, options, resume_at=11, folder=tmp_path)
    for (name, a), b in zip(q.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    first, second = tracker.state_dict(), resumed.state_dict()
    assert first["steps_done"] == second["steps_done"] == 24
    for name in first["layers"]:
        for key, value in first["layers"][name].items():
            assert torch.equal(value, second["layers"][name][key]), (name, key)
    assert tracker.frozen_share > 0


def test_a_finer_point_keeps_the_value_and_counts_as_no_oscillation() -> None:
    layer = linear(2, 3, "fixed<4>")
    layer.weight_quantizer.set_frac(torch.tensor([3.0, 3.0]))
    tracker = edgemat.OscillationTracker(layer, momentum=0.5, threshold=0.4)
    low, high = torch.full((2, 3), 0.126), torch.full((2, 3), 0.249)
    drive(layer, tracker, [low, high, low])
    held = layer.weight_quantizer(layer.weight).clone()
    assert tracker.frozen_share == 1 and held[0, 0].item() in (0.125, 0.25)
    layer.weight_quantizer.set_frac(torch.tensor([4.0, 3.0]))
    codes = drive(layer, tracker, [high])[0].view(2, 3)
    assert torch.equal(layer.weight_quantizer(layer.weight), held)
    assert codes[0].tolist() == [2 * c for c in codes[1].tolist()]
    layer.weight_quantizer.set_frac(torch.tensor([1.0, 3.0]))  # too coarse for the value: rounded for as long
    drive(layer, tracker, [high])
    assert not torch.equal(layer.weight_quantizer(layer.weight)[0], held[0])
    layer.weight_quantizer.set_frac(torch.tensor([3.0, 3.0]))
    drive(layer, tracker, [high])
    assert torch.equal(layer.weight_quantizer(layer.weight), held)

    still = linear(2, 3, "fixed<4>")
    still.weight_quantizer.set_frac(torch.tensor([3.0, 3.0]))
    watching = edgemat.OscillationTracker(still, momentum=0.5, threshold=0.4)
    for frac in (4.0, 3.0, 4.0, 3.0, 4.0):
        still.weight_quantizer.set_frac(torch.tensor([frac, 3.0]))
        drive(still, watching, [torch.full((2, 3), 0.19)])
    assert watching.frozen_share == 0 and watching.frequency[""] == 0


def test_the_threshold_falls_along_half_a_cosine() -> None:
    layer = linear(1, 1)
    tracker = edgemat.OscillationTracker(layer, mode="anneal", threshold=0.08, final_threshold=0.02, steps=4)
    found = []
    for _ in range(6):
        found.append(round(tracker.threshold, 6))
        tracker.step()
    assert found == [0.08, 0.071213, 0.05, 0.028787, 0.02, 0.02]


def test_confident_weights_do_not_move_any_more() -> None:
    layer = linear(1, 6)
    step = 1 / 8
    # Distances to the threshold at 0.5 LSB: 0, +-0.09, +-0.11 LSB; and one beyond the upper rail.
    start = torch.tensor([[0.5, 0.59, 0.41, 0.61, 0.39, 7.5]]) * step
    layer.weight.data.copy_(start)
    tracker = edgemat.OscillationTracker(layer, mode="cga", threshold=0.1)
    assert tracker.frozen == {"": 0.5}
    layer.weight.data += 0.05 * step
    tracker.step()
    expected = torch.tensor([[0.55, 0.64, 0.46, 0.61, 0.39, 7.5]]) * step
    assert torch.equal(layer.weight.data[0, 3:], start[0, 3:])
    assert torch.allclose(layer.weight.data, expected, atol=1e-7)
    layer.weight.data += 0.05 * step  # 0.64 has left the margin and stays; 0.55 and 0.46 go on
    tracker.step()
    assert torch.allclose(layer.weight.data, torch.tensor([[0.6, 0.64, 0.51, 0.61, 0.39, 7.5]]) * step, atol=1e-7)


def test_real_weights_are_left_alone_until_quantisation_begins() -> None:
    torch.manual_seed(0)
    q = edgemat.calibrate(edgemat.quantize(models.Mlp()), [torch.randn(32, 16)]).train()
    delay = edgemat.QuantizationDelay(q, delay_steps=3)
    tracker = edgemat.OscillationTracker(q)
    for step in range(5):
        assert all(bool(state) == (step >= 3) for state in tracker._states.values()), step
        delay.step()
        tracker.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "frieze"}, "did you mean 'freeze'"),
        ({"momentum": 0.0}, "momentum is 0.0, expected a number above 0"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"mode": "cga", "threshold": 0.6}, "at most 0.5"),
        ({"mode": "anneal"}, "steps is None with mode 'anneal'"),
        ({"steps": 10}, "steps is 10 with mode 'freeze'"),
        ({"mode": "anneal", "steps": 1.5}, "steps is 1.5 .* expected a positive whole number"),
        ({"momentum": "0.1"}, "momentum is '0.1', expected a number"),
        ({"threshold": "x"}, "threshold is 'x', expected a number"),
    ],
)
def test_settings_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        edgemat.OscillationTracker(linear(1, 1), **options)


def test_what_cannot_be_tracked() -> None:
    with pytest.raises(FormatError, match="holds no linear layer or convolution of at most 16 weight bits"):
        edgemat.OscillationTracker(linear(1, 1, "fixed<20,1>"))
    a = edgemat.OscillationTracker(nn.Sequential(linear(1, 2)))
    with pytest.raises(FormatError, match="layer '0' is in only one of the state and the network"):
        edgemat.OscillationTracker(linear(1, 2)).load_state_dict(a.state_dict())
    with pytest.raises(FormatError, match="the state is of mode 'freeze', expected 'cga'"):
        edgemat.OscillationTracker(nn.Sequential(linear(1, 2)), mode="cga").load_state_dict(a.state_dict())
    for state in (None, {}, {"mode": "freeze", "layers": a.state_dict()["layers"]}):
        with pytest.raises(FormatError, match="expected what state_dict"):
            edgemat.OscillationTracker(nn.Sequential(linear(1, 2))).load_state_dict(state)
    a.step()
    with pytest.raises(FormatError, match=r"weights of another shape, expected \(1, 3\)"):
        edgemat.OscillationTracker(nn.Sequential(linear(1, 3))).load_state_dict(a.state_dict())


def test_all_ranks_freeze_by_the_statistics_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch statistics differ between processes, weights must not: the second one gets the first one's scales."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))
    x = torch.randn(16, 1, 8, 8)
    first = edgemat.calibrate(edgemat.quantize(model, edgemat.Recipe(weights="fixed<3>")), [x]).train()
    second, alone = copy.deepcopy(first), copy.deepcopy(first)
    sent: list[torch.Tensor] = []

    def broadcast(tensor: torch.Tensor, source: int) -> None:
        assert source == 0
        if ranked is first:
            sent.append(tensor.clone())
        else:
            tensor.copy_(sent.pop(0))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: ranked is not alone)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    trackers = [edgemat.OscillationTracker(q, momentum=0.5, threshold=0.4) for q in (first, second, alone)]
    for step in range(12):
        noise = torch.randn(6, 1, 3, 3) * 0.1
        for ranked, tracker in zip((first, second, alone), trackers, strict=True):
            with torch.no_grad():
                ranked.get_submodule("1").running_var.mul_(1.0 if ranked is first else 1.02)
                ranked.get_submodule("0").weight.add_(noise * (-1) ** step)
            tracker.step()
        assert torch.equal(first.get_submodule("0").weight, second.get_submodule("0").weight)
    assert 0 < trackers[0].frozen_share == trackers[1].frozen_share
    assert not torch.equal(first.get_submodule("0").weight, alone.get_submodule("0").weight)  # the control
