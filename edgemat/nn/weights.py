"""Weights and biases of a training step, quantised in one pass and one autograd function per layer.

The functions of `rounding` do the same one tensor at a time; here a layer with the common formats (half up, saturating,
a learned binary point per output) gets its weights, its bias and the bound of its accumulator from one native call.
Each entry gives None where that is not possible, and the layer then goes the general way. The bits are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgemat.nn import native
from edgemat.nn.rounding import Grid, quantize_rows, rows_gradients

FLOAT32_EXACT = 1 << 24


class _Folded(torch.autograd.Function):
    """``Q(w * scale) / scale`` with a batch norm's scale; `kept` is what `quantize_rows` gave."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, frac: Tensor, grid: Grid, kept: tuple[Tensor, Tensor, float]) -> Tensor:
        y, twice, _ = kept
        ctx.grid = grid
        ctx.save_for_backward(weight, y, twice)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, y, twice = ctx.saved_tensors
        return *rows_gradients(grads[0].to(torch.float32), weight, y, twice, ctx.grid), None, None


def folded_weight(weight: Tensor, frac: Tensor, grid: Grid, norm: tuple[Tensor | None, Tensor, float]) -> Tensor | None:
    """``Q(w * scale) / scale``, the scale being ``gamma / sqrt(running_var + eps)`` of `norm`."""
    found = quantize_rows(weight.detach(), frac.detach(), grid, *norm)
    return None if found is None else _Folded.apply(weight, frac, grid, found)


class _Parameters(torch.autograd.Function):
    """Weight and bias on their grids."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, frac: Tensor, bias: Tensor, grid: Grid, kept: tuple[Tensor, Tensor], b: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.grid = grid
        ctx.save_for_backward(weight, *kept)
        return kept[0], b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g, db = (grad.to(torch.float32) for grad in grads)
        weight, y, twice = ctx.saved_tensors
        return *rows_gradients(g, weight, y, twice, ctx.grid), db, None, None, None


def layer_parameters(
    weight: Tensor, frac: Tensor, grid: Grid, bias: Tensor | None, bias_grid: Grid, exponent: int
) -> tuple[Tensor, Tensor | None, float, float] | None:
    """Weight and bias of a layer without batch norm.

    Args:
        weight: Weights, the outputs on axis 0.
        frac: Fractional bits per output.
        grid: The weights' grid.
        bias: One number per output, or None.
        bias_grid: The biases' grid.
        exponent: Fractional bits of the layer's input.

    Returns:
        Weights (float32); biases (float32 where they are exact in it, else float64) or None; the largest sum of an
        output's absolute weight codes; the largest absolute bias code.
    """
    found = quantize_rows(weight.detach(), frac.detach(), grid)
    if found is None:
        return None
    y, twice, most = found
    if bias is None:
        return _Folded.apply(weight, frac, grid, found), None, most, 0.0
    passes = native.kernel(bias)
    if passes is None:
        return None
    values = torch.empty(bias.shape, dtype=torch.float64)
    places = values.data_ptr(), bias.data_ptr(), frac.data_ptr()
    sizes = frac.numel(), bias.numel(), exponent, bias_grid.low, bias_grid.high
    reach = passes.edgemat_quantize_bias(*places, *sizes)
    # A saturated bias has no gradient: that is the general way's business.
    if not 0 <= reach < min(-bias_grid.low, bias_grid.high):
        return None
    b = values.float() if reach < FLOAT32_EXACT else values
    w, b = _Parameters.apply(weight, frac, bias, grid, (y, twice), b)
    return w, b, most, reach
