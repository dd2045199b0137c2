"""eval() of a converted module gives the bits of the lowered file, for every operation and many recipes."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import edgemat
from edgemat.formats import Fixed
from tests.networks import models
from tests.nn.networks import NETWORKS

RECIPE = {"input": "fixed<8,3>", "weights": "fixed<6>", "activations": "fixed<6>"}


def trained(model: nn.Module, xs: list[torch.Tensor], steps: int = 2, **recipe: object) -> nn.Module:
    """Quantised, calibrated, and moved by a few training steps; in eval mode."""
    module = edgemat.quantize(model, edgemat.Recipe(**{**RECIPE, **recipe}))
    edgemat.calibrate(module, [tuple(xs)])
    module.train()
    parameters = list(module.parameters())
    optimizer = torch.optim.SGD(parameters, 1e-3) if parameters else None
    for _ in range(steps if optimizer else 0):
        outputs = module(*xs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum(y.float().square().mean() for y in outputs if y.is_floating_point())
        if isinstance(loss, torch.Tensor) and loss.requires_grad:
            assert optimizer is not None
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return module.eval()


def mismatches(module: nn.Module, xs: list[torch.Tensor], path: str) -> int:
    """Elements in which the module and the file under onnxruntime differ."""
    with torch.no_grad():
        expected = module(*xs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    edgemat.to_onnx(module, tuple(xs), path)
    session = onnxruntime.InferenceSession(path)
    found = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), xs, strict=True)})
    assert len(found) == len(expected)
    return sum(int((np.asarray(a) != b.numpy()).sum()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_operation(name: str, tmp_path) -> None:
    make, shapes = NETWORKS[name]
    torch.manual_seed(0)
    xs = [torch.randn(shape) * 2 for shape in shapes]
    module = trained(make(), xs)
    assert mismatches(module, xs, str(tmp_path / "net.onnx")) == 0


CASES = {
    "mlp": (models.Mlp, (5, 16), {}),
    "resnet8": (models.ResNet8, (2, 3, 32, 32), {}),
    "resnet8 affine": (models.ResNet8, (2, 3, 32, 32), {"batch_norm": "affine", "every_layer": True}),
    "resnet8 outputs": (models.ResNet8, (2, 3, 32, 32), {"outputs": "fixed<10>"}),
    "ds-cnn": (models.DsCnn, (2, 1, 49, 10), {}),
    "ecg": (models.EcgCnn, (3, 2, 192), {}),
    "autoencoder": (models.Autoencoder, (4, 640), {}),
    "mlp 16 bits": (
        models.Mlp,
        (5, 16),
        {"input": "fixed<16,3>", "weights": "fixed<16>", "activations": "fixed<16>"},
    ),
    "cnn 16 bits": (
        models.SmallCnn,
        (2, 1, 28, 28),
        {"input": "fixed<16,3>", "weights": "fixed<16>", "activations": "fixed<16>"},
    ),
    "modes": (
        models.SmallCnn,
        (2, 1, 28, 28),
        {
            "weights": "fixed<5,1,RND_CONV,SAT_SYM>",
            "activations": "fixed<7,3,TRN,WRAP>",
            "outputs": "fixed<9,4,RND_ZERO,SAT_ZERO>",
        },
    ),
    "tracked wrap": (
        models.Mlp,
        (5, 16),
        {"input": "fixed<8,3,TRN_ZERO,SAT_ZERO>", "activations": Fixed(9, None, True, "RND_INF", "WRAP")},
    ),
    "rules": (
        models.Mlp,
        (5, 16),
        {
            "per_channel_weights": False,
            "rules": {nn.ReLU: {"activations": "ufixed<4>"}, "2": {"weights": "fixed<3>", "input": "ufixed<5>"}},
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_network(name: str, tmp_path) -> None:
    make, shape, recipe = CASES[name]
    torch.manual_seed(0)
    xs = [torch.randn(shape) * 2]
    module = trained(make(), xs, **recipe)
    assert mismatches(module, xs, str(tmp_path / "net.onnx")) == 0


def test_control_one_weight_bit_shows(tmp_path) -> None:
    torch.manual_seed(0)
    xs = [torch.randn(64, 16)]
    module = trained(models.Mlp(), xs)
    path = str(tmp_path / "net.onnx")
    assert mismatches(module, xs, path) == 0
    session = onnxruntime.InferenceSession(path)
    before = session.run(None, {session.get_inputs()[0].name: xs[0].numpy()})[0]
    last = module.get_submodule("6")
    with torch.no_grad():
        lsb = 2.0 ** -float(last.weight_quantizer.exponents()[0])
        last.weight[0] -= lsb * last.weight[0].sign()
        assert int((module(xs[0]).numpy() != before).sum()) > 0


def test_control_a_rounding_mode_shows(tmp_path) -> None:
    torch.manual_seed(0)
    xs = [torch.randn(256, 16)]
    module = trained(models.Mlp(), xs)
    with torch.no_grad():
        before = module(xs[0])
        for part in module.modules():
            if isinstance(part, edgemat.nn.FixedQuantizer) and part.role == "requantize":
                part.grid = type(part.grid)(*[v if v != "RND" else "TRN" for v in part.grid.__dict__.values()])
        assert bool((module(xs[0]) != before).any())
