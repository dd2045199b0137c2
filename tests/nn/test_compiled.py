"""`torch.compile` of quantised networks: no graph breaks, the bits of eager, and a refusal instead of rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import edgemat
from edgemat.nn import QuantAdd, QuantLinear, compiled, native
from edgemat.nn.rounding import Grid, QuantizeTensor


class Residual(nn.Module):
    """Convolutions with batch norm, a shortcut, pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.branch = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.branch(x))
        return self.head(x.mean((2, 3)))


RECIPES = {
    "folded": {},
    "affine": {"batch_norm": "affine", "every_layer": True},
    "tensor": {"per_channel_weights": False},
    "modes": {"activations": "fixed<5,2,RND_CONV,SAT_SYM>", "weights": "fixed<4,1,TRN,SAT>"},
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 8, 8)
    fields = {"weights": "fixed<5>", "activations": "fixed<5>", **RECIPES[name]}
    module = edgemat.quantize(Residual(), edgemat.Recipe(**fields))
    edgemat.calibrate(module, [x])
    return module, x


def step(module: nn.Module, x: Tensor, source: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    module.zero_grad()
    y = module(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    return y.detach(), {name: p.grad.clone() for name, p in source.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("recipe", "eager"),
    [
        ("folded", False),
        ("affine", False),
        pytest.param("affine", True, marks=pytest.mark.slow),
        pytest.param("tensor", False, marks=pytest.mark.slow),
        pytest.param("modes", False, marks=pytest.mark.slow),
    ],
)
def test_a_step_has_the_bits_of_eager(recipe: str, eager: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if eager:
        monkeypatch.setattr(native, "kernel", lambda *tensors: None)
    module, x = network(recipe)
    edgemat.freeze_batch_norm(module)
    twin = copy.deepcopy(module)
    fast = torch.compile(module, backend="aot_eager")
    module.train(), twin.train()
    (y, grads), (expected, others) = step(fast, x, module), step(twin, x, twin)
    assert torch.equal(y, expected)
    assert set(grads) == set(others)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, others[name], rtol=1e-3, atol=1e-4 * float(others[name].abs().max() + 1))
    module.eval(), twin.eval()
    fast = torch.compile(module, backend="aot_eager")
    assert torch.equal(fast(x), twin(x))
    with torch.no_grad():
        twin.head.bias[0] += 0.125
    assert not torch.equal(fast(x), twin(x)), "the control: another bias gives other bits"


@pytest.mark.parametrize("recipe", ["folded", "affine"])
def test_a_step_with_the_statistics_of_the_batch(recipe: str) -> None:
    """The compiler sums statistics in another order: almost all values are the same, running statistics nearly so."""
    module, x = network(recipe)
    twin = copy.deepcopy(module)
    fast = torch.compile(module, backend="aot_eager", fullgraph=True)
    module.train(), twin.train()
    (y, grads), (expected, others) = step(fast, x, module), step(twin, x, twin)
    assert float((y - expected).abs().mean()) < 0.01 * float(expected.abs().mean())
    assert set(grads) == set(others)
    for name, grad in grads.items():
        off = float((grad - others[name]).norm())
        assert off <= 0.05 * float(others[name].norm() + 1e-2), name
    for (name, a), b in zip(module.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_a_bounded_accumulator_trains_behind_a_batch_norm() -> None:
    """The bound reads running statistics that the same step moves, in a graph of its own."""
    torch.manual_seed(0)
    x = torch.randn(4, 2, 3, 3)
    recipe = edgemat.Recipe(input="fixed<6,3>", accumulator=18)
    module = edgemat.quantize(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)), recipe)
    edgemat.calibrate(module, [x])
    twin = copy.deepcopy(module).train()
    (y, grads), (expected, others) = (
        step(torch.compile(module.train(), backend="aot_eager"), x, module),
        step(twin, x, twin),
    )
    assert torch.equal(y, expected)
    for name, grad in others.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5)


