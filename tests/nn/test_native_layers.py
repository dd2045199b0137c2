"""Whole layers whose parameters go through one native call, against the general way: bits and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import edgemat
from edgemat.nn import FixedQuantizer, QuantBatchNorm, QuantConv2d, QuantLinear, native, weights
from tests.nn.test_native import SHAPES, both

pytestmark = pytest.mark.skipif(native.load() is None, reason="install gcc for the native passes")


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def step(module: nn.Module, x: Tensor, g: Tensor | None = None) -> list[Tensor]:
    """Output and gradients of one pass."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y) if g is None else g)
    assert x.grad is not None
    return [y.detach(), x.grad, *gradients(module)]


def same(fast: list[Tensor], slow: list[Tensor], count: int = 1) -> None:
    """The first `count` to the bit, the others to their order of summation."""
    for a, b in zip(fast[:count], slow[:count], strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert len(fast) == len(slow)
    for a, b in zip(fast[count:], slow[count:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max() + 1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("features", "width"), [((7, 5), 8), ((600, 3), 8), ((40, 4), 16), ((3, 1), 2)])
def test_a_linear_layer(features: tuple[int, int], width: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = QuantLinear(*features, bias, weights=f"fixed<{width}>", input="fixed<8,1>", output=None)
    x = torch.randn(9, features[0])
    layer(x)
    fast, slow = both(monkeypatch, lambda: step(layer, x))
    same(fast, slow)
    with torch.no_grad():
        layer.weight[0, 0] += 4 * 2.0 ** -float(layer.weight_quantizer.frac.max())
    assert not torch.equal(step(layer, x)[0], slow[0]), "the control: another weight gives other bits"


def test_a_bound_beyond_float32_goes_to_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = QuantLinear(300, 4, weights="fixed<16>", input="fixed<16,1>", output=None)
    x = torch.rand(5, 300)
    layer(x)
    fast, slow = both(monkeypatch, lambda: step(layer, x))
    assert fast[0].dtype == torch.float64
    same(fast, slow)


def test_a_saturated_bias_goes_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantLinear(3, 2, weights="fixed<8>", bias_format="fixed<4>", input="fixed<8,1>", output=None)
    x = torch.rand(5, 3)
    layer(x)
    with torch.no_grad():
        layer.bias.fill_(3.0)
    found = step(layer, x)
    assert torch.equal(found[3], torch.zeros(2)), "a saturated bias has no gradient"
    grids = layer.weight_quantizer.grid, layer.bias, layer.bias_grid
    assert weights.layer_parameters(layer.weight, layer.weight_quantizer.frac, *grids, 7) is None
    same(found, [t.clone() for t in both(monkeypatch, lambda: step(layer, x))[1]])


def test_a_bias_that_is_no_number_goes_the_general_way() -> None:
    layer = QuantLinear(3, 2, weights="fixed<8>", input="fixed<8,1>", output=None)
    layer(torch.rand(5, 3))
    with torch.no_grad():
        layer.bias.fill_(float("nan"))
    grids = layer.weight_quantizer.grid, layer.bias, layer.bias_grid
    assert weights.layer_parameters(layer.weight, layer.weight_quantizer.frac, *grids, 7) is None


class Block(nn.Module):
    """A convolution with batch norm and ReLU."""

    def __init__(self, affine: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, bias=False)
        self.norm = nn.BatchNorm2d(5, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("kind", ["fold", "affine"])
def test_a_block(kind: str, affine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    recipe = edgemat.Recipe(weights="fixed<5>", activations="fixed<5>", outputs="fixed<5>", batch_norm=kind)
    x = torch.randn(4, 3, 9, 9)
    module = edgemat.quantize(Block(affine), recipe)
    edgemat.calibrate(module, [x])
    module.train()
    if affine:
        with torch.no_grad():
            module.norm.weight[1] = 0.0
            module.norm.weight[2] = -1.5
    start = {name: value.clone() for name, value in module.state_dict().items()}

    def run() -> list[Tensor]:
        module.load_state_dict(start)
        return [*step(module, x), module.norm.running_mean.clone(), module.norm.running_var.clone()]

    fast, slow = both(monkeypatch, run)
    same(fast, slow)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_norm_as_an_affine(shape: tuple[int, ...], per_channel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    channels = shape[1]
    layer = QuantBatchNorm(channels, weights="fixed<6>", per_channel=per_channel, input=None, output="fixed<4>")
    source = FixedQuantizer("fixed<8,4>")
    layer.link(source)
    x = source(torch.randn(shape) * 2 + 1).detach()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(channels))
        layer.bias.copy_(torch.randn(channels))
        layer.train()(x)
    start = {name: value.clone() for name, value in layer.state_dict().items()}

    def run() -> list[Tensor]:
        layer.load_state_dict(start)
        return [*step(layer, x), layer.running_mean.clone(), layer.running_var.clone(), layer.num_batches_tracked]

    fast, slow = both(monkeypatch, run)
    same(fast, slow)
    with torch.no_grad():
        start["weight"][0] += 0.5
    assert not torch.equal(run()[0], slow[0]), "the control: another factor gives other bits"


def test_second_derivatives_are_those_of_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = QuantConv2d(2, 3, 3, weights="fixed<4>", input="fixed<8,2>", output="fixed<6>")
    x = torch.randn(2, 2, 5, 5)
    layer(x)

    def run() -> list[Tensor]:
        layer.zero_grad()
        given = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(layer(given).pow(2).sum(), given, create_graph=True)
        first.pow(2).sum().backward()
        return [first.detach(), *gradients(layer)]

    fast, slow = both(monkeypatch, run)
    same(fast, slow, 0)
