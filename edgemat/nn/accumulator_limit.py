"""How a layer keeps the bound of its accumulator (`accumulator`): its folded weights, bias and batch norm, shrunk.

**Batch norm** is folded first: ``W = s * w``, ``b = beta + c`` with ``c = (b0 - mean) * s``. Where W is too large the
batch norm's scale s is clamped to ``k * s``, in W and in c alike, with the largest ``k <= 1`` that fulfils
``|beta + k * c| + k * n(W) * M <= R - 1`` (M: `Sum.factor`; both in codes): one linear inequality for each sign. Steps
with batch statistics scale their result alike, ``beta + k * (y - beta)``, so that training sees what is deployed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgemat.errors import FormatError
from edgemat.nn.accumulator import TINY, AccumulatorQuantizer, Sum, project_onto_ball, row_norms
from edgemat.nn.batch_norm import BatchNorm, count_batch

if TYPE_CHECKING:
    from edgemat.nn.weighted_layer import WeightedLayer


@dataclass(frozen=True)
class Limit:
    """How far the bound shrinks a layer's parameters.

    Attributes:
        weights: Factor of the folded weights, float64 ``[outputs]``.
        batch_norm: k, the factor of the batch norm's scale.
        offset: beta (or the bias, without batch norm) within its limit, float64 ``[outputs]``, or None.
    """

    weights: Tensor
    batch_norm: Tensor
    offset: Tensor | None


def sum_of(layer: WeightedLayer, quantizer: AccumulatorQuantizer) -> Sum:
    """What the sums of `layer` must keep.

    Raises:
        FormatError: if the accumulator cannot hold a single product of a weight code 1.
    """
    source = layer.known_source()
    low, high = source.grid.low, source.grid.high
    if source.ready:
        lows, highs = source.format.channel_rails()
        low, high = int(lows.min()), int(highs.max())
    biased = layer.bias is not None or layer.norm is not None
    found = Sum(quantizer.bits, min(low, 0), max(high, 0), quantizer.centred, biased)
    least = found.reach + (2 + found.bias_limit if biased else 0)
    if found.room < least:
        needed = next(p for p in range(2, 80) if _holds(replace(found, bits=p)))
        raise FormatError(
            f"layer {layer.path or type(layer).__name__!r} has accumulator={quantizer.bits}, which cannot hold one "
            f"weight code times its input's codes {low} to {high}{' and a bias' if biased else ''}, expected at least "
            f"{needed} bits; widen the accumulator or narrow the input"
        )
    quantizer.sum = found
    return found


def _holds(candidate: Sum) -> bool:
    return candidate.room >= candidate.reach + (2 + candidate.bias_limit if candidate.biased else 0)


def _exponents(quantizer: AccumulatorQuantizer) -> Tensor:
    """Fractional bits, float64, rounded with a straight-through gradient."""
    frac = quantizer.frac.double()
    return frac + (frac.detach().round() - frac.detach())


def limit(layer: WeightedLayer, quantizer: AccumulatorQuantizer, weight: Tensor, bias: Tensor | None) -> Limit:
    """The factors that keep a layer's bound.

    Args:
        layer: The layer; its input's binary point need not be set yet (the bias is then left out of account).
        quantizer: Its weights' quantiser.
        weight: Folded weights (real numbers).
        bias: Folded bias, float64, or None.
    """
    goal = sum_of(layer, quantizer)
    norms = _folded_norms(layer, quantizer, weight)
    one = torch.ones_like(norms)
    if not quantizer.ready:
        return Limit(one, one, _constant(layer, bias))
    points = _exponents(quantizer).expand(norms.shape)
    steps = torch.exp2(points)
    codes = norms * steps
    source = layer.known_source()
    if bias is None or not source.ready:
        shrink = (goal.caps(None) / codes).clamp_max(1.0)
        return Limit(shrink, shrink, _constant(layer, bias))
    unit = steps * 2.0 ** source.exponent()
    top = float(goal.bias_limit)
    constant = _constant(layer, bias)
    assert constant is not None
    offset = (constant * unit).clamp(-top, top)
    load = codes * goal.factor
    slope: Tensor | float = 0.0
    if layer.norm is None:
        shrink = ((goal.room - 1 - offset.abs()) / load).clamp_max(1.0)
    else:
        slope = (bias - constant) * unit
        # Where a side does not rise with k, any k will do: the quotient by a tiny number is more than 1.
        sides = (((goal.room - 1 - s * offset) / (load + s * slope).clamp_min(TINY)) for s in (1.0, -1.0))
        shrink = torch.minimum(*sides).clamp_max(1.0)
    rounded = layer.rounded_bias((offset + shrink * slope) / unit)
    exact = torch.ldexp(rounded.detach(), layer.accumulator_exponents()).expand(norms.shape)
    return Limit((goal.caps(exact) / codes).clamp_max(1.0), shrink, offset / unit)


def _folded_norms(layer: WeightedLayer, quantizer: AccumulatorQuantizer, weight: Tensor) -> Tensor:
    """`row_norms` of the folded weights, positive: from what `AccumulatorQuantizer.real` made them, where it did."""
    if not bool(quantizer.started):
        return row_norms(weight, quantizer.axis, quantizer.centred).clamp_min(TINY)
    norms, scale = quantizer.norms(), layer.folding_scale()
    return norms if scale is None else (norms * scale.abs()).clamp_min(TINY)


def _constant(layer: WeightedLayer, bias: Tensor | None) -> Tensor | None:
    """The part of the folded bias that a batch norm's scale does not multiply."""
    if bias is None or layer.norm is None:
        return bias
    return torch.zeros_like(bias) if layer.norm.bias is None else layer.norm.bias.double()


