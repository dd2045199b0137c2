"""`ompq`: bits per layer from the orthogonality of the layers, by a linear programme (OMPQ, arXiv 2109.07865).

A layer whose outputs say what other layers' outputs say already needs few bits. Over N samples, layer i with features
``Y_i`` (N rows, centred) has the Gram matrix ``K_i = Y_i Y_i'``, and two layers the similarity (equation 5, linear CKA)

    orm(i, j) = <K_i, K_j> / (|K_i| |K_j|)

between 0 (orthogonal) and 1. ``gamma_i = sum_{j != i} orm(i, j)`` and the importance ``theta_i = exp(-beta gamma_i)``
(equations 9 and 10) give the programme (equation 11)

    max  sum_i  b_i / (L - i + 1) * sum_{j >= i} theta_j    subject to  sum_i n_i b_i <= budget

for layers i = 1..L with n_i weights. The paper solves it over a continuous range and rounds; here the bits are chosen
among the given ones exactly, by one binary variable per layer and width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgemat.errors import EdgematError, FormatError
from edgemat.nn.calibration import observe
from edgemat.nn.conversion import quantize
from edgemat.nn.training.reference import real_values
from edgemat.nn.training.traversal import weighted_layers
from edgemat.nn.weight_points import fit_weights
from edgemat.nn.weighted_layer import WeightedLayer
from edgemat.recipe import Recipe


def ompq(
    model: nn.Module,
    batches: Iterable[Any],
    bits: Sequence[int] = (2, 3, 4, 6, 8),
    average_bits: float | None = None,
    size_bytes: int | None = None,
    recipe: Recipe | None = None,
    beta: float = 10.0,
    samples: int = 256,
) -> Recipe:
    """A recipe with a width for the weights of each layer, chosen without search and without labels.

    Args:
        model: A trained float module that torch.fx can trace; it stays as it is.
        batches: What `edgemat.calibrate` takes; the first `samples` samples are used, at least two.
        bits: Widths to choose from, 1 to 32.
        average_bits: The budget as mean bits per weight; 4 where neither budget is given.
        size_bytes: The budget as bytes of all weights, packed.
        recipe: What the result builds on. Layers whose weights it states on their own (in a rule, `types`, `first` or
            `last`) keep that width and count in the budget.
        beta: How strongly importance falls with similarity; the paper's 10 by default.
        samples: Samples the similarities are taken from.

    Returns:
        `recipe` with one more rule for each layer, ``{"stack1.conv1": {"weights": "fixed<4>"}}``.

    Raises:
        FormatError: for settings out of range, both budgets, or a budget that the narrowest widths exceed.
        EdgematError: if scipy is not installed (``pip install edgemat[ompq]``).
    """
    try:
        from scipy.optimize import LinearConstraint, milp
    except ImportError:
        raise EdgematError("ompq needs scipy, which is not installed; pip install 'edgemat[ompq]'") from None
    listed = tuple(bits) if isinstance(bits, Iterable) else ()
    if not listed or any(isinstance(b, bool) or not isinstance(b, int) or not 1 <= b <= 32 for b in listed):
        raise FormatError(f"ompq: bits is {bits!r}, expected whole numbers from 1 to 32, such as (2, 4, 8)")
    widths = sorted(set(listed))
    if average_bits is not None and size_bytes is not None:
        raise FormatError("ompq got average_bits and size_bytes, expected one of them")
    for key, budget in (("average_bits", average_bits), ("size_bytes", size_bytes)):
        if budget is not None and not (isinstance(budget, Real) and math.isfinite(budget)):
            raise FormatError(f"ompq: {key} is {budget!r}, expected a number")
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise FormatError(f"ompq got a {type(batches).__name__}, expected an iterable of batches such as [x]")
    if beta < 0 or samples < 2:
        raise FormatError(f"ompq: beta is {beta} and samples is {samples}, expected at least 0 and at least 2")
    recipe = Recipe() if recipe is None else recipe
    names, layers, grams = _grams(model, batches, recipe, samples)
    coefficients = _coefficients(_importance(grams, beta))
    sizes = np.array([layer.weight.numel() for layer in layers], dtype=np.float64)
    total = (4.0 if average_bits is None else average_bits) * sizes.sum() if size_bytes is None else 8.0 * size_bytes
    stated = _stated(model, recipe)
    choices = [
        [layer.weight_quantizer.width] if name in stated else widths for name, layer in zip(names, layers, strict=True)
    ]
    least = float(sum(n * options[0] for n, options in zip(sizes, choices, strict=True)))
    if least > total:
        raise FormatError(
            f"ompq: the narrowest widths need {least / sizes.sum():.2f} bits per weight ({int(-(-least // 8))} bytes), "
            f"expected at most {total / sizes.sum():.2f}; allow more, or narrower widths"
        )
    variables = [(i, b) for i, options in enumerate(choices) for b in options]
    gain = np.array([coefficients[i] * b for i, b in variables])
    cost = np.array([sizes[i] * b for i, b in variables])
    once = np.array([[float(i == layer) for i, _ in variables] for layer in range(len(layers))])
    solved = milp(
        # Importances of dozens of similar layers are tiny numbers; the solver's tolerances are not.
        -gain / gain.max(),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(cost[None] / total, -np.inf, 1.0)],
        integrality=np.ones(len(variables)),
        bounds=(0, 1),
    )
    if solved.x is None:
        raise FormatError(
            f"ompq: the linear programme has no solution ({solved.message}), expected one; change the bits"
        )
    chosen = {names[i]: b for (i, b), x in zip(variables, solved.x, strict=True) if x > 0.5}
    rules: dict[Any, Any] = dict(recipe.rules)
    for name in names:
        if name not in stated:
            fmt = replace(recipe.weights, width=chosen[name], int_bits=None)  # type: ignore[type-var]
            rules[name] = {**rules.get(name, {}), "weights": fmt}
    return replace(recipe, rules=rules)


@torch.no_grad()
def _grams(
    model: nn.Module, batches: Iterable[Any], recipe: Recipe, samples: int
) -> tuple[list[str], list[WeightedLayer], list[np.ndarray]]:
    """Names, layers and normalised, centred Gram matrices of the float network's layer outputs."""
    q = quantize(model, recipe).eval()
    fit_weights(q)  # some quantisers want binary points even where nobody looks at what they round
    layers = weighted_layers(q)
    if not layers:
        raise FormatError(f"ompq: {type(model).__name__} has no linear layer or convolution, expected at least one")
    features: dict[str, list[Tensor]] = {}

    def note(name: str, layer: WeightedLayer, x: Tensor) -> None:
        features.setdefault(name, []).append(layer._exact(layer.enter(x)).flatten(1))

    hooks = [
        layer.register_forward_pre_hook(lambda part, inputs, name=name: note(name, part, inputs[0]))
        for name, layer in layers
    ]
    seen = 0
    try:
        with real_values(q):
            for batch in itertools.islice(batches, samples):
                observe(q, batch)
                seen = sum(len(rows) for rows in features[layers[0][0]])
                if seen >= samples:
                    break
    finally:
        for hook in hooks:
            hook.remove()
    if seen < 2:
        raise FormatError(f"ompq saw {seen} samples, expected at least two; give it batches")
    reached = [(name, layer) for name, layer in layers if name in features]
    grams = []
    for name, _ in reached:
        rows = torch.cat(features[name])[:samples].double()
        if not bool(rows.isfinite().all()):
            raise FormatError(f"ompq: layer {name!r} gave NaN or infinities, expected finite numbers; clean the data")
        rows = rows - rows.mean(0)
        gram = (rows @ rows.T).numpy()
        norm = np.linalg.norm(gram)
        grams.append(gram / norm if norm > 0 else gram)
    return [name for name, _ in reached], [layer for _, layer in reached], grams


def _stated(model: nn.Module, recipe: Recipe) -> set[str]:
    """Layers whose width does not follow the recipe's own `weights`: a rule of theirs states it."""
    found = [
        {name: layer.weight_quantizer.width for name, layer in weighted_layers(quantize(model, variant))}
        for variant in (replace(recipe, weights=f"fixed<{width}>") for width in (2, 3))
    ]
    return {name for name, width in found[0].items() if found[1][name] == width}


def _importance(grams: list[np.ndarray], beta: float) -> np.ndarray:
    """theta of each layer."""
    flat = np.stack([gram.reshape(-1) for gram in grams])
    similarity = flat @ flat.T
    gamma = similarity.sum(1) - similarity.diagonal()
    return np.exp(-beta * (gamma - gamma.min()))  # a common factor changes no allocation


def _coefficients(theta: np.ndarray) -> np.ndarray:
    """What one bit of each layer is worth: the mean importance of it and the layers behind it."""
    return theta[::-1].cumsum()[::-1] / np.arange(len(theta), 0, -1)
