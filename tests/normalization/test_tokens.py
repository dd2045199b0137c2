"""Activations scaled by row: the definition, torch against the exported file, gradients, and what export refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import edgemat
from edgemat.errors import EdgematError, FormatError
from edgemat.lower.reader import read
from edgemat.nn import MatMulFreeLM, QuantLinear, TernaryLinear, TokenQuantizer
from edgemat.nn.token_quantizer import row_exponents
from edgemat.op import Call
from edgemat.ops import BY_NAME
from edgemat.ops.cases import tensor
from edgemat.sim import Simulator
from tests.normalization.definition import token_exponent
from tests.normalization.test_norms import rows


@pytest.mark.parametrize("width", [2, 5, 8])
def test_every_power_of_two_and_its_neighbours(width: int) -> None:
    codes = np.array(
        [[s * (2**k + d), 0] for k in range(15) for d in (-1, 0, 1) for s in (1, -1)] + [[0, 0], [-32768, 1]]
    )
    call = Call(BY_NAME["TokenExponent"], "e", [tensor("fixed<16,4>", (None, 2))], {"width": width})
    found = call.op.reference(call, codes)
    expected = [[token_exponent(row, width)] for row in codes.tolist()]
    assert found.tolist() == expected
    assert row_exponents(torch.from_numpy(codes).float(), width).tolist() == expected
    assert found.tolist() != [[token_exponent(row, width + 1)] for row in codes.tolist()]


def test_the_largest_code_rounds_up_into_saturation() -> None:
    exponents = tensor("ufixed<4,4>", (None, 1), "e", 0, 4)
    call = Call(
        BY_NAME["TokenQuantize"], "q", [tensor("fixed<12,4>", (None, 2)), exponents], {"y_format": "fixed<8,0>"}
    )
    found = call.op.reference(call, np.array([[255, -256], [255, -255], [0, 3]]), np.array([[1], [1], [0]]))
    assert found.tolist() == [[127, -128], [127, -127], [0, 3]]


def test_what_cannot_be_meant_is_refused() -> None:
    x, e = tensor("fixed<12,4>", (None, 2)), tensor("ufixed<4,4>", (None, 1), "e", 0, 4)
    for op, operands, attrs, word in (
        ("TokenExponent", [x], {"width": 1}, "2 to 32"),
        ("TokenQuantize", [x, e], {"y_format": "fixed<8,1>"}, "8 fractional bits"),
        ("TokenQuantize", [x, tensor("fixed<4,4>", (None, 1))], {"y_format": "fixed<8,0>"}, "integers from 0"),
        ("TokenRescale", [x, tensor("ufixed<4,4>", (None, 2))], {}, "one for each row"),
        ("TokenRescale", [tensor("fixed<50,4>", (None, 2)), tensor("ufixed<5,5>", (None, 1))], {}, "63 bits"),
    ):
        with pytest.raises(EdgematError, match=word):
            _ = Call(BY_NAME[op], "n", operands, attrs).y


def scaled(layer: type = TernaryLinear, **options) -> QuantLinear:
    torch.manual_seed(0)
    settings = {"tokens": "fixed<6>", "input": "fixed<16,8>", "output": "fixed<16>", **options}
    return layer(24, 7, bias=False, **settings)


@pytest.mark.parametrize("layer", [TernaryLinear, QuantLinear])
@pytest.mark.parametrize("shape", [(30, 24), (8, 3, 24)])
@pytest.mark.parametrize("rounding", ["RND", "RND_CONV", "TRN"])
def test_training_eval_and_the_file_give_the_same_codes(layer, shape, rounding, tmp_path) -> None:
    net, x = nn.Sequential(scaled(layer, tokens=f"fixed<6,{rounding},SAT>")), rows(*shape)
    net(x)
    trained = net(x).detach()
    net.eval()
    assert torch.equal(net(x), trained)
    edgemat.to_onnx(net, (x,), tmp_path / "net.onnx")
    assert {"TokenExponent", "TokenQuantize", "TokenRescale"} <= {c.op.name for c in read(tmp_path / "net.onnx").nodes}
    found = Simulator(tmp_path / "net.onnx")(x.numpy())
    found = next(iter(found.values())) if isinstance(found, dict) else found
    assert np.array_equal(np.asarray(found), trained.numpy())
    other = nn.Sequential(scaled(layer, tokens="fixed<5>"))
    other(x)
    assert not np.array_equal(np.asarray(found), other.eval()(x).detach().numpy())


def test_gradients_pass_straight_through() -> None:
    layer = scaled()
    x = torch.randn(9, 24, requires_grad=True)
    layer(x)
    y = layer(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    weight = layer.weight_quantizer(layer.weight).detach().sum(0)
    assert torch.allclose(dx, weight.expand_as(dx), atol=1e-5)


def test_a_checkpoint_of_another_binary_point_loads() -> None:
    made = TokenQuantizer(8, input="fixed<16>")
    made(torch.randn(4, 8) * 100)
    fresh = TokenQuantizer(8, input="fixed<16>")
    fresh.load_state_dict(made.state_dict())
    x = torch.randn(5, 8) * 50
    assert all(torch.equal(a, b) for a, b in zip(fresh(x), made(x), strict=True))


def test_the_published_division_trains_and_is_refused_at_export(tmp_path) -> None:
    net = nn.Sequential(scaled(token_scale="absmax"))
    x = torch.randn(9, 24, requires_grad=True)
    net(x)
    net(x).square().sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
    with pytest.raises(FormatError, match="floating point"):
        edgemat.to_onnx(net, (x.detach(),), tmp_path / "net.onnx")


def test_misuse_is_refused() -> None:
    with pytest.raises(FormatError, match="bias=False"):
        QuantLinear(4, 3, tokens="fixed<8>")
    with pytest.raises(FormatError, match="power_of_two, absmax"):
        TokenQuantizer(8, scale="float")
    with pytest.raises(FormatError, match="2 to 24"):
        TokenQuantizer(1)
    for scale in ("absmax", "x"):
        with pytest.raises(FormatError, match=rf"a QuantLinear has token_scale='{scale}' and no tokens .*'fixed<8>'"):
            QuantLinear(4, 3, bias=False, token_scale=scale)
        with pytest.raises(FormatError, match=rf"token_scale='{scale}' and no tokens"):
            MatMulFreeLM(5, 4, 1, hidden=8, token_scale=scale)
    with pytest.raises(FormatError, match=r"Recipe: token_scale is 'absmax' and no layer has tokens"):
        edgemat.Recipe(rules={"first": {"token_scale": "absmax"}})
    edgemat.Recipe(token_scale="absmax", rules={"first": {"tokens": "fixed<8>"}})


class Rows(nn.Module):
    """A norm and two layers without bias, as they are found in a float network."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.RMSNorm(12), nn.Linear(12, 16, bias=False), nn.Linear(16, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.norm(x)).relu())


