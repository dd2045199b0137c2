"""`ptq`: quantisation after training in one call, with bias correction.

**Bias correction** (Nagel et al., *Data-Free Quantization Through Weight Equalization and Bias Correction*, arXiv
1906.04721, section 4.2 and appendix D, the empirical form). Rounded weights and inputs shift the mean of a layer's
output, ``E[y'] - E[y]``, by an amount that is the same for every sample and therefore can be taken off the bias. The
layers are corrected in the order of the forward pass, each with the corrected ones before it, per output channel:
means over the calibration batches (and positions) of the float network's result, and of the quantised one's.

Where a quantiser follows (with its ReLU), the means are those of the results clamped to what it holds: a shift of
values that saturate anyway is none. With few bits this matters: without it, a few large values that lose their
mean to saturation pull the bias of all others along.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from edgemat.nn import arguments
from edgemat.nn.batch_norm import QuantBatchNorm, folded_scale
from edgemat.nn.bipolar import BipolarQuantizer
from edgemat.nn.calibration import calibrate, observe
from edgemat.nn.conversion import quantize
from edgemat.nn.layer import exact_arithmetic
from edgemat.nn.learned_activation import LearnedActivationQuantizer
from edgemat.nn.linear import QuantLinear
from edgemat.nn.training.reference import real_values
from edgemat.nn.training.traversal import parts_in_order
from edgemat.nn.weight_points import limit_weights
from edgemat.nn.weighted_layer import WeightedLayer
from edgemat.recipe import Recipe

Biased = WeightedLayer | QuantBatchNorm


def ptq(
    model: nn.Module,
    batches: Iterable[Any],
    recipe: Recipe | None = None,
    method: str = "mse",
    bias_correction: bool = True,
    percentile: float = 99.99,
    max_batches: int | None = None,
) -> nn.Module:
    """Quantises a trained float module without training: `quantize`, `calibrate`, bias correction.

    Args:
        model: A trained float module that torch.fx can trace; it stays as it is.
        batches: What `edgemat.calibrate` takes; some hundred samples do.
        recipe: Formats; by default 8 bits everywhere.
        method: How binary points are chosen: ``"mse"``, ``"minmax"`` or ``"percentile"``.
        bias_correction: Whether the shift of each layer's mean is taken off its bias. A layer without a bias and
            without a batch norm gets one.
        percentile: The central part for ``"percentile"``, in percent.
        max_batches: Batches taken at most; None takes all.

    Returns:
        A quantised module in eval mode, ready for `edgemat.to_onnx`, or a start for training.

    Raises:
        FormatError: as `edgemat.calibrate`; LoweringError and UnsupportedOpError as `edgemat.quantize`.
    """
    limit = None if max_batches is None else arguments.whole("ptq: max_batches", max_batches, 1)
    taken = list(itertools.islice(arguments.sequence("ptq", batches), limit))
    q = quantize(model, recipe).eval()
    calibrate(q, taken, method, percentile, batch_norm="keep")
    if bias_correction:
        correct_biases(q, taken)
    return q


@torch.no_grad()
def correct_biases(q: nn.Module, batches: list[Any]) -> dict[str, Tensor]:
    """Takes the shift of each layer's mean output off its bias, in place; `q` must be calibrated and in eval mode.

    Returns:
        What was subtracted from each layer's result, by name: float64, one entry per channel.
    """
    layers = [(name, part) for name, part in parts_in_order(q) if isinstance(part, Biased)]
    with real_values(q):
        wanted = _means(q, dict(layers), batches)
    shifts: dict[str, Tensor] = {}
    for name, layer in layers:
        if name not in wanted:
            continue  # never reached
        found = _means(q, {name: layer}, batches)[name]
        shifts[name] = found - wanted[name]
        _shift(layer, -shifts[name])
        limit_weights(layer)
    return shifts


def _means(q: nn.Module, layers: dict[str, Biased], batches: list[Any]) -> dict[str, Tensor]:
    """Mean of each layer's result, clamped to what its output quantiser holds, per channel, float64."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def note(name: str, layer: Biased, x: Tensor) -> None:
        y = _held(layer, _result(layer, x))
        channels = y.dim() - 1 if isinstance(layer, QuantLinear) else 1
        axes = [d for d in range(y.dim()) if d != channels]
        sums[name] = sums.get(name, 0.0) + y.double().sum(axes)
        counts[name] = counts.get(name, 0) + y.numel() // y.shape[channels]

    hooks = [
        layer.register_forward_pre_hook(lambda part, inputs, name=name: note(name, part, inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        for batch in batches:
            observe(q, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / counts[name] for name, total in sums.items()}


def _result(layer: Biased, x: Tensor) -> Tensor:
    """The layer's exact result (or, where it is observing, its real one) for the input of its `forward`."""
    x = layer.enter(x)
    if isinstance(layer, WeightedLayer):
        with exact_arithmetic(x):
            return layer._exact(x)
    assert layer.running_mean is not None and layer.running_var is not None
    shape = [1, -1] + [1] * (x.dim() - 2)
    source = layer.source()
    observing = source is not None and source.observing
    a, b = (layer.real_affine if observing else layer.quantized)(layer.running_mean, layer.running_var)
    return x.double() * a.double().view(shape) + b.double().view(shape)


def _held(layer: Biased, y: Tensor) -> Tensor:
    """`y` clamped to what the quantiser directly behind the layer holds; as it is without one that saturates."""
    quantizer = layer.next_quantizer
    if isinstance(quantizer, LearnedActivationQuantizer):
        low, high = quantizer._bounds(y)[2:4]
        return torch.maximum(torch.minimum(y, high), low)
    if (
        quantizer is None
        or isinstance(quantizer, BipolarQuantizer)
        or quantizer.grid.overflow not in ("SAT", "SAT_SYM")
    ):
        return y
    step = torch.exp2(-quantizer.exponents().to(y.dtype))
    if step.dim():
        step = step.view([-1 if d == quantizer.axis else 1 for d in range(y.dim())])
    low = max(quantizer.grid.low, 0) if quantizer.relu else quantizer.grid.low
    return torch.maximum(torch.minimum(y, quantizer.grid.high * step), low * step)


def _shift(layer: Biased, amount: Tensor) -> None:
    """Adds `amount` (one number per channel) to a layer's output, through whatever bias it has."""
    norm = layer if isinstance(layer, QuantBatchNorm) else layer.norm
    if norm is not None and norm.bias is not None:
        norm.bias += amount.to(norm.bias.dtype)
    elif norm is not None:
        assert norm.running_mean is not None and norm.running_var is not None
        scale = torch.rsqrt(norm.running_var.double() + norm.eps) if norm is layer else folded_scale(norm)  # type: ignore[arg-type]
        if norm is layer and norm.weight is not None:
            scale = scale * norm.weight.double()
        norm.running_mean -= torch.where(scale == 0, 0.0, amount / scale).to(norm.running_mean.dtype)
    elif layer.bias is not None:
        layer.bias += amount.to(layer.bias.dtype)
    else:
        layer.bias = nn.Parameter(amount.to(layer.weight.dtype))
