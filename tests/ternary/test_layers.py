"""Ternary layers: published codes, exported bits, what is refused; scales that deploy, with and without a schedule."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edgemat
from edgemat.errors import FormatError, LoweringError
from edgemat.lower.reader import read
from edgemat.nn import FixedQuantizer, TernaryConv1d, TernaryConv2d, TernaryLinear, TernaryQuantizer
from edgemat.nn.ternary_rank1 import SPREAD, Rank1Quantizer
from edgemat.report.inspection import inspect

KINDS = ("absmean", "learned", "b1.58", "binary", "onebit")
SETTINGS = [
    (kind, scale, per_channel)
    for kind, scale, per_channel in itertools.product(KINDS, ("power_of_two", "fixed<6>"), (True, False))
    if (kind != "onebit" or (scale == "power_of_two" and per_channel)) and (kind != "b1.58" or not per_channel)
]
FIXED = {"input": "fixed<8,3>", "output": "fixed<8,3>"}


def weights(*shape: int, seed: int = 0) -> Tensor:
    """Weights among which ties of every threshold are likely: multiples of 1/4, rows of zeros."""
    made = torch.randint(-6, 7, shape, generator=torch.Generator().manual_seed(seed)) / 4.0
    made[0] = 0.0
    return made


def trits(quantizer: TernaryQuantizer, w: Tensor) -> Tensor:
    return quantizer(w).detach().sign()


# -- codes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("per_channel", [True, False])
def test_absmean_is_what_was_published(per_channel: bool) -> None:
    w = weights(5, 12)
    rows = w if per_channel else w.reshape(1, -1)
    s = rows.double().abs().mean(1, keepdim=True)
    published = torch.where(s > 0, (rows.double() / s.clamp_min(1e-300)).round().clamp(-1, 1), 0.0).view_as(w)
    assert torch.equal(trits(TernaryQuantizer("absmean", channels=5 if per_channel else None), w), published.float())


def test_b158_is_what_its_authors_wrote() -> None:
    w = torch.randn(9, 31, generator=torch.Generator().manual_seed(1))
    scale = 1.0 / w.abs().mean().clamp_(min=1e-5)
    u = (w * scale).round().clamp_(-1, 1) / scale
    assert torch.equal(trits(TernaryQuantizer("b1.58", "free"), w), u.sign())
    assert torch.allclose(TernaryQuantizer("b1.58", "free")(w), u, rtol=1e-6)
    tiny = torch.full((2, 2), 1e-7)
    assert not TernaryQuantizer("b1.58")(tiny).any()  # eps keeps noise from becoming signs
    assert TernaryQuantizer("absmean")(tiny).all()


def test_binary_is_the_sign_about_the_mean() -> None:
    w = torch.tensor([[1.0, 2.0, 3.0, 2.0]])
    assert TernaryQuantizer("binary", "free")(w).tolist() == [[-2.0, 2.0, 2.0, 2.0]]  # ties of the mean are +1


def test_a_learned_threshold_moves_the_codes_and_gets_a_gradient() -> None:
    quantizer = TernaryQuantizer("learned", "free")
    w = torch.tensor([[1.0, -0.4, 0.1, 2.5]], requires_grad=True)  # the mean magnitude is 1
    y = quantizer(w)
    assert torch.allclose(y, torch.tensor([[1.75, 0.0, 0.0, 1.75]]))
    y.sum().backward()
    assert w.grad is not None and torch.equal(w.grad, torch.ones_like(w))
    # -s * W / (2 c**2 m) where |W| < 3 c m = 2.1
    expected = -1.75 * (1.0 - 0.4 + 0.1) / (2 * 0.7**2)
    assert quantizer.threshold is not None and quantizer.threshold.grad is not None
    assert abs(quantizer.threshold.grad.item() - expected) < 1e-5
    with torch.no_grad():
        quantizer.threshold.fill_(0.3)
    assert trits(quantizer, w).tolist() == [[1.0, -1.0, 0.0, 1.0]]


@pytest.mark.parametrize("s", [1.0, 2**-0.5, 0.70710, 0.70711, 3.0, 2.8284, 2.8285, 0.0, 1e-3])
def test_a_power_of_two_is_the_nearest_in_the_logarithm(s: float) -> None:
    quantizer = TernaryQuantizer("absmean")
    quantizer.fit(torch.full((3, 3), s))
    if s:
        assert abs(np.log2(np.float64(np.float32(s))) + quantizer.exponent()) <= 0.5
    else:
        assert quantizer.exponent() == 0


def test_fixed_multipliers_share_the_finest_point_that_holds_the_largest() -> None:
    quantizer = TernaryQuantizer("absmean", "fixed<4>", channels=3)
    quantizer.fit(torch.tensor([[0.8, 0.8], [0.3, 0.3], [0.01, 0.01]]))
    assert quantizer.exponents().tolist() == [3, 3, 3]
    assert quantizer.multiplier.tolist() == [6.0, 2.0, 0.0]  # round(6.4), round(2.4), round(0.08)
    assert str(quantizer.format) == "fixed<2,2,RND,SAT_SYM>"


def test_rank_one_scales_start_at_the_singular_vectors() -> None:
    layer = TernaryLinear(6, 4, ternary="onebit", **FIXED)
    h, g = torch.tensor([1.0, 0.5, 2.0, 4.0]), torch.tensor([1.0, 2.0, 0.25, 8.0, 0.001, 1.0])
    with torch.no_grad():
        layer.weight.copy_(torch.outer(h, g) * torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0]))
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, Rank1Quantizer)
    found = quantizer.eval()(layer.weight).abs()
    expected = torch.outer(h, g.clamp_min(8.0 / 2**SPREAD))
    assert torch.equal(found / found[0, 0], expected / expected[0, 0])  # powers of two come out exactly
    loss = (quantizer.train()(layer.weight) * 1.0).sum()
    loss.backward()
    assert quantizer.input_scale.grad is not None and quantizer.output_scale.grad is not None
    assert quantizer.input_scale.grad.shape == (6,) and quantizer.output_scale.grad.any()


# -- exported bits ------------------------------------------------------------------------------------------------
class Branches(nn.Module):
    """A layer for each setting, side by side behind one input quantiser: convolutions and fully connected layers."""

    def __init__(self, settings: list[tuple[str, str, bool]]):
        super().__init__()
        torch.manual_seed(3)
        self.entry = FixedQuantizer("fixed<8,3>")
        self.branches = nn.ModuleList()
        for i, (kind, scale, per_channel) in enumerate(settings):
            options = {"ternary": kind, "scale": scale, "per_channel": per_channel, "bias": i % 3 > 0}
            options |= {"input": None, "output": "fixed<8,3>"}
            made = TernaryConv1d(2, 4, 3, padding=1, **options) if i % 2 else TernaryLinear(12, 7, **options)
            made.link(self.entry)
            self.branches.append(made)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.entry(x)
        flat = x.flatten(1)
        return [branch(flat if i % 2 == 0 else x) for i, branch in enumerate(self.branches)]


def test_eval_is_the_exported_file(tmp_path: Path) -> None:
    net = Branches(SETTINGS)
    x = 3 * torch.randn(9, 2, 6)
    sum(y.sum() for y in net.train()(x)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    expected = [y.detach().numpy() for y in net.eval()(x)]
    edgemat.to_onnx(net, (x[:2],), tmp_path / "net.onnx")
    found = edgemat.Simulator(tmp_path / "net.onnx")(x.numpy())
    assert isinstance(found, dict) and len(found) == len(SETTINGS)
    for wanted, got in zip(expected, found.values(), strict=True):
        assert wanted.std() > 0 and np.array_equal(got, wanted)
    calls = [call for call in read(tmp_path / "net.onnx").nodes if call.op.name in ("Conv", "Linear")]
    params = [call.op.native(call).params for call in calls]
    two = sum(kind in ("binary", "onebit") for kind, _, _ in SETTINGS)
    assert sum(p.get("bipolar", 0) for p in params) == two
    assert sum(p.get("ternary", 0) for p in params) == len(SETTINGS) - two


def test_every_backend_computes_a_ternary_network(tmp_path: Path) -> None:
    net = Branches([("absmean", "power_of_two", True), ("learned", "fixed<5>", True), ("onebit", "power_of_two", True)])
    x = 3 * torch.randn(4, 2, 6)
    edgemat.to_onnx(net.eval(), (x[:2],), tmp_path / "net.onnx")
    report = edgemat.verify(tmp_path / "net.onnx", x.numpy(), module=net)
    assert report.ok and {"reference", "onnx", "torch"} <= set(report.backends)


def test_sequences_keep_their_axes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = (("absmean", "fixed<6>"), ("binary", "power_of_two"), ("onebit", "power_of_two"))
    layers = [TernaryLinear(6, 6, i > 0, ternary=k, scale=s, **FIXED) for i, (k, s) in enumerate(settings)]
    net = nn.Sequential(*layers).eval()
    x = 3 * torch.randn(4, 3, 6)
    edgemat.to_onnx(net, (x[:2],), tmp_path / "net.onnx")
    assert np.array_equal(edgemat.Simulator(tmp_path / "net.onnx")(x.numpy()), net(x).detach().numpy())
    by_operator = {n.operator: n.multiplies for n in inspect(tmp_path / "net.onnx").nodes if n.multiplies}
    assert by_operator == {"Affine": 3 * 6}  # of the fixed multiplier alone: powers of two are shifts, on rows as well
    report = edgemat.verify(tmp_path / "net.onnx", x.numpy(), module=net, backends=["reference", "onnx", "mcu"])
    assert report.ok


def test_conv1d_and_a_recipe_of_ternary_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    float_net = nn.Sequential(
        nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)
    )
    x = torch.randn(16, 3, 8)
    float_net(x)
    for scale, rules in (("power_of_two", {}), ("fixed<8>", {}), ("power_of_two", {"4": {"weights": "binary"}})):
        recipe = edgemat.Recipe(weights="ternary", scale=scale, rules=rules)
        assert edgemat.Recipe.from_toml(recipe.to_toml()) == recipe
        q = edgemat.calibrate(edgemat.quantize(float_net, recipe), [x])
        q.train()(x).sum().backward()
        q.eval()
        edgemat.to_onnx(q, (x[:2],), tmp_path / "net.onnx")
        assert np.array_equal(edgemat.Simulator(tmp_path / "net.onnx")(x.numpy()), q(x).detach().numpy())
        ops = [call.op.name for call in read(tmp_path / "net.onnx").nodes]
        assert ops.count("Affine") == (2 if scale == "fixed<8>" else 1 + len(rules))
    assert TernaryConv2d(2, 4, 3, groups=2).weight.shape == (4, 1, 3, 3)


def test_a_checkpoint_brings_the_scale_and_is_no_others() -> None:
    layer, other = (TernaryLinear(4, 3, **FIXED) for _ in range(2))
    layer(torch.randn(2, 4))
    layer.weight_quantizer.hold()
    held = layer.weight_quantizer.frac.clone()
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        other.weight.mul_(64.0)
    other(torch.randn(2, 4))
    assert torch.equal(other.weight_quantizer.frac, held)
    for scale in ("free", "fixed<5>", "ufixed<6,1>"):
        brought = TernaryLinear(4, 3, scale=scale, **FIXED)
        other.load_state_dict(brought.state_dict())  # a schedule may have changed it
        assert other.weight_quantizer.scale == brought.weight_quantizer.scale
    wrong = TernaryLinear(4, 3, ternary="learned", **FIXED)
    with pytest.raises(RuntimeError, match=r"is ternary \(learned\) with scale power_of_two in this network"):
        wrong.load_state_dict(layer.state_dict())


# -- scales -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("target", ["power_of_two", "fixed<6>"])
def test_training_ends_with_the_exported_scale(target: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(TernaryLinear(12, 8, True, scale="free", **FIXED), TernaryLinear(8, 3, scale="free", **FIXED))
    x = torch.randn(32, 12)
    schedule = edgemat.ScaleDeployment(net, start=3, steps=4, scale=target)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    blends = []
    for _ in range(12):
        blends.append(schedule.blend)
        optimizer.zero_grad()
        y = net.train()(x)
        if schedule.blend < 1:
            assert not torch.equal(y, net.eval()(x))  # control: a free scale is not what is exported
        net.train()(x).square().sum().backward()
        optimizer.step()
        schedule.step()
    assert blends == [0.0, 0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0] and schedule.finished
    frac = [part.frac.clone() for part in net.modules() if isinstance(part, TernaryQuantizer)]
    trained = net.train()(x).detach().numpy()
    edgemat.to_onnx(net, (x[:2],), tmp_path / "net.onnx")
    assert np.array_equal(edgemat.Simulator(tmp_path / "net.onnx")(x.numpy()), trained)
    with torch.no_grad():
        net[0].weight.mul_(32.0)
    net.train()(x)
    assert all(torch.equal(a, part.frac) for a, part in zip(frac, quantizers(net), strict=True))  # held


def quantizers(net: nn.Module) -> list[TernaryQuantizer]:
    return [part for part in net.modules() if isinstance(part, TernaryQuantizer)]


def test_a_schedule_resumes() -> None:
    net = nn.Sequential(TernaryLinear(4, 3, scale="free", **FIXED))
    schedule = edgemat.ScaleDeployment(net, 2, 2, "power_of_two")
    for _ in range(3):
        schedule.step()
    again = edgemat.ScaleDeployment(net, 2, 2)
    again.load_state_dict(schedule.state_dict())
    assert again.blend == 0.5 and quantizers(net)[0].blend == 0.5
    with pytest.raises(FormatError, match="the state has start 2, expected 1"):
        edgemat.ScaleDeployment(net, 1, 2).load_state_dict(schedule.state_dict())
    schedule.remove()
    assert quantizers(net)[0].blend == 1.0


def test_a_free_scale_trains_and_is_refused_at_export(tmp_path: Path) -> None:
    net = nn.Sequential(TernaryLinear(4, 3, scale="free", **FIXED))
    x = torch.randn(2, 4)
    net.train()(x).sum().backward()
    with pytest.raises(LoweringError, match=r"has a free scale \(a float\), expected a power of two or a fixed"):
        edgemat.to_onnx(net, (x,), tmp_path / "net.onnx")
    with pytest.raises(FormatError, match="give scale='power_of_two'"):
        edgemat.ScaleDeployment(net, 1)


def test_what_trits_cannot_be_combined_with_is_refused() -> None:
    with pytest.raises(FormatError, match=r"khot=1, expected one of the two"):
        edgemat.quantize(nn.Sequential(nn.Linear(2, 2)), edgemat.Recipe(weights="ternary", khot=1))
    with pytest.raises(FormatError, match="a learned width"):
        edgemat.quantize(nn.Sequential(nn.Linear(2, 2)), edgemat.Recipe(weights="binary", learn_widths="weights"))
    with pytest.raises(FormatError, match="weights is 'ternary' with ternary='binary'"):
        edgemat.Recipe(weights="ternary", ternary="binary")
    with pytest.raises(FormatError, match="did you mean 'absmean'"):
        edgemat.Recipe(weights="ternary", ternary="absmeen")
    with pytest.raises(FormatError, match="did you mean 'power_of_two'"):
        TernaryLinear(2, 2, scale="power_of_tow")
    with pytest.raises(FormatError, match="2 to 24 bits"):
        edgemat.Recipe(weights="ternary", scale="fixed<30>")
    with pytest.raises(FormatError, match="expected 'power_of_two' or 'free'"):
        TernaryLinear(2, 2, ternary="onebit", scale="fixed<8>")
    layer = TernaryLinear(2, 2, **FIXED)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    with pytest.raises(FormatError, match="not all finite"):
        layer(torch.zeros(1, 2))