@pytest.mark.parametrize("shape", [(20, 12), (6, 3, 12)])
@pytest.mark.parametrize("settings", [{"weights": "ternary"}, {"weights": "ternary", "scale": "fixed<6>"}, {}])
def test_a_recipe_gives_tokens_scales(shape, settings, tmp_path) -> None:
    torch.manual_seed(2)
    recipe = edgemat.Recipe(activations="fixed<14>", tokens="fixed<6>", **settings)
    assert edgemat.Recipe.from_toml(recipe.to_toml()) == recipe
    x = 3 * torch.randn(*shape)
    q = edgemat.calibrate(edgemat.quantize(Rows(), recipe), [x])
    q.train()(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in q.parameters() if parameter.requires_grad)
    trained = q(x).detach()
    assert torch.equal(q.eval()(x), trained)
    edgemat.to_onnx(q, (x,), tmp_path / "net.onnx")
    assert np.array_equal(Simulator(tmp_path / "net.onnx")(x.numpy()), trained.numpy())
    ops = [call.op.name for call in read(tmp_path / "net.onnx").nodes]
    assert ops.count("TokenQuantize") == ops.count("Linear") == 2
    without = edgemat.quantize(Rows(), edgemat.Recipe(tokens="fixed<6>", types={"Linear": {"tokens": None}}))
    assert not any(isinstance(part, TokenQuantizer) for part in without.modules())


def test_a_recipe_refuses_tokens_where_they_cannot_be_scaled() -> None:
    recipe = edgemat.Recipe(tokens="fixed<8>")
    with pytest.raises(EdgematError, match=r"module 0 \(Linear\) is a Linear with a bias .* tokens=None in a rule"):
        edgemat.quantize(nn.Sequential(nn.Linear(3, 2)), recipe)
    with pytest.raises(EdgematError, match=r"is a Conv1d and has tokens"):
        edgemat.quantize(nn.Sequential(nn.Conv1d(3, 2, 1)), recipe)
    for wrong in ("fixed<8,3>", "ufixed<8>", "fixed<25>", "bipolar", "fixed<8,RND,WRAP>"):
        with pytest.raises(FormatError, match=r"tokens is .*expected"):
            edgemat.Recipe(tokens=wrong)
    with pytest.raises(FormatError, match="did you mean 'absmax'"):
        edgemat.Recipe(token_scale="absmx")
