"""Brevitas models: what the Simulator computes of the imported file is what torch computes of the model."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
brevitas = pytest.importorskip("brevitas", reason="pip install edgemat[brevitas]")

import brevitas.nn as qnn  # noqa: E402
from brevitas.inject import ExtendedInjector  # noqa: E402
from brevitas.proxy import ActQuantProxyFromInjector  # noqa: E402
from brevitas.quant import (  # noqa: E402
    Int8ActPerTensorFixedPoint,
    Int16Bias,
    SignedBinaryActPerTensorConst,
    SignedBinaryWeightPerTensorConst,
    SignedTernaryActPerTensorConst,
    SignedTernaryWeightPerTensorConst,
)
from torch import nn  # noqa: E402

import edgemat  # noqa: E402
from edgemat.brevitas.conversion import to_onnx  # noqa: E402
from edgemat.errors import LoweringError, UnsupportedOpError  # noqa: E402

from .brevitas_models import FLOATS, KINDS, PIXELS, POWERS, Branches, plain, trained  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SAMPLES = 128


def outputs(model: nn.Module, x: torch.Tensor) -> dict[str, np.ndarray]:
    """What torch computes, by output."""
    with torch.no_grad():
        found = model(x)
    found = found if isinstance(found, dict) else {"output": plain(found)}
    return {name: y.numpy() for name, y in found.items()}


def simulated(path: Path, x: torch.Tensor) -> dict[str, np.ndarray]:
    """What the Simulator computes of the file."""
    found = edgemat.Simulator(path)(x.numpy())
    return found if isinstance(found, dict) else {"output": found}


def rates(model: nn.Module, path: Path, x: torch.Tensor) -> dict[str, float]:
    """Share of equal elements, by output; float32's own rounding of a product of scales is no difference."""
    wanted, found = outputs(model, x), simulated(path, x)
    assert wanted.keys() == found.keys()
    close = {name: np.abs(y - found[name]) <= 2e-6 * np.abs(y).max() for name, y in wanted.items()}
    return {name: float(same.mean()) for name, same in close.items()}


SOME = ("linear", "linear_by_channel", "sigmoid", "transpose2d", "batch_norm", "sum", "average_round", "shifted")


