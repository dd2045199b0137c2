"""Bipolar weights and activations in the torch layers: values, gradients, conversion, checkpoints, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import edgemat
from edgemat.errors import FormatError, LoweringError, UnsupportedOpError
from edgemat.formats import BIPOLAR, Fixed
from edgemat.nn import (
    BipolarQuantizer,
    QuantBatchNorm,
    QuantConv1d,
    QuantConv2d,
    QuantLinear,
    QuantReLU,
    ThermometerEncoding,
    clip_latent_weights,
)
from edgemat.report.inspection import inspect
from edgemat.verification.verify import verify

RECIPE = {"input": "fixed<8,3>", "weights": "bipolar", "activations": "bipolar", "last": {"weights": "fixed<8>"}}


def network(bias: bool = False) -> nn.Sequential:
    """Strides, groups, depthwise, pooling between a layer and its batch norm, a binary linear layer."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=bias), nn.BatchNorm2d(8), nn.Hardtanh(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2, bias=bias), nn.BatchNorm2d(16),
        nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=16, bias=bias), nn.MaxPool2d(2), nn.BatchNorm2d(16),
        nn.Flatten(), nn.Linear(64, 6, bias=bias), nn.BatchNorm1d(6), nn.Linear(6, 3),
    )  # fmt: skip


