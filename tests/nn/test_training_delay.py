"""QuantizationDelay: real values in training until a quantiser's step, exact bits in eval at any time."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import edgemat
from edgemat.errors import FormatError
from edgemat.nn import BatchNorm, FixedQuantizer, QuantBatchNorm
from tests.networks import models
from tests.nn.networks import NETWORKS


def quantised(model: nn.Module, x: torch.Tensor, **recipe) -> nn.Module:
    torch.manual_seed(3)
    return edgemat.calibrate(edgemat.quantize(model, edgemat.Recipe(**recipe)), [x])


def pairs(a, b) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The outputs of two networks, one after the other."""
    return list(zip(a, b, strict=True)) if isinstance(a, tuple) else [(a, b)]


def on_grid(y: torch.Tensor, bits: int) -> bool:
    scaled = y.detach().double() * 2.0**bits
    return bool((scaled == scaled.round()).all())


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"dropout", "arg max"}))
def test_training_is_float_while_everything_is_delayed(name: str) -> None:
    """Float's own result in training, and the very codes of a network without delay in eval."""
    torch.manual_seed(5)
    factory, shapes = NETWORKS[name]
    model = factory()
    inputs = [torch.randn(shape) for shape in shapes]
    q = edgemat.calibrate(edgemat.quantize(model.eval()), [tuple(inputs)])
    exact = q.eval()(*inputs)
    rounded = copy.deepcopy(q).train()(*inputs)
    delay = edgemat.QuantizationDelay(q, delay_steps=1, recalibrate=None)
    real = q.train()(*inputs)
    expected = model.train()(*inputs)
    for a, b in pairs(real, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert any(not torch.allclose(a.double(), b.double(), atol=1e-4) for a, b in pairs(rounded, expected))
    if not any(isinstance(part, BatchNorm | QuantBatchNorm) for part in q.modules()):  # whose statistics moved
        assert all(torch.equal(a, b) for a, b in pairs(q.eval()(*inputs), exact))
    delay.step()
    assert delay.finished and not any(len(part._forward_hooks) for part in q.modules())


def test_only_weights_or_only_activations() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 16)
    for chosen in ({"weights": False}, {"activations": False}):
        q = quantised(models.Mlp(), x, weights="fixed<4>", activations="fixed<4>").train()
        delay = edgemat.QuantizationDelay(q, delay_steps=5, **chosen)
        roles = {part.role == "weights" for part in q.modules() if isinstance(part, FixedQuantizer) and part.delayed}
        assert roles == {"weights" not in chosen}
        layer = q.get_submodule("0")
        entry = q.get_submodule("input_1_quantizer")(x)
        assert on_grid(entry, 20) == ("weights" not in chosen)
        with torch.no_grad():
            weight = layer.weight_quantizer(layer.weight)
        assert torch.equal(weight, layer.weight) == ("weights" not in chosen)
        q(x).sum().backward()
        points = [p.grad for n, p in q.named_parameters() if n.endswith("frac")]
        assert any(g is None for g in points) and any(g is not None for g in points)
        assert not delay.finished


