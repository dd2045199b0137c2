"""ompq: linear CKA, the published programme against all allocations, budgets, and what a recipe states already."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

import edgemat
from edgemat.errors import EdgematError, FormatError
from edgemat.nn.training import orthogonality
from tests.networks import models

BITS = (2, 3, 4, 6, 8)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3)
    )


def outputs(model: nn.Sequential, x: torch.Tensor) -> list[np.ndarray]:
    """What each linear layer computes."""
    found = []
    for part in model:
        x = part(x)
        if isinstance(part, nn.Linear):
            found.append(x.detach().double().numpy())
    return found


def importance(features: list[np.ndarray], beta: float) -> list[float]:
    """theta from the feature-space form of linear CKA, |Y_j' Y_i|^2 / (|Y_i' Y_i| |Y_j' Y_j|)."""
    centred = [y - y.mean(0) for y in features]
    norm = np.linalg.norm
    orm = [[norm(b.T @ a) ** 2 / (norm(a.T @ a) * norm(b.T @ b)) for b in centred] for a in centred]
    return [math.exp(-beta * (sum(row) - row[i])) for i, row in enumerate(orm)]


def best(theta: list[float], sizes: list[int], budget: float) -> tuple[int, ...]:
    """The allocation of most gain, by trying all."""
    worth = [sum(theta[i:]) / (len(theta) - i) for i in range(len(theta))]
    allowed = (b for b in itertools.product(BITS, repeat=len(sizes)) if sum(map(math.prod, zip(b, sizes))) <= budget)
    return max(allowed, key=lambda bits: sum(map(math.prod, zip(bits, worth))))


def widths(recipe: edgemat.Recipe) -> dict[str, int]:
    return {name: rule["weights"].width for name, rule in recipe.rules.items()}


@pytest.mark.parametrize("beta", [0.5, 2.0, 10.0])
@pytest.mark.parametrize("average", [3.0, 4.0, 5.3])
def test_the_programme_is_solved_exactly(average: float, beta: float) -> None:
    model = mlp().eval()
    x = torch.randn(64, 8)
    sizes = [part.weight.numel() for part in model if isinstance(part, nn.Linear)]
    recipe = edgemat.ompq(model, x.split(20), BITS, average_bits=average, beta=beta)
    found = tuple(widths(recipe)[name] for name in ("0", "2", "4", "6"))
    assert found == best(importance(outputs(model, x), beta), sizes, average * sum(sizes))


def test_the_control_of_the_programme() -> None:
    """Another order of the layers is another programme; a constant added to features is not."""
    model = mlp().eval()
    x = torch.randn(64, 8)
    theta = importance(outputs(model, x), 2.0)
    names, _, grams = orthogonality._grams(model, [x], edgemat.Recipe(), 64)
    found = orthogonality._importance(grams, 2.0)
    np.testing.assert_allclose(found / found.max(), np.array(theta) / max(theta), rtol=1e-6)
    assert names == ["0", "2", "4", "6"]
    sizes = [160, 240, 72, 18]
    budgets = [bits * sum(sizes) / 4 for bits in range(9, 30)]
    assert any(best(theta, sizes, budget) != best(theta[::-1], sizes, budget) for budget in budgets)
    shifted = [y + 5.0 for y in outputs(model, x)]
    np.testing.assert_allclose(importance(shifted, 2.0), theta, rtol=1e-6)


