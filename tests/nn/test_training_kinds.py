"""The training helpers with every kind of quantiser: K-hot, learned widths, StatsQ, bipolar, bounded accumulators."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import edgemat
from edgemat.errors import FormatError

KINDS = {
    "khot": {"weights": "fixed<6>", "khot": 1},
    "widths": {"learn_widths": "all", "weight_groups": "weight", "activation_groups": "channel"},
    "widths of channels": {"learn_widths": "weights", "weight_groups": "channel", "weights": "fixed<4>"},
    "statistics": {"weights": "fixed<3>", "points": "statistics"},
    "bipolar": {"weights": "bipolar", "batch_norm": "affine"},
    "accumulator": {"weights": "fixed<6>", "accumulator": 12},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(24, 1, 8, 8), torch.randint(0, 3, (24,))) for _ in range(3)]


def fresh(kind: str, **options) -> nn.Module:
    recipe = edgemat.Recipe(**{"activations": "fixed<5>", **KINDS[kind], **options})
    return edgemat.calibrate(edgemat.quantize(network(), recipe), [x for x, _ in batches()]).train()


def deployed(q: nn.Module) -> list[torch.Tensor]:
    """The weights as they would be exported now."""
    copied = copy.deepcopy(q).eval()
    return [copied.get_submodule(name).quantized()[0].detach().double() for name in ("0", "3", "6")]


def train(q: nn.Module, steps: int, *helpers, lr: float = 0.05) -> list[list[torch.Tensor]]:
    groups = edgemat.parameter_groups(q, lr=lr, format_lr=1e-3, weight_decay=0.02, momentum=0.9)
    optimizer = torch.optim.SGD(groups)
    history = []
    for step in range(steps):
        x, y = batches()[step % 3]
        loss = nn.functional.cross_entropy(q(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for helper in helpers:
            helper.step()
        history.append(deployed(q))
    return history


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "accumulator"])
def test_frozen_weights_stay(kind: str) -> None:
    """The float weight is put back exactly, and what it rounds to changes with the grid alone."""
    q = fresh(kind)
    tracker = edgemat.OscillationTracker(q, momentum=0.2, threshold=0.15)
    train(q, 25, tracker)
    states = list(tracker._states.values())
    frozen = [state["frozen"].clone() for state in states]
    held = [state["held"].clone() for state in states]
    layers = [q.get_submodule(name) for name in ("0", "3", "6")]
    start = [layer.weight.detach().clone() for layer in layers]
    before, same = deployed(q), 0
    for _ in range(10):
        points = [state["exponents"].clone() for state in states]
        now = train(q, 1, tracker)[0]
        for i, (layer, state, mask) in enumerate(zip(layers, states, frozen, strict=True)):
            assert torch.equal(state["held"][mask], held[i][mask])
            scale = tracker._scales()[("0", "3", "6")[i]]
            kept = held[i] if scale is None else held[i] / scale
            assert torch.equal(layer.weight[mask], kept[mask])
            if torch.equal(points[i], state["exponents"]) and not kind.endswith("channels"):
                assert torch.equal(now[i][mask], before[i][mask])
                same += int(mask.sum())
        before = now
    assert same > 0 or kind.endswith("channels")
    assert all((layer.weight != old)[~mask].any() for layer, old, mask in zip(layers, start, frozen, strict=True))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "accumulator"])
def test_only_unsure_weights_move(kind: str) -> None:
    q = fresh(kind)
    tracker = edgemat.OscillationTracker(q, mode="cga", threshold=0.05)
    layers = [q.get_submodule(name) for name in ("0", "3", "6")]
    for _ in range(3):
        frozen = [state["frozen"].clone() for state in tracker._states.values()]
        before = [layer.weight.detach().clone() for layer in layers]
        train(q, 1, tracker)
        assert 0.5 < tracker.frozen_share < 1
        for layer, mask, old in zip(layers, frozen, before, strict=True):
            assert torch.equal(layer.weight[mask], old[mask])
    assert any(not torch.equal(layer.weight, old) for layer, old in zip(layers, before, strict=True))


def test_weights_that_move_together_cannot_be_frozen() -> None:
    with pytest.raises(FormatError, match="layer '0' bounds its accumulator"):
        edgemat.OscillationTracker(fresh("accumulator"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_delayed_training_ends_like_any_other(kind: str) -> None:
    q = fresh(kind)
    exact = copy.deepcopy(q).eval()
    delay = edgemat.QuantizationDelay(q, delay_steps=2, warmup_steps=4)
    x = batches()[0][0]
    assert torch.equal(copy.deepcopy(q).eval()(x), exact(x))
    assert not torch.equal(copy.deepcopy(q)(x).float(), copy.deepcopy(exact).train()(x).float())
    train(q, 8, delay, lr=0.01)
    assert delay.finished
    never = edgemat.quantize(network(), edgemat.Recipe(**{"activations": "fixed<5>", **KINDS[kind]}))
    never.load_state_dict(q.state_dict())
    for mode in (True, False):
        assert torch.equal(copy.deepcopy(q).train(mode)(x), copy.deepcopy(never).train(mode)(x))


@pytest.mark.parametrize("kind", KINDS)
def test_post_training_and_a_float_start(kind: str) -> None:
    model, x = network(), torch.cat([x for x, _ in batches()])
    model.train()(x)
    recipe = edgemat.Recipe(**{"activations": "fixed<5>", **KINDS[kind]})
    wanted = model.eval()(x).double().mean(0)
    plain, corrected = (edgemat.ptq(model, [x], recipe, bias_correction=on) for on in (False, True))
    off = [(q(x).double().mean(0) - wanted).abs().max().item() for q in (plain, corrected)]
    if kind not in ("bipolar", "accumulator"):  # whose own weights are no roundings of the float network's
        assert off[1] < 0.3 * off[0] + 1e-3
    q = edgemat.quantize(network(), recipe).eval()
    edgemat.load_float(q, model)
    assert torch.equal(edgemat.calibrate(q, [x], "mse", batch_norm="keep")(x), plain(x))
    start = edgemat.quantize(network(), recipe).eval()
    edgemat.load_float(start, model)
    assert edgemat.calibrate(start, [x], "mse")(x).isfinite().all()  # the start of a training: statistics follow


@pytest.mark.parametrize("kind", KINDS)
def test_bits_can_be_allocated_and_format_parameters_have_their_group(kind: str) -> None:
    recipe = edgemat.Recipe(**{"activations": "fixed<5>", **KINDS[kind]})
    if kind == "bipolar":
        recipe = edgemat.Recipe(weights="fixed<4>", rules={"3": {"weights": "bipolar"}})
    made = edgemat.ompq(network().eval(), [x for x, _ in batches()], bits=(3, 5), average_bits=4, recipe=recipe)
    named = {name for name, rule in made.rules.items() if "weights" in rule}
    assert named == {"0", "3", "6"}
    assert made.rules["3"]["weights"].bipolar == (kind == "bipolar")
    q = edgemat.quantize(network(), made)
    groups = {group["name"]: group["params"] for group in edgemat.parameter_groups(q, 0.1)}
    assert [p.shape for p in groups["weights"]] == [(6, 1, 3, 3), (4, 6, 3, 3), (3, 64)]
    assert len(groups["vectors"]) == 5