def test_quantisers_join_in_the_order_of_the_forward_pass() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 32, 32)
    q = quantised(models.ResNet8(), x).train()
    delay = edgemat.QuantizationDelay(q, delay_steps=2, warmup_steps=6)
    order, joined = delay.delayed, []
    assert order[0] == "x_quantizer" and order[1].startswith("conv") and order[-1].startswith("dense")
    assert order.index("stack1.conv1.weight_quantizer") < order.index("stack1.conv2.weight_quantizer")
    for _ in range(8):
        joined.append(len(order) - len(delay.delayed))
        assert delay.delayed == order[joined[-1] :]
        delay.step()
    count = len(order)
    assert joined == [0, 0, *(sum(2 + i * 6 // count <= step for i in range(count)) for step in range(2, 8))]
    assert delay.finished and 1 <= joined[2] < joined[5] < joined[7] == count


def training(steps: int, resume_at: int | None = None, folder: Path | None = None) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    batches = [(torch.randn(16, 1, 8, 8), torch.randint(0, 3, (16,))) for _ in range(3)]

    def fresh():
        q = edgemat.quantize(copy.deepcopy(model), edgemat.Recipe(weights="fixed<4>", activations="fixed<4>"))
        q = edgemat.calibrate(q, [x for x, _ in batches]).train()
        delay = edgemat.QuantizationDelay(q, delay_steps=4, warmup_steps=8)
        return q, torch.optim.Adam(edgemat.parameter_groups(q, 0.01)), delay

    q, optimizer, delay = fresh()
    for step in range(steps):
        if step == resume_at:
            kept = {"q": q.state_dict(), "optimizer": optimizer.state_dict(), "delay": delay.state_dict()}
            torch.save(kept, folder / "state.pt")
            q, optimizer, delay = fresh()
            kept = torch.load(folder / "state.pt", weights_only=True)
            q.load_state_dict(kept["q"])
            optimizer.load_state_dict(kept["optimizer"])
            delay.load_state_dict(kept["delay"])
        x, y = batches[step % 3]
        loss = nn.functional.cross_entropy(q(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        delay.step()
    return q.state_dict()


@pytest.mark.parametrize("resume_at", [1, 3, 4, 7, 12])
def test_resuming_mid_schedule_gives_the_same_bits(resume_at: int, tmp_path: Path) -> None:
    straight, resumed = training(14), training(14, resume_at, tmp_path)
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name


def test_a_state_of_another_schedule_is_refused() -> None:
    q = quantised(models.Mlp(), torch.randn(8, 16))
    state = edgemat.QuantizationDelay(q, delay_steps=4).state_dict()
    with pytest.raises(FormatError, match="the state has delay_steps 4, expected 5"):
        edgemat.QuantizationDelay(q, delay_steps=5).load_state_dict(state)


def test_binary_points_follow_the_range_of_the_last_real_step() -> None:
    torch.manual_seed(0)
    q = quantised(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(64, 4)).train()
    entry, relu = (next(p for n, p in q.named_modules() if n == name) for name in ("input_1_quantizer", "1"))
    relu = relu.output_quantizer
    before = entry.exponent(), relu.exponent()
    kept = copy.deepcopy(q)
    for module, method in ((q, "minmax"), (kept, None)):
        delay = edgemat.QuantizationDelay(module, delay_steps=2, recalibrate=method)
        for factor in (4.0, 16.0, 1.0):
            module(torch.randn(64, 4) * factor)
            with torch.no_grad():
                module.get_submodule("0").weight.mul_(2.0)
            delay.step()
    after = [next(p for n, p in m.named_modules() if n == "input_1_quantizer").exponent() for m in (q, kept)]
    assert before[0] - after[0] in (3, 4, 5) and after[1] == before[0]
    assert relu.exponent() < before[1]
    points = [m.get_submodule("0").weight_quantizer.exponents() for m in (q, kept)]
    assert torch.equal(points[0], points[1] - 2)  # doubled twice before the switch, and once after


def test_a_delayed_network_exports_and_copies() -> None:
    x = torch.randn(8, 16)
    q = quantised(models.Mlp(), x)
    expected = q.eval()(x)
    edgemat.QuantizationDelay(q.train(), delay_steps=3)
    assert torch.equal(copy.deepcopy(q).eval()(x), expected)
    assert not torch.equal(copy.deepcopy(q).train()(x), expected)
    edgemat.calibrate(q, [x])  # calibration in between leaves the delay alone
    assert not torch.equal(q(x), expected) and torch.equal(q.eval()(x), expected)


def test_export_in_the_middle(tmp_path: Path) -> None:
    x = torch.randn(8, 16)
    q = quantised(models.Mlp(), x, outputs="fixed<10,5>")
    delay = edgemat.QuantizationDelay(q.train(), delay_steps=3)
    edgemat.to_onnx(q, x[:2], tmp_path / "net.onnx")
    found = edgemat.Simulator(tmp_path / "net.onnx").codes(x.numpy())
    assert torch.equal(torch.from_numpy(found).long(), edgemat.nn.codes(q.eval()(x), "fixed<10,5>"))
    assert q.train().training and delay.delayed


def test_remove_ends_it() -> None:
    x = torch.randn(8, 16)
    q = quantised(models.Mlp(), x)
    delay = edgemat.QuantizationDelay(q.train(), delay_steps=3)
    delay.remove()
    assert delay.finished and torch.equal(q(x), q.eval()(x).float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delay_steps": -1}, "delay_steps is -1"),
        ({"delay_steps": 1.5}, "delay_steps is 1.5, expected a whole number"),
        ({"delay_steps": 1, "warmup_steps": True}, "warmup_steps is True"),
        ({"delay_steps": 1, "recalibrate": "mean"}, "recalibrate is 'mean', expected None or one of"),
    ],
)
def test_settings_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        edgemat.QuantizationDelay(quantised(models.Mlp(), torch.randn(8, 16)), **options)


def test_a_float_module_is_refused() -> None:
    with pytest.raises(FormatError, match="holds no quantiser"):
        edgemat.QuantizationDelay(models.Mlp(), 3)


def test_a_compiled_network_joins_like_an_eager_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 16)
    eager = quantised(models.Mlp(), x).train()
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, backend="eager")
    delays = [edgemat.QuantizationDelay(part, 1, 2, recalibrate=None) for part in (eager, module)]
    for step in range(4):
        assert torch.equal(eager(x), compiled(x)), step
        for delay in delays:
            delay.step()
    assert all(delay.finished for delay in delays)
