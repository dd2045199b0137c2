"""StatsQ: binary points of weights from 2 * mean|w|."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import edgemat
from edgemat.errors import FormatError
from edgemat.nn import QuantLinear, codes
from edgemat.nn.statistics import StatisticsQuantizer


def expected(row: list[float], width: int) -> int:
    """The definition, on Python floats."""
    mean = math.fsum(abs(v) for v in row) / len(row)
    return width - 1 - round(math.log2(2 * mean))


def test_each_row_follows_its_mean() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 27) * torch.logspace(-4, 4, 40, 2.0).view(-1, 1)
    quantizer = StatisticsQuantizer("fixed<4>", channels=40, axis=0)
    quantizer(weight)
    assert quantizer.exponents().tolist() == [expected(row, 4) for row in weight.tolist()]
    assert len(set(quantizer.exponents().tolist())) > 5
    learned = edgemat.nn.FixedQuantizer("fixed<4>", channels=40, axis=0)
    learned.fit(weight)
    assert learned.exponents().tolist() != quantizer.exponents().tolist()  # min and max say something else


@pytest.mark.parametrize(
    ("mean", "power"),
    [(0.5, 0), (0.25, -1), (0.7071, 0), (0.7072, 1), (0.3535, -1), (0.3536, 0), (1.0, 1), (2.0**-30, -29)],
)
def test_nearest_power_of_two_in_the_logarithm(mean: float, power: int) -> None:
    quantizer = StatisticsQuantizer("fixed<3>")
    quantizer(torch.tensor([mean, -mean, mean]))
    assert quantizer.exponent() == 2 - power


def test_rows_of_zeros_and_a_checkpoint() -> None:
    quantizer = StatisticsQuantizer("fixed<5>", channels=2)
    y = quantizer(torch.tensor([[0.0, 0.0], [1.0, -1.0]]))
    assert quantizer.exponents().tolist() == [4, 3]
    assert y[0].tolist() == [0.0, 0.0]
    other = StatisticsQuantizer("fixed<5>", channels=2)
    other.load_state_dict(quantizer.state_dict())
    assert other.ready and str(other.format) == str(quantizer.format) == "fixed<5,[1,2],RND,SAT>"


def test_the_recipe_key_reaches_every_layer_and_no_optimiser() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    q = edgemat.quantize(model, edgemat.Recipe(weights="fixed<3>", points="statistics"))
    layers = [q.get_submodule(name) for name in ("0", "4")]
    assert [type(layer.weight_quantizer) for layer in layers] == [StatisticsQuantizer] * 2
    assert not any(name.startswith(("0.weight_quantizer", "4.weight_quantizer")) for name, _ in q.named_parameters())
    plain = edgemat.quantize(model, edgemat.Recipe(weights="fixed<3>"))
    assert type(plain.get_submodule("0").weight_quantizer) is not StatisticsQuantizer


def test_training_moves_the_point_and_eval_gives_the_exported_bits(tmp_path) -> None:
    torch.manual_seed(2)
    x, y = torch.randn(128, 6), torch.randint(0, 3, (128,))
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    q = edgemat.quantize(model, edgemat.Recipe(weights="fixed<4>", points="statistics", outputs="fixed<12,5>"))
    edgemat.calibrate(q, [x])
    before = q.get_submodule("0").weight_quantizer.exponents().tolist()
    optimizer = torch.optim.Adam(q.parameters(), lr=0.05)
    q.train()
    for _ in range(40):
        loss = nn.functional.cross_entropy(q(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    q.eval()
    values = q(x).detach()
    layer = q.get_submodule("0")
    after = layer.weight_quantizer.exponents().tolist()
    assert after == [expected(row, 4) for row in layer.weight.tolist()] and after != before
    edgemat.to_onnx(q, x[:2], tmp_path / "net.onnx")
    found = edgemat.Simulator(tmp_path / "net.onnx").codes(x.numpy())
    assert torch.equal(codes(values, "fixed<12,5>"), torch.from_numpy(found).long())


def test_gradient_is_straight_through() -> None:
    quantizer = StatisticsQuantizer("fixed<3>")
    x = torch.tensor([0.1, 0.4, -0.3, 5.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 1.0, 0.0]  # 5.0 lies above the rail of 2 * mean = 2.9 -> 4 * 3/4


@pytest.mark.parametrize(
    ("format", "role"), [("fixed<4,1>", "weights"), ("ufixed<4>", "weights"), ("fixed<4>", "input")]
)
def test_refused(format: str, role: str) -> None:
    with pytest.raises(FormatError, match="expected a signed format of weights"):
        StatisticsQuantizer(format, role=role)


def test_a_direct_layer_takes_it_through_a_spec() -> None:
    from edgemat.recipe import WeightSpec

    layer = QuantLinear(4, 2, weights=WeightSpec(edgemat.Fixed(4, None), points="statistics"), input="fixed<8,3>")
    assert isinstance(layer.weight_quantizer, StatisticsQuantizer)
