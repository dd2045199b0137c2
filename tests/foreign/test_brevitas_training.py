"""edgemat's quantisers inside Brevitas layers, and a Brevitas network of real digits on every backend."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("brevitas", reason="pip install edgemat[brevitas]")

import brevitas.nn as qnn  # noqa: E402
from brevitas.export import export_qonnx  # noqa: E402
from brevitas.quant import (  # noqa: E402
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int16Bias,
    Uint8ActPerTensorFloat,
)
from torch import nn  # noqa: E402

import edgemat  # noqa: E402
from edgemat.brevitas import QFXActivation, QFXWeight, to_onnx  # noqa: E402
from edgemat.errors import FormatError  # noqa: E402
from edgemat.foreign.importing import import_onnx  # noqa: E402
from edgemat.nn.quantizer import FixedQuantizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class SixBits(QFXActivation):
    """A width as a class attribute."""

    bit_width = 6


class Digits(nn.Module):
    """Two convolutions and a linear layer for images [1, 14, 14].

    Args:
        weight: Brevitas quantiser of the weights.
        signed: Of the input.
        unsigned: Of what follows a ReLU.
        norm: What follows the second convolution.
        by_channel: Keyword that `weight` takes for a binary point by channel.
    """

    def __init__(self, weight: type, signed: type, unsigned: type, norm: nn.Module, **by_channel: bool) -> None:
        super().__init__()
        bits = {"weight_quant": weight, "weight_bit_width": 5, **by_channel}
        self.enter = qnn.QuantIdentity(act_quant=signed, return_quant_tensor=True)
        self.conv1 = qnn.QuantConv2d(1, 6, 3, stride=2, bias_quant=Int16Bias, **bits)
        self.act1 = qnn.QuantReLU(act_quant=unsigned, bit_width=4, return_quant_tensor=True)
        self.conv2 = qnn.QuantConv2d(6, 12, 3, bias=False, **bits)
        self.norm = norm
        self.act2 = qnn.QuantReLU(act_quant=unsigned, return_quant_tensor=True)
        self.pool = nn.MaxPool2d(2)
        self.head = qnn.QuantLinear(48, 10, bias_quant=Int16Bias, **bits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, 10]."""
        x = self.act1(self.conv1(self.enter(x)))
        return self.head(self.pool(self.act2(self.norm(self.conv2(x)))).flatten(1))


def standard() -> Digits:
    """Brevitas' own quantisers, real scales, a batch norm."""
    return Digits(Int8WeightPerChannelFloat, Int8ActPerTensorFloat, Uint8ActPerTensorFloat, nn.BatchNorm2d(12))


def learned() -> Digits:
    """edgemat's quantisers, learned binary points."""
    return Digits(QFXWeight, QFXActivation, SixBits, nn.Identity(), weight_scaling_per_output_channel=True)