def test_a_layer_that_repeats_others_gets_fewer_bits() -> None:
    """Four layers of one size: the second and third pass on what the first computes, the last one does not."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(3)), nn.ReLU(), nn.Linear(16, 16)).eval()
    with torch.no_grad():
        for part in model[:3]:
            part.weight.copy_(torch.eye(16))
    theta = importance(outputs(model, torch.randn(100, 16)), 1.0)
    assert theta[3] > 2 * max(theta[:3])
    found = widths(edgemat.ompq(model, [torch.randn(100, 16)], average_bits=3.5, beta=1.0))
    assert found["4"] == max(found.values()) > found["0"]


def test_budgets_in_bits_and_bytes() -> None:
    model, x = models.ResNet8().eval(), torch.randn(16, 3, 32, 32)
    layers = {n: p.weight.numel() for n, p in model.named_modules() if isinstance(p, nn.Conv2d | nn.Linear)}
    total = sum(layers.values())
    for options, budget in (({"average_bits": 4}, 4 * total), ({"size_bytes": 30_000}, 240_000), ({}, 4 * total)):
        found = widths(edgemat.ompq(model, [x], **options))
        assert set(found) == set(layers) and set(found.values()) <= set(BITS)
        used = sum(found[name] * count for name, count in layers.items())
        assert budget - 8 * max(layers.values()) < used <= budget
    assert len(set(found.values())) > 1


def test_the_recipe_quantises_the_network() -> None:
    model, x = models.ResNet8().eval(), torch.randn(16, 3, 32, 32)
    base = edgemat.Recipe(
        activations="fixed<6>", rules={"dense": {"weights": "fixed<8>"}, "stack1.*": {"batch_norm": "affine"}}
    )
    recipe = edgemat.ompq(model, [x], bits=(2, 4), average_bits=3, recipe=base)
    assert recipe.activations_format.width == 6 and recipe.rules["stack1.*"] == {"batch_norm": "affine"}
    q = edgemat.quantize(model, recipe)
    found = {name: q.get_submodule(name).weight_quantizer for name in widths_of(recipe)}
    assert {name: part.width for name, part in found.items()} == widths_of(recipe)
    assert found["dense"].width == 8 and all(found[name].width in (2, 4) for name in found if name != "dense")
    assert (
        edgemat.Recipe.from_toml(recipe.to_toml()).layer([("conv", nn.Conv2d)]).weights
        == recipe.rules["conv"]["weights"]
    )


def widths_of(recipe: edgemat.Recipe) -> dict[str, int]:
    return {name: rule["weights"].width for name, rule in recipe.rules.items() if "weights" in rule}


def test_what_first_and_last_state_is_kept_and_counts() -> None:
    model, x = mlp().eval(), torch.randn(64, 8)
    base = edgemat.Recipe(weights="fixed<4>", first={"weights": "fixed<8>"}, last={"weights": "fixed<6>"})
    recipe = edgemat.ompq(model, [x], bits=(2, 3, 4), average_bits=5, recipe=base)
    assert set(recipe.rules) == {"2", "4"}
    q = edgemat.quantize(model, recipe)
    found = [q.get_submodule(name).weight_quantizer.width for name in ("0", "2", "4", "6")]
    assert found[0] == 8 and found[3] == 6
    assert sum(b * n for b, n in zip(found, (160, 240, 72, 18))) <= 5 * 490


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": ()}, "expected whole numbers from 1 to 32"),
        ({"bits": (4, 33)}, "expected whole numbers from 1 to 32"),
        ({"average_bits": 4, "size_bytes": 9}, "expected one of them"),
        ({"average_bits": 1.5}, r"the narrowest widths need 2.00 bits per weight \(123 bytes\), expected at most 1.50"),
        ({"size_bytes": 50}, "expected at most 0.82"),
        ({"average_bits": math.nan}, "average_bits is nan, expected a number"),
        ({"average_bits": "4"}, "average_bits is '4', expected a number"),
        ({"bits": 4}, "bits is 4, expected whole numbers"),
        ({"samples": 1}, "samples is 1"),
        ({"beta": -1}, "beta is -1"),
    ],
)
def test_settings_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        edgemat.ompq(mlp(), [torch.randn(8, 8)], **options)


def test_too_few_samples_and_no_layers() -> None:
    with pytest.raises(FormatError, match="saw 1 samples, expected at least two"):
        edgemat.ompq(mlp(), [torch.randn(1, 8)])
    with pytest.raises(FormatError, match=r"got a Tensor, expected an iterable of batches such as \[x\]"):
        edgemat.ompq(mlp(), torch.randn(4, 8))
    with pytest.raises(FormatError, match="layer '0' gave NaN or infinities"):
        edgemat.ompq(mlp(), [torch.full((4, 8), math.nan)])
    with pytest.raises(FormatError, match="has no linear layer or convolution"):
        edgemat.ompq(nn.Sequential(nn.ReLU()), [torch.randn(4, 8)])


def test_without_scipy_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(EdgematError, match=r"ompq needs scipy, .* pip install 'edgemat\[ompq\]'"):
        edgemat.ompq(mlp(), [torch.randn(8, 8)])