def converted(bias: bool = False, **changes: object) -> tuple[torch.fx.GraphModule, torch.Tensor]:
    """The quantised network after a step of training, in eval mode, and its inputs."""
    q = edgemat.quantize(network(bias), edgemat.Recipe(**{**RECIPE, **changes}))
    x = torch.randn(24, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    edgemat.calibrate(q, [x])
    optimizer = torch.optim.SGD(q.parameters(), lr=0.05)
    for _ in range(2):
        q(x).square().mean().backward()
        optimizer.step()
    return q.eval(), x


def test_signs_and_their_gradient() -> None:
    q = BipolarQuantizer()
    x = torch.tensor([-2.0, -1.0, -0.25, -0.0, 0.0, 1e-30, 1.0, 1.0001, 7.0], requires_grad=True)
    y = q(x)
    assert y.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1, 1]
    y.backward(torch.arange(1.0, 10.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 7, 0, 0]  # both ends of [-1, 1] included
    assert q.codes(y).tolist() == y.tolist() and q.format == BIPOLAR
    assert torch.tensor([-1e-45]).double().float().item() < 0 and q(torch.tensor([-1e-45])).item() == -1


def test_latent_weights_are_clipped_where_weights_are_bipolar_only() -> None:
    net = nn.Sequential(QuantLinear(3, 2, weights="bipolar"), QuantLinear(2, 2, weights="fixed<4>"))
    with torch.no_grad():
        net[0].weight.fill_(-3.0)
        net[1].weight.fill_(-3.0)
    clip_latent_weights(net)
    assert net[0].weight.unique().tolist() == [-1] and net[1].weight.unique().tolist() == [-3]


@pytest.mark.parametrize("bias", [False, True])
def test_a_binary_network_is_the_same_on_every_backend(bias, tmp_path) -> None:
    q, x = converted(bias)
    edgemat.to_onnx(q, x[:2], tmp_path / "net.onnx")
    report = verify(tmp_path / "net.onnx", x.numpy(), module=q, backends=("reference", "onnx", "mcu"))
    assert report.ok, report.to_dict()
    assert report.backends["torch"].compared > 0 and report.overflow_proved
    nodes = inspect(tmp_path / "net.onnx").nodes
    convolutions = [n for n in nodes if n.operator == "Conv"]
    assert [n.multiplies for n in convolutions] == [0, 0, 0] and all(n.additions for n in convolutions)
    signs = [n for n in nodes if n.outputs[0].format == "bipolar"]
    assert len(signs) >= 4


@pytest.mark.parametrize(
    ("up", "weights", "multiplies"),
    [
        ([nn.ConvTranspose2d(2, 4, 2, stride=2, bias=False)], {"weights": "bipolar"}, 2 * 4 * 2 * 2 * 16),
        ([nn.ConvTranspose2d(2, 4, 2, stride=2, bias=False)], {"weights": "fixed<4>", "khot": 1}, 0),
        ([nn.Upsample(scale_factor=2), nn.Conv2d(2, 4, 3, padding=1, bias=False)], {"weights": "bipolar"}, 0),
    ],
    ids=["transposed", "khot", "upsample"],
)
def test_a_transposed_convolution_multiplies_by_signs_and_inspect_counts_it(up, weights, multiplies, tmp_path) -> None:
    """As docs/binary.md says, beside the two ways without multiplications that it names."""
    torch.manual_seed(2)
    q = edgemat.quantize(nn.Sequential(*up), edgemat.Recipe(input="fixed<8,3>", outputs="fixed<8>", **weights))
    x = torch.randn(8, 2, 4, 4)
    edgemat.calibrate(q, [x])
    edgemat.to_onnx(q.eval(), x[:2], tmp_path / "net.onnx")
    assert verify(tmp_path / "net.onnx", x.numpy(), module=q, backends=["reference", "onnx", "mcu"]).ok
    assert inspect(tmp_path / "net.onnx").totals["multiplies"] == multiplies
    for row in inspect(tmp_path / "net.onnx", target="hls").target.to_dict()["layers"]:
        assert (row["multipliers"] > 0) == (multiplies > 0)


def test_batch_norm_stays_an_affine_and_accumulators_go_on_exactly() -> None:
    q, _ = converted()
    kinds = [type(q.get_submodule(str(i))) for i in (1, 4, 7, 10)]
    assert kinds == [QuantBatchNorm] * 4
    assert {str(q.get_submodule(str(i)).weight_quantizer.format).partition(",")[0] for i in (1, 4, 7, 10)} == {
        "fixed<12"
    }
    sums = q.get_submodule("3").output_quantizer
    assert str(sums.format) == str(Fixed(7, 7))  # 36 signs: -36 to 36
    with torch.no_grad():
        inner = torch.where(torch.randn(2, 8, 8, 8) < 0, -1.0, 1.0)
        layer = q.get_submodule("3")
        plain = nn.functional.conv2d(inner, torch.sign(layer.weight), None, 2, 1, 1, 2)
        assert torch.equal(layer(inner), plain)


def test_rules_of_a_recipe() -> None:
    recipe = edgemat.Recipe(**{**RECIPE, "first": {"weights": "fixed<6>"}})
    q = edgemat.quantize(network(), recipe)
    assert q.get_submodule("0").weight_quantizer.width == 6  # folds its batch norm, as ever
    assert isinstance(q.get_submodule("3").weight_quantizer, BipolarQuantizer)
    assert q.get_submodule("11").weight_quantizer.width == 8
    assert edgemat.Recipe.from_toml(recipe.to_toml()) == recipe


def test_checkpoints_keep_the_format() -> None:
    q, x = converted()
    again = edgemat.quantize(network(), edgemat.Recipe(**RECIPE))
    again.load_state_dict(q.state_dict())
    assert torch.equal(again.eval()(x), q(x))
    other = edgemat.quantize(network(), edgemat.Recipe(**{**RECIPE, "weights": "fixed<4>"}))
    with pytest.raises(RuntimeError, match="the checkpoint holds bipolar"):
        other.load_state_dict(q.state_dict())
    four = edgemat.quantize(network(), edgemat.Recipe(**{**RECIPE, "weights": "fixed<4>"}))
    edgemat.calibrate(four, [x])
    with pytest.raises(RuntimeError, match="is bipolar in this network"):
        again.load_state_dict(four.state_dict())


def test_what_bipolar_cannot_be_combined_with_is_refused() -> None:
    relu = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(UnsupportedOpError, match="never negative"):
        edgemat.quantize(relu, edgemat.Recipe(weights="bipolar", activations="bipolar"))
    with pytest.raises(FormatError, match="behind a ReLU"):
        QuantReLU("bipolar")
    for setting in ({"accumulator": 12}, {"learn_widths": "weights"}, {"points": "statistics"}):
        with pytest.raises(FormatError, match="bipolar weights and"):
            edgemat.quantize(network(), edgemat.Recipe(**{**RECIPE, **setting}))
    with pytest.raises(FormatError, match="expected 'bipolar'"):
        BipolarQuantizer("fixed<1,1>")


@pytest.mark.parametrize("levels", [1, 2, 8, 128])
def test_thermometer_of_every_pixel(levels, tmp_path) -> None:
    layer = ThermometerEncoding(1, levels).eval()
    x = (torch.arange(256) / 256).reshape(16, 1, 16)
    y = layer(x)
    assert y.shape == (16, levels, 16)
    thresholds = (2 * np.arange(levels) + 1) * 128 // levels
    expected = np.where(np.arange(256)[:, None] >= thresholds, 1, -1)
    assert np.array_equal(y.movedim(1, 2).reshape(256, levels).numpy(), expected)
    assert np.array_equal((expected == 1).sum(1), (np.arange(256) + 128 // levels) // (256 // levels))
    if levels != 8:
        return
    edgemat.to_onnx(layer, x[:1], tmp_path / "t.onnx")
    report = verify(tmp_path / "t.onnx", x.numpy(), module=layer, backends=("reference", "onnx", "mcu"))
    assert report.ok, report.to_dict()
    (node,) = inspect(tmp_path / "t.onnx").nodes
    assert (node.multiplies, node.additions) == (0, 16 * levels)


def test_thermometers_that_do_not_fit_are_refused() -> None:
    for levels, fmt in ((3, "ufixed<8,0>"), (256, "ufixed<8,0>"), (8, "fixed<8,1>"), (8, "ufixed<8>")):
        with pytest.raises(FormatError, match="thermometer"):
            ThermometerEncoding(3, levels, input=fmt)
    with pytest.raises(LoweringError, match="expected"):
        ThermometerEncoding(3)(torch.zeros(2, 1, 4, 4))


def test_one_dimensional_and_dense_layers_on_their_own(tmp_path) -> None:
    torch.manual_seed(4)
    conv = QuantConv1d(3, 4, 3, stride=2, padding=1, weights="bipolar", input="bipolar", output="bipolar")
    net = nn.Sequential(conv, nn.Flatten(), QuantLinear(16, 5, weights="bipolar", input="bipolar")).eval()
    edgemat.calibrate(net, [torch.randn(4, 3, 8)])
    x = torch.randn(32, 3, 8)
    edgemat.to_onnx(net, x[:1], tmp_path / "d.onnx")
    report = verify(tmp_path / "d.onnx", x.numpy(), module=net, backends=("reference", "onnx", "mcu"))
    assert report.ok, report.to_dict()
    assert isinstance(QuantConv2d(1, 1, 1, weights="bipolar").weight_quantizer, BipolarQuantizer)