@pytest.fixture(scope="module")
def digits(data_dir: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every other pixel of MNIST: images, labels, test images, test labels."""
    with np.load(data_dir / "mnist" / "mnist.npz") as z:
        parts = [z[f"x_{split}"][:2048, None, ::2, ::2] / np.float32(256) for split in ("train", "test")]
        labels = [z[f"y_{split}"][:2048].astype(np.int64) for split in ("train", "test")]
    return tuple(torch.from_numpy(a) for a in (parts[0], labels[0], parts[1], labels[1]))  # type: ignore[return-value]


def fitted(model: nn.Module, x: torch.Tensor, labels: torch.Tensor, epochs: int = 1) -> list[float]:
    """Trains with batches of 64; the losses."""
    model.train()
    optimizer, losses = torch.optim.Adam(model.parameters(), 5e-3), []
    for start in epochs * list(range(0, len(x), 64)):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[start : start + 64]), labels[start : start + 64])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def points(model: nn.Module) -> dict[str, torch.Tensor]:
    """The learned binary points, by name."""
    parts = model.named_modules()
    return {name: part.frac.detach().clone() for name, part in parts if isinstance(part, FixedQuantizer)}


@pytest.mark.parametrize("make", [standard, learned])
def test_digits_on_every_backend(make, digits, tmp_path: Path, cc, cxx, ap_headers) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model, (x, labels, test, answers) = make(), digits
    model.train()(x[:64])
    before = points(model)
    losses = fitted(model, x, labels, epochs=3)
    assert np.mean(losses[-4:]) < 0.5 * losses[0]
    moved = {name: not torch.equal(frac, before[name]) for name, frac in points(model).items()}
    assert all(moved.values()) and len(moved) == (6 if make is learned else 0)
    path = tmp_path / "digits.onnx"
    report = to_onnx(model, test[:2], path)
    assert report.inexact == []
    with torch.no_grad():
        wanted = model(test).numpy()
    found = edgemat.Simulator(path)(test.numpy())
    assert float((wanted.argmax(1) == answers.numpy()).mean()) > 0.7
    assert np.array_equal(wanted.argmax(1), found.argmax(1))
    close = np.abs(wanted - found) <= 2e-6 * np.abs(wanted).max()
    print(f"{make.__name__}: {close.mean():.5f} of the logits equal")
    assert np.array_equal(wanted, found) if make is learned else close.mean() > 0.999
    backends = ["reference", "onnx", "mcu", "hls"] if make is standard else ["reference", "onnx"]
    verified = edgemat.verify(path, test[:24].numpy(), backends=backends)
    assert verified.ok and {row.status for row in verified.backends.values()} == {"exact"}


def test_a_binary_point_moved_by_one_is_seen(tmp_path: Path) -> None:
    """The control: the file of a model with one binary point beside the learned one is not equal."""
    torch.manual_seed(1)
    model, x = learned(), torch.rand(64, 1, 14, 14)
    model.train()(x)
    model.eval()
    other = copy.deepcopy(model)
    quantiser = other.act1.act_quant.fused_activation_quant_proxy.tensor_quant.points
    quantiser.set_frac(quantiser.frac.detach() + 1)
    found = []
    for name, source in (("same", model), ("other", other)):
        to_onnx(source, x[:2], tmp_path / f"{name}.onnx")
        found.append(edgemat.Simulator(tmp_path / f"{name}.onnx")(x.numpy()))
    with torch.no_grad():
        wanted = model(x).numpy()
    assert np.array_equal(wanted, found[0]) and not np.array_equal(wanted, found[1])


def test_state_dict_and_widths(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model, x = learned(), torch.rand(64, 1, 14, 14)
    with pytest.raises(FormatError, match="no binary point yet"):
        model.eval()(x)
    fitted(model, x.repeat(4, 1, 1, 1), torch.arange(256) % 10)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    twin = learned().eval()
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(model(x), twin(x))
    assert points(model).keys() == points(twin).keys()
    weights = model.conv1.quant_weight()
    assert int(weights.bit_width) == 5 and weights.scale.shape == (6, 1, 1, 1) and weights.is_valid
    acts = model.act1(model.conv1(model.enter(x)))
    assert int(acts.bit_width) == 4 and not acts.signed and acts.is_valid
    assert torch.equal(weights.int() * weights.scale, weights.value)
    with pytest.raises(FormatError, match="bit_width is 40"):
        qnn.QuantLinear(4, 4, weight_quant=QFXWeight, weight_bit_width=40)
    with pytest.raises(FormatError, match="narrow_range is set for unsigned"):
        qnn.QuantReLU(act_quant=QFXActivation, narrow_range=True)


def test_calibration_and_brevitas_own_export(tmp_path: Path) -> None:
    """`edgemat.calibrate` sets the points; a QONNX file that Brevitas writes of the model is the model."""
    pytest.importorskip("onnxoptimizer", reason="Brevitas' exporters need it: pip install onnxoptimizer")
    torch.manual_seed(3)
    model, x = learned(), torch.rand(64, 1, 14, 14)
    edgemat.calibrate(model, [x])
    model.eval()
    names = {"input_names": ["x"], "dynamic_axes": {"x": {0: "N"}}}
    export_qonnx(copy.deepcopy(model), args=x[:1], export_path=str(tmp_path / "qonnx.onnx"), dynamo=False, **names)
    import_onnx(tmp_path / "qonnx.onnx", tmp_path / "net.onnx")
    with torch.no_grad():
        wanted = model(x).numpy()
    assert np.array_equal(wanted, edgemat.Simulator(tmp_path / "net.onnx")(x.numpy()))


def test_the_gradient_is_edgemats() -> None:
    """Weights and binary points get the gradients of `FixedQuantizer` alone."""
    torch.manual_seed(4)
    layer = qnn.QuantLinear(8, 4, bias=False, weight_quant=QFXWeight, weight_bit_width=3)
    alone = FixedQuantizer(edgemat.Fixed(3, None, True, "RND_CONV", "SAT"), role="weights")
    x, weight = torch.randn(16, 8), layer.weight.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    alone.fit(weight)
    nn.functional.linear(x, alone(weight)).square().sum().backward()
    learned_point = layer.weight_quant.tensor_quant.points.frac
    assert torch.equal(layer.weight.grad, weight.grad) and torch.equal(learned_point.grad, alone.frac.grad)
    assert float(alone.frac.grad) != 0