def test_binary_points_that_move_are_seen() -> None:
    module, x = network("folded")
    module.eval()
    fast = torch.compile(module, backend="aot_eager")
    before = fast(x)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("frac"):
                p.sub_(2.0)
    after = fast(x)
    assert torch.equal(after, module(x)) and not torch.equal(after, before)


def test_autocast_leaves_the_bits_alone() -> None:
    module, x = network("folded")
    module.eval()
    fast = torch.compile(module, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), module(x))
    assert torch.equal(fast(x), module(x))


@pytest.mark.slow
def test_inductor_has_the_bits_of_eager() -> None:
    module, x = network("affine")
    edgemat.freeze_batch_norm(module)
    twin = copy.deepcopy(module)
    module.train(), twin.train()
    assert torch.equal(step(torch.compile(module), x, module)[0], step(twin, x, twin)[0])
    module.eval(), twin.eval()
    assert torch.equal(torch.compile(module)(x), twin(x))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "text",
    ["fixed<5>", "ufixed<4>", "fixed<5,,RND_CONV,SAT_SYM>", "fixed<4,,TRN,SAT>", "fixed<6,,RND_INF,SAT_ZERO>"],
)
def test_a_quantiser_and_its_gradients(text: str, relu: bool) -> None:
    """Ties, rails and their neighbours, in plain operations and in the eager function."""
    grid = Grid.of(edgemat.Fixed.parse(text.replace(",,", ",0,")))
    values = torch.arange(-40, 80).float() / 2
    near = torch.cat([values, torch.nextafter(values, torch.tensor(99.0)), torch.nextafter(values, -values - 99)]) / 8
    found = []
    for run in (
        lambda x, f: compiled.quantize(x, f, grid, relu),
        lambda x, f: QuantizeTensor.apply(x, f, grid, 3, relu),
    ):
        x, frac = near.clone().view(-1, 3).requires_grad_(), torch.tensor(3.0, requires_grad=True)
        y = run(x, frac)
        y.backward(torch.linspace(0.5, 1.5, y.numel()).view_as(y))
        found.append((y.detach(), x.grad, frac.grad))
    (y, dx, df), (expected, other, point) = found
    assert torch.equal(y, expected) and torch.equal(dx, other)
    torch.testing.assert_close(df, point, rtol=1e-4, atol=1e-3)


def test_a_sum_beyond_the_carrier_is_refused() -> None:
    layer = QuantLinear(4, 2, weights="fixed<8>", input="fixed<8,1>", output=None)
    layer(torch.rand(3, 4))
    with torch.no_grad():
        layer.bias.fill_(2000.0)
    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="partial sums of 16777216"):
        fast(torch.rand(3, 4))
    with torch.no_grad():
        layer.bias.fill_(1.0)
    x = torch.rand(3, 4)
    assert torch.equal(fast(x), layer(x))


def test_a_saturated_bias_is_refused() -> None:
    layer = QuantLinear(4, 2, weights="fixed<8>", bias_format="fixed<12>", input="fixed<8,1>", output=None)
    layer(torch.rand(3, 4))
    with torch.no_grad():
        layer.bias.fill_(2000.0)
    with pytest.raises(RuntimeError, match="saturates its 12 bits"):
        torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.rand(3, 4))


def test_operands_too_far_apart_are_refused() -> None:
    points = torch.tensor(20.0), torch.tensor(3.0)
    with pytest.raises(RuntimeError, match="binary points more than 15 bits apart"):
        compiled.aligned_sum(torch.ones(2), torch.ones(2), *points, 255, 1)
    near = torch.tensor(4.0), torch.tensor(3.0)
    assert torch.equal(compiled.aligned_sum(torch.ones(2), torch.ones(2), *near, 256, -1), torch.zeros(2))
    assert QuantAdd.sign == 1


def test_a_binary_point_out_of_range_is_refused() -> None:
    grid = Grid.of(edgemat.Fixed(4))
    with pytest.raises(RuntimeError, match="lower the learning rate"):
        compiled.quantize(torch.ones(3), torch.tensor(130.0), grid)
    with pytest.raises(RuntimeError, match="lower the learning rate"):
        compiled.quantize(torch.ones(3), torch.tensor(float("nan")), grid)
