"""ptq: quantise, calibrate and bias correction in one call, checked against the float network's means."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import edgemat
from edgemat.errors import FormatError
from tests.networks import models
from tests.nn.networks import IMAGE, Net, conv

COARSE = edgemat.Recipe(weights="fixed<3>", activations="fixed<4>")


def images(count: int = 64) -> list[torch.Tensor]:
    torch.manual_seed(7)
    return list((torch.randn(count, *IMAGE[1:]) + 0.3).split(24))  # batches of unequal size


def means(model: nn.Module, batches: list[torch.Tensor]) -> torch.Tensor:
    """Mean of the last layer's result per channel."""
    y = torch.cat([model(x).detach().double() for x in batches])
    return y.mean([d for d in range(y.dim()) if d != 1])


def network(**options) -> nn.Module:
    """Convolutions with and without bias and batch norm, a pool, and a dense layer of rank 3 at the end."""
    torch.manual_seed(4)
    parts = {
        "a": conv(3, 6, bias=False),
        "n": nn.BatchNorm2d(6, affine=options.get("affine", True)),
        "b": conv(6, 5, bias=False),
        "c": conv(5, 4),
        "d": nn.Linear(8, 3, bias=options.get("bias", True)),
    }
    net = Net(
        lambda s, x: s.d(torch.relu(s.c(torch.relu(s.b(torch.relu(s.n(s.a(x))))))).mean(2)).transpose(1, 2), **parts
    )
    net.train()(torch.cat(images()))
    return net.eval()


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}])
@pytest.mark.parametrize("batch_norm", ["fold", "affine"])
def test_the_mean_of_the_outputs_becomes_the_float_networks(options: dict, batch_norm: str) -> None:
    model, batches = network(**options), images()
    recipe = edgemat.Recipe(weights="fixed<3>", activations="fixed<4>", batch_norm=batch_norm)
    wanted = means(model, batches)
    off = [
        (means(edgemat.ptq(model, batches, recipe, bias_correction=on), batches) - wanted).abs().max().item()
        for on in (False, True)
    ]
    assert off[1] < 1e-3 < 0.01 < off[0]  # half an LSB of the last bias is left


def test_each_layer_is_corrected_behind_the_corrected_ones() -> None:
    """The second layer's correction is the shift that remains after the first's: worked out on the layers alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(200, 8) + 0.2
    plain = edgemat.ptq(model, [x], COARSE, bias_correction=False)
    q = edgemat.ptq(model, [x], COARSE)

    def bias(layer, inputs: torch.Tensor, wanted: torch.Tensor, high: float | None) -> torch.Tensor:
        """The bias less the shift of the mean of what the ReLU behind it lets through, up to its rail."""
        weight, rounded = (v.detach().double() for v in layer.quantized())
        found, wanted = inputs.double() @ weight.T + rounded, wanted.double()
        if high is not None:
            found, wanted = found.clamp(0.0, high), wanted.clamp(0.0, high)
        return layer.bias.double() - (found - wanted).mean(0)

    entry = next(m for n, m in q.named_modules() if n == "input_1_quantizer")(x)
    rail = 15 * 2.0 ** -q.get_submodule("1").output_quantizer.exponent()
    first = bias(plain.get_submodule("0"), entry, model[0](x), rail)
    torch.testing.assert_close(q.get_submodule("0").bias.double(), first, rtol=0, atol=1e-6)
    unclamped = bias(plain.get_submodule("0"), entry, model[0](x), None)
    assert (q.get_submodule("0").bias.double() - unclamped).abs().max() > 1e-3  # the first control
    hidden = q.get_submodule("1")(q.get_submodule("0")(entry))
    second = bias(plain.get_submodule("2"), hidden, model(x), None)
    torch.testing.assert_close(q.get_submodule("2").bias.double(), second, rtol=0, atol=1e-6)
    uncorrected = plain.get_submodule("1")(plain.get_submodule("0")(entry))
    wrong = bias(plain.get_submodule("2"), uncorrected, model(x), None)
    assert (q.get_submodule("2").bias.double() - wrong).abs().max() > 1e-3  # the second: all layers at once


def test_only_biases_change_and_the_model_stays() -> None:
    model, batches = network(), images()
    before = copy.deepcopy(model.state_dict())
    plain, q = (edgemat.ptq(model, batches, COARSE, bias_correction=on) for on in (False, True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not q.training and not any(part.training for part in q.modules())
    found, other = q.state_dict(), plain.state_dict()
    changed = {name for name, value in found.items() if name not in other or not torch.equal(value, other[name])}
    assert changed == {"n.bias", "b.bias", "c.bias", "d.bias"}
    assert all(part._observer is None and not part._forward_hooks for part in q.modules() if hasattr(part, "grid"))


def test_the_result_exports_with_the_same_bits(tmp_path) -> None:
    model, batches = network(), images()
    q = edgemat.ptq(model, batches, edgemat.Recipe(weights="fixed<3>", activations="fixed<4>", outputs="fixed<10,4>"))
    edgemat.to_onnx(q, batches[0][:2], tmp_path / "net.onnx")
    found = edgemat.Simulator(tmp_path / "net.onnx").codes(batches[0].numpy())
    assert torch.equal(torch.from_numpy(found).long(), edgemat.nn.codes(q(batches[0]), "fixed<10,4>"))


def test_kinds_of_batches_and_limits() -> None:
    model = models.Mlp().eval()
    x, labels = torch.randn(96, 16), torch.zeros(96)
    loader = [(part, labels[:32]) for part in x.split(32)]
    states = [edgemat.ptq(model, given).state_dict() for given in (loader, (batch for batch in loader))]
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))
    limited = edgemat.ptq(model, loader, max_batches=1).state_dict()
    assert not all(torch.equal(a, b) for a, b in zip(limited.values(), states[0].values(), strict=True))
    with pytest.raises(FormatError, match="ptq got one tensor"):
        edgemat.ptq(model, x)
    with pytest.raises(FormatError, match="calibration got no batches"):
        edgemat.ptq(model, [])
    with pytest.raises(FormatError, match="calibration method is 'best'"):
        edgemat.ptq(model, [x], method="best")


def test_shared_layers_are_corrected_over_all_calls() -> None:
    torch.manual_seed(0)
    model = Net(lambda s, x: s.l(torch.relu(s.l(x))), l=nn.Linear(6, 6)).eval()
    batches = [torch.randn(128, 6)]
    assert edgemat.ptq(model, batches, COARSE)(batches[0]).shape == (128, 6)
