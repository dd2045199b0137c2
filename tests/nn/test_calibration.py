"""calibrate: methods, kinds of batches, fresh batch norms, bad data; and the recipe's validation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import edgemat
from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.nn import FixedQuantizer
from tests.networks import models


def fracs(module: nn.Module) -> list[float]:
    return [float(m.frac.sum()) for m in module.modules() if isinstance(m, FixedQuantizer)]


def test_minmax_holds_the_range() -> None:
    quantizer = FixedQuantizer("fixed<8>")
    edgemat.calibrate(quantizer, [torch.tensor([-0.4, 1.9]), torch.tensor([0.3, -2.0])])
    assert quantizer.exponent() == 6  # -2 .. 127/64
    edgemat.calibrate(quantizer, [torch.tensor([2.0])])
    assert quantizer.exponent() == 5


def test_percentile_and_mse_ignore_outliers() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(20000), torch.tensor([30.0])])
    found = {}
    for method in ("minmax", "percentile", "mse"):
        quantizer = FixedQuantizer("fixed<6>")
        edgemat.calibrate(quantizer, [x], method=method, percentile=99.9)
        found[method] = quantizer.exponent()
    assert found["minmax"] == 0 and found["percentile"] >= 2 and found["mse"] > found["minmax"]
    quantizer = FixedQuantizer("fixed<6>")
    clean = x[:-1]
    edgemat.calibrate(quantizer, [clean], method="mse")
    errors = [float((FixedQuantizer(Fixed(6, 6 - f))(clean) - clean).square().sum()) for f in range(0, 8)]
    assert quantizer.exponent() == int(np.argmin(errors))


def test_kinds_of_batches_agree() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 16), torch.randint(0, 5, (64,))
    kinds = {
        "tensors": [x[:32], x[32:]],
        "arrays": [x[:32].double().numpy(), x[32:].numpy()],
        "tuples": [(x[:32],), (x[32:],)],
        "pairs": [[x[:32], y[:32]], [x[32:], y[32:]]],
        "loader": DataLoader(TensorDataset(x, y), batch_size=32),
        "dicts": [{"input": x}],
        "generator": (part for part in (x[:32], x[32:])),
    }
    expected = None
    for name, batches in kinds.items():
        torch.manual_seed(1)
        module = edgemat.quantize(models.Mlp())
        placeholder = next(n.target for n in module.graph.nodes if n.op == "placeholder")
        if name == "dicts":
            batches = [{placeholder: x}]
        assert edgemat.calibrate(module, batches) is module
        expected = expected or fracs(module)
        assert fracs(module) == expected, name


def test_mode_and_gradients_are_left_alone() -> None:
    module = edgemat.quantize(models.ResNet8().train())
    module.get_submodule("bn").eval()
    edgemat.calibrate(module, [torch.randn(2, 3, 32, 32)])
    assert module.training and not module.get_submodule("bn").training
    assert all(p.grad is None for p in module.parameters())


def test_fresh_batch_norms_estimate_their_statistics_first() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 3, 8, 8) * 5 + 2
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    module = edgemat.quantize(net, edgemat.Recipe(input="fixed<12,6>", weights="fixed<12>"))
    edgemat.calibrate(module, [x])
    reference = nn.Sequential(net[0], nn.BatchNorm2d(4, momentum=None)).train()
    reference(x)
    assert torch.allclose(module.get_buffer("1.running_var"), reference[1].running_var, rtol=0.02)
    trained = edgemat.quantize(module_with_statistics(net, x))
    before = trained.get_buffer("1.running_var").clone()
    edgemat.calibrate(trained, [x])
    assert torch.equal(trained.get_buffer("1.running_var"), before)


def module_with_statistics(net: nn.Module, x: torch.Tensor) -> nn.Module:
    net.train()(x)
    return net


def test_bad_calibration_is_refused() -> None:
    module = edgemat.quantize(models.Mlp())
    with pytest.raises(FormatError, match="minmax, percentile, mse"):
        edgemat.calibrate(module, [torch.randn(2, 16)], method="entropy")
    with pytest.raises(FormatError, match="no batches"):
        edgemat.calibrate(module, [])
    with pytest.raises(FormatError, match="finite"):
        edgemat.calibrate(module, [torch.full((2, 16), float("nan"))])
    with pytest.raises(FormatError, match="percentile"):
        edgemat.calibrate(module, [torch.randn(2, 16)], method="percentile", percentile=3)
    with pytest.raises(FormatError, match="iterable of batches"):
        edgemat.calibrate(module, "ab")
    # A failed calibration leaves no observer behind.
    edgemat.calibrate(module, [torch.randn(2, 16)])
    module.eval()(torch.randn(2, 16))


def test_nan_weights_are_refused() -> None:
    model = models.Mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(FormatError, match="finite"):
        edgemat.calibrate(edgemat.quantize(model), [torch.randn(2, 16)])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weigths": "fixed<6>"}, "'weigths'; did you mean 'weights'"),
        ({"weights": "fixd<6>"}, "weights"),
        ({"weights": 6}, "weights is 6"),
        ({"activations": "ufixed<6>"}, "'fixed<6>'"),
        ({"activations": "fixed<6,[1,2]>"}, "activations"),
        ({"bias": "fixed<33>"}, "bias"),
        ({"bias": "fixed<16,2>"}, "bias"),
        ({"batch_norm": "afine"}, "did you mean 'affine'"),
        ({"per_channel_weights": 1}, "per_channel_weights"),
        ({"input": {}}, "input"),
        ({"rules": [1]}, "rules"),
        ({"rules": {"a": "fixed<6>"}}, "'a'"),
        ({"rules": {3: {}}}, "3"),
        ({"rules": {"conv*": {"weight": "fixed<6>"}}}, "did you mean 'weights'"),
        ({"rules": {nn.Linear: {"weights": "fixed<0>"}}}, "Linear"),
    ],
)
def test_recipe_names_the_offending_key(fields: dict[str, object], words: str) -> None:
    with pytest.raises(FormatError) as caught:
        edgemat.Recipe(**fields)
    assert words in str(caught.value)


def test_recipe_accepts_formats_and_texts() -> None:
    recipe = edgemat.Recipe(input=Fixed(8, 1), weights="fixed<6>", outputs="fixed<12,4>")
    assert recipe.input_format("anything") == Fixed(8, 1)
    assert recipe.layer([("fc", nn.Linear)]).activation(True) == Fixed(8, None, False)


def test_wrong_use_is_refused_in_a_sentence() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(FormatError, match=r"one tensor, expected an iterable of batches.*\[x\]"):
        edgemat.calibrate(edgemat.quantize(torch.nn.Sequential(torch.nn.Linear(3, 2))), x)
    with pytest.raises(FormatError, match=r"calibration got None, expected an iterable of batches such as \[x\]"):
        edgemat.calibrate(edgemat.quantize(torch.nn.Sequential(torch.nn.Linear(3, 2))), None)
    with pytest.raises(FormatError, match="max_batches is -1, expected a whole number of at least 1"):
        edgemat.calibrate(edgemat.quantize(torch.nn.Sequential(torch.nn.Linear(3, 2))), [x], max_batches=-1)
    with pytest.raises(FormatError, match=r"Linear holds no quantiser.*edgemat\.quantize"):
        edgemat.calibrate(torch.nn.Linear(3, 2), [x])