@pytest.mark.parametrize(
    ("scales", "names"),
    [("powers of two", ()), ("real scales", SOME), pytest.param("real scales", (), marks=pytest.mark.slow)],
)
def test_every_layer_by_every_kind_of_scale(scales: str, names: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = trained(Branches(KINDS[scales], names), *PIXELS)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x, path = 2 * torch.randn(SAMPLES, *PIXELS), tmp_path / "net.onnx"
    to_onnx(model, x[:2], path)
    assert not model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    found = rates(model, path, x)
    print({name: rate for name, rate in found.items() if rate < 1})
    if KINDS[scales] is POWERS:
        wanted, got = outputs(model, x), simulated(path, x)
        different = {name for name, y in wanted.items() if not np.array_equal(y, got[name])}
        assert different <= {"average_all", "batch_norm"}  # real numbers: an average of 36 pixels, a gain
    assert {name: rate for name, rate in found.items() if rate < 0.999} == {}


@pytest.mark.parametrize("kind", ["binary", "ternary"])
def test_binary_and_ternary_all_the_way(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    act = SignedBinaryActPerTensorConst if kind == "binary" else SignedTernaryActPerTensorConst
    weight = SignedBinaryWeightPerTensorConst if kind == "binary" else SignedTernaryWeightPerTensorConst
    layers = [
        qnn.QuantIdentity(act_quant=act, return_quant_tensor=True),
        qnn.QuantLinear(32, 24, bias=False, weight_quant=weight, weight_scaling_const=0.25),
        nn.BatchNorm1d(24),
        qnn.QuantIdentity(act_quant=act, return_quant_tensor=True),
        qnn.QuantLinear(24, 10, bias=False, weight_quant=weight, weight_scaling_const=0.25),
    ]
    model, x, path = trained(nn.Sequential(*layers), 32), torch.randn(SAMPLES, 32), tmp_path / "net.onnx"
    to_onnx(model, x[:2], path)
    assert np.array_equal(outputs(model, x)["output"], simulated(path, x)["output"])


def test_one_rounding_mode_or_one_scale_changed_is_seen(tmp_path: Path) -> None:
    """The control: the file of a model that rounds or scales a little differently is not equal."""
    torch.manual_seed(3)
    names = ("linear_output", "floor", "sigmoid")
    model, path = trained(Branches(POWERS, names), *PIXELS), tmp_path / "net.onnx"
    x = 2 * torch.randn(SAMPLES, *PIXELS)
    other = copy.deepcopy(model)
    quantiser = other.branches["floor"][2].act_quant.fused_activation_quant_proxy.tensor_quant.int_quant
    quantiser.float_to_int_impl = brevitas.core.function_wrapper.CeilSte()
    with torch.no_grad():
        other.branches["linear_output"][1].weight.mul_(2.0)
    to_onnx(other, x[:2], path)
    found = rates(model, path, x)
    assert found["sigmoid"] == 1
    assert found["floor"] < 0.9 and found["linear_output"] < 0.9
    assert set(rates(other, path, x).values()) == {1.0}


def test_inputs_that_the_model_does_not_quantise(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = nn.Sequential(qnn.QuantLinear(8, 4, weight_quant=POWERS.weight, bias=False)).eval()
    x, path = torch.arange(64.0).reshape(8, 8) / 256, tmp_path / "net.onnx"
    with pytest.raises(LoweringError, match="state its format"):
        to_onnx(model, x, path)
    to_onnx(model, x, path, inputs={"input": "ufixed<8,0>"})
    assert np.array_equal(outputs(model, x)["output"], simulated(path, x)["output"])


class Twice(nn.Module):
    """One layer used on two scales, so that its bias has two; two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = qnn.QuantIdentity(act_quant=POWERS.signed, return_quant_tensor=True)
        self.second = qnn.QuantIdentity(act_quant=POWERS.signed, bit_width=5, return_quant_tensor=True)
        self.layer = qnn.QuantLinear(8, 8, weight_quant=POWERS.weight, bias_quant=Int16Bias)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": plain(self.layer(self.first(x))), "y": plain(self.layer(self.second(y)))}


def test_a_layer_used_twice_and_two_inputs(tmp_path: Path) -> None:
    torch.manual_seed(6)
    model, x, y = Twice(), torch.randn(64, 8), 16 * torch.randn(64, 8)
    model.train()(x, y)
    model.eval()
    to_onnx(model, {"y": y[:2], "x": x[:2]}, tmp_path / "net.onnx")
    with torch.no_grad():
        wanted = model(x, y)
    found = edgemat.Simulator(tmp_path / "net.onnx")({"x": x.numpy(), "y": y.numpy()})
    assert {name: np.array_equal(z.numpy(), found[f"{name}_output"]) for name, z in wanted.items()} == {
        "x": True,
        "y": True,
    }


class OfTheData(nn.Module):
    """A quantiser whose scale is found at run time."""

    def __init__(self) -> None:  # Brevitas' injector reads the signature
        super().__init__()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scale = x.abs().max() / 127
        return torch.round(x / scale) * scale, scale, torch.tensor(0.0), torch.tensor(8.0)


class HalfUp(nn.Module):
    """A quantiser that rounds halves up, which QONNX has no name for."""

    def __init__(self) -> None:  # Brevitas' injector reads the signature
        super().__init__()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = torch.floor(x * 16 + 0.5).clamp(-128, 127) / 16
        return y, torch.tensor(1 / 16), torch.tensor(0.0), torch.tensor(8.0)


class Own(ExtendedInjector):
    """Brevitas' form of a user's quantiser."""

    proxy_class = ActQuantProxyFromInjector
    signed = True
    narrow_range = False


def test_what_is_refused_is_named(tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", torch.randn(2, 8)
    with pytest.raises(UnsupportedOpError, match="no Brevitas quantiser"):
        to_onnx(nn.Sequential(nn.Linear(8, 4)), x, path)
    with pytest.raises(UnsupportedOpError, match=r"layer '0\.layers\.0\.0' is a recurrent one"):
        to_onnx(nn.Sequential(qnn.QuantLSTM(8, 4)), x[None], path)
    with pytest.raises(LoweringError, match="got a str"):
        to_onnx("model", x, path)  # type: ignore[arg-type]
    model = nn.Sequential(qnn.QuantIdentity(act_quant=Int8ActPerTensorFixedPoint), qnn.QuantLinear(8, 4))
    with pytest.raises(LoweringError, match="does not run on the example input"):
        to_onnx(model, torch.randn(2, 7), path)
    from brevitas.quant.float import Fp8e4m3WeightPerTensorFloat

    model = nn.Sequential(qnn.QuantLinear(8, 4, weight_quant=Fp8e4m3WeightPerTensorFloat))
    with pytest.raises(UnsupportedOpError, match="expected integers with one scale"):
        to_onnx(model, x, path)
    for own, message in ((OfTheData, "takes its scale from the data"), (HalfUp, "rounds in a way of its own")):
        quantiser = type("Own", (Own,), {"tensor_quant": own})
        with pytest.raises(UnsupportedOpError, match=message):
            to_onnx(nn.Sequential(qnn.QuantIdentity(act_quant=quantiser)), x, path)
    assert not path.exists()


def test_real_scales_are_not_taken_for_powers_of_two(tmp_path: Path) -> None:
    """The control of the table of kinds: the two kinds of quantisers differ in what they export."""
    torch.manual_seed(5)
    model = trained(Branches(FLOATS, ("linear_output",)), *PIXELS)
    assert float(torch.frexp(model.enter.act_quant.scale())[0]) != 0.5