def limited(
    layer: WeightedLayer, quantizer: AccumulatorQuantizer, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Folded weights and bias, shrunk so that their codes keep the bound.

    Before the first calibration or training step the binary point is set here.
    """
    if not quantizer.ready:
        sum_of(layer, quantizer)
        quantizer._settle(weight)
    found = limit(layer, quantizer, weight, bias)
    weight = weight * quantizer.along(found.weights.to(weight.dtype), weight)
    if bias is None or found.offset is None:
        return weight, bias
    return weight, found.offset + found.batch_norm * (bias - _constant(layer, bias))


@torch.compiler.disable  # its statistics move between two uses, which a graph that is cut there cannot differentiate
def limited_batch_statistics(
    layer: WeightedLayer, quantizer: AccumulatorQuantizer, x: Tensor, norm: BatchNorm
) -> Tensor:
    """The layer and its batch norm with the batch's statistics, as large as the deployed layer's result will be.

    ``beta + k * (y - beta)`` of the batch norm's y is the batch norm of scale ``k * gamma`` and offset beta.

    Args:
        layer: The layer, a batch norm folded into it.
        quantizer: Its weights' quantiser.
        x: Input, float32.
        norm: The batch norm.
    """
    real = layer.real_weight()
    if quantizer.observing:
        y = layer.apply_weight(x, real.float(), layer.bias)
        ahead = layer.next_quantizer if layer.quantizes_ahead else None
        return norm.normalize(y) if ahead is None else norm.normalize_quantized(y, ahead)
    weight, bias = layer.folded(real)
    if not quantizer.ready:
        sum_of(layer, quantizer)
        quantizer._settle(weight)
    found = limit(layer, quantizer, weight, bias)
    scale = layer.folding_scale()
    assert scale is not None and bias is not None and found.offset is not None
    factor = (found.weights * scale).detach().float()
    factor = torch.where(factor == 0.0, 1.0, factor)
    y = layer.apply_weight(x, quantizer.folded(real, factor).float(), layer.bias)
    gamma = found.weights.float() if norm.weight is None else (found.weights * norm.weight.double()).float()
    beta, momentum = found.offset.float(), count_batch(norm, y)
    if layer.quantizes_ahead:
        assert layer.next_quantizer is not None
        running = norm.running_mean, norm.running_var, momentum, norm.eps
        return layer.next_quantizer.normalized(y, gamma, beta, *running)
    return functional.batch_norm(y, norm.running_mean, norm.running_var, gamma, beta, True, momentum, norm.eps)


@torch.no_grad()
def project_weights(layer: WeightedLayer, quantizer: AccumulatorQuantizer) -> None:
    """Puts the layer's weights onto the bound, the nearest point of it for each output: the Euclidean-projection start.

    Outputs whose batch norm has the scale 0 keep theirs.
    """
    goal = sum_of(layer, quantizer)
    weight, bias = layer.folded()
    points = _exponents(quantizer).expand(layer.outputs)
    code = torch.zeros(layer.outputs, dtype=torch.float64)
    if bias is not None:
        code = torch.ldexp(layer.rounded_bias(bias), layer.accumulator_exponents()).expand(layer.outputs)
        code = code.abs().clamp_max(float(goal.bias_limit))
    # Within the caps, and within the inequality that limits a batch norm, so that neither shrinks what starts here.
    radius = torch.minimum(goal.caps(code), (goal.room - 1.0 - code) / max(goal.factor, 0.5)) * torch.exp2(-points)
    rows = weight.double().movedim(quantizer.axis, 0)
    flat = project_onto_ball(rows.flatten(1), radius, quantizer.centred)
    projected = flat.view(rows.shape).movedim(0, quantizer.axis)
    found = layer.folding_scale()
    scale = torch.ones(layer.outputs, dtype=torch.float64) if found is None else found
    wide = quantizer.along(scale, weight)
    layer.weight.copy_(torch.where(wide == 0.0, layer.weight.double(), projected / torch.where(wide == 0.0, 1.0, wide)))
    quantizer.start(layer.weight)


def accumulator_penalty(module: nn.Module) -> Tensor:
    """How far the learned norms lie above what their accumulators allow: add it to the loss, times 1e-3 or so.

    ``sum over layers and outputs of max(log2 g - log2 cap, 0)`` (arXiv 2308.13504, equation 22): above the cap the
    clamp stops the gradient of g, and this brings g back to where it learns.

    Args:
        module: The result of `edgemat.quantize`, or a module of edgemat.nn layers.

    Returns:
        A scalar, 0 where no layer bounds its accumulator.

    Raises:
        FormatError: for a float network, in which no sum can be bounded, or for what is no module.
    """
    from edgemat.nn.arguments import quantized
    from edgemat.nn.weighted_layer import WeightedLayer

    quantized("accumulator_penalty", module)

    total = torch.zeros(())
    for layer in module.modules():
        quantizer = layer.weight_quantizer if isinstance(layer, WeightedLayer) else None
        if isinstance(layer, WeightedLayer) and isinstance(quantizer, AccumulatorQuantizer) and quantizer.ready:
            goal = sum_of(layer, quantizer)
            weight, bias = layer.folded()
            norms = _folded_norms(layer, quantizer, weight)
            code = None
            if bias is not None and layer.known_source().ready:
                with torch.no_grad():
                    code = torch.ldexp(layer.rounded_bias(bias), layer.accumulator_exponents())
                    code = code.clamp(-goal.bias_limit, goal.bias_limit).expand(norms.shape)
            caps = goal.caps(code).log2() - _exponents(quantizer)
            total = total + (norms.log2() - caps).clamp_min(0.0).sum().float()
    return total
