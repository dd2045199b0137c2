"""The quantisers in plain tensor operations, for `torch.compile`: its compiler fuses them with what stands around them.

The eager layers call one native pass for each quantiser, which a compiler cannot look into. Here the same arithmetic,
exact in the same carriers, is written in operations that it can fuse into its own passes over the data, in the memory
layout it has chosen, and binary points stay tensors: nothing is read from them, so nothing breaks the graph. What eager
refuses by a message that needs a number is asserted (`check`): a quantiser whose binary point left the range of a
float, a bias that saturates, and sums beyond the carrier that the widths of a layer's operands prove.

Every value is exact, so a compiled step has the bits of an eager one wherever the statistics of a batch are not in it:
these are real numbers, and each compiler sums them in an order of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgemat.nn.rounding import (
    EXPONENT_LIMIT,
    LN2,
    Grid,
    overflow_,
    power_of_two,
    round_doubled_,
)

_KEPT = 16  # more elements than the compiler unrolls a reduction of
_HOPELESS = 1 << 30  # sums that could reach this are not tried in float32


def compiling() -> bool:
    """Whether `torch.compile` is tracing; `torch.export`, which leads to ONNX, does not count."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def check(good: Tensor, message: str) -> None:
    """Raises `message` when the compiled step runs and `good` is false."""
    torch._assert_async(good, message)


# -- activations and factors --------------------------------------------------------------------------------------
def factors(frac: Tensor, like: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """``2**(f + 1)`` and ``2**-f``, laid along `axis` of `like` (None: one binary point), in its dtype."""
    points = frac.detach().float().round()
    check(
        (points.abs() <= EXPONENT_LIMIT).all(),
        f"a quantiser learned fractional bits beyond +-{EXPONENT_LIMIT}; lower the learning rate of the binary points",
    )
    exponents = points.to(torch.int32)
    both = power_of_two(torch.stack([exponents + 1, -exponents]), like.dtype)
    # The compiler keeps the result of a reduction in memory; otherwise every element would compute its factors anew.
    double, step = both.expand(_KEPT, *both.shape).amax(0)
    if axis is None:
        return double, step
    shape = [1] * like.dim()
    shape[axis] = -1
    return double.view(shape), step.view(shape)


def _rounded(x: Tensor, double: Tensor, step: Tensor, grid: Grid, relu: bool) -> tuple[Tensor, Tensor]:
    """Whether overflow left the integers alone, and values."""
    low = max(grid.low, 0) if relu and grid.overflow in ("SAT", "SAT_SYM") else grid.low
    if relu and low == grid.low:
        x = x.clamp_min(0.0)
    rounded = round_doubled_(x * double, grid.rounding)
    codes = overflow_(rounded.clone(), grid, low)
    return codes == rounded, codes * step


def _one(g: Tensor) -> Tensor:
    """1, read from the gradient: what is computed with it belongs to the backward pass.

    Otherwise the compiler would take what both passes compute alike into the forward one and keep a mask for each
    quantiser, which costs more than to compute it again.
    """
    first = g.detach().reshape(-1)[:1].sum()
    return torch.where(first > 0, 1.0, torch.ones_like(first))


class Quantize(torch.autograd.Function):
    """``v`` from `x` and the learned `frac`, one or (with `axis`) one per channel; keeps only x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frac: Tensor, grid: Grid, relu: bool, axis: int | None) -> Tensor:
        work = x if x.dtype == torch.float64 or grid.carrier == torch.float32 else x.double()
        double, step = factors(frac, work, axis)
        ctx.save_for_backward(x, frac, double, step)
        ctx.setting = grid, relu, axis
        return _rounded(work, double, step, grid, relu)[1].to(grid.carrier)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grid, relu, axis = ctx.setting
        x, frac, double, step = ctx.saved_tensors
        work = x.to(double.dtype)
        g = grads[0].to(work.dtype)
        kept, y = _rounded(work, double * _one(g), step, grid, relu)
        inside = g if grid.overflow == "WRAP" else torch.where(kept, g, 0.0)
        if relu:
            inside = torch.where(work > 0, inside, 0.0)
        if grid.overflow == "WRAP":
            return inside.to(x.dtype), torch.zeros_like(frac), None, None, None
        terms = inside * work - g * y
        # Summed by channel first: the compiler then takes the sums of a batch norm in the same pass.
        channel = (1 if x.dim() > 1 else 0) if axis is None else axis % x.dim()
        axes = [d for d in range(x.dim()) if d != channel]
        sums = terms.sum(axes) if axes else terms
        df = LN2 * (sums.sum() if axis is None else sums)
        return inside.to(x.dtype), df.to(frac.dtype), None, None, None


def quantize(x: Tensor, frac: Tensor, grid: Grid, relu: bool = False, axis: int | None = None) -> Tensor:
    """Quantises `x` as `edgemat.nn.rounding.QuantizeTensor` (`axis` None) or `QuantizeChannels` do."""
    return Quantize.apply(x, frac, grid, relu, axis)


# -- weights ------------------------------------------------------------------------------------------------------
class Fold(torch.autograd.Function):
    """``Q(w * scale) / scale`` by row, the scale being that of a batch norm, ``gamma / sqrt(var + eps)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frac: Tensor, gamma: Tensor | None, var: Tensor, eps: float, grid: Grid) -> Tensor:
        scale = torch.rsqrt(var.double() + eps)
        scale = (scale if gamma is None else scale * gamma.double()).float()
        scale = torch.where(scale == 0.0, 1.0, scale)
        double, step = factors(frac.expand(scale.shape), scale, 0)
        ctx.save_for_backward(x, double * scale, step / scale)
        ctx.grid = grid
        return _rows(x, double * scale, step / scale, grid)[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, double, step = ctx.saved_tensors
        grid = ctx.grid
        kept, y = _rows(x, double, step, grid)
        g = grads[0].to(x.dtype)
        inside = torch.where(kept, g, 0.0)
        return inside, LN2 * (inside * x - g * y).flatten(1).sum(1), None, None, None, None


def _rows(x: Tensor, double: Tensor, step: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    shape = [-1, *[1] * (x.dim() - 1)]
    return _rounded(x, double.view(shape), step.view(shape), grid, False)


def fold(x: Tensor, frac: Tensor, grid: Grid, norm: tuple[Tensor | None, Tensor, float]) -> Tensor:
    """Weights as they are deployed with a batch norm (gamma, running variance, eps) folded in, at their own size."""
    return Fold.apply(x, frac, *norm, grid)


class Carried(torch.autograd.Function):
    """A bias on the grid ``2**-exponents`` in `kind`, its gradient passed through."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, codes: Tensor, exponents: Tensor, kind: torch.dtype) -> Tensor:
        return (codes * power_of_two(-exponents, torch.float64)).to(kind)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].float(), None, None, None


def parameters(
    weight: Tensor, frac: Tensor, bias: Tensor | None, source: Tensor, grid: Grid, sizes: tuple[int, int], narrow: bool
) -> tuple[Tensor, Tensor | None, int]:
    """Weights and biases as deployed, and the first LSB that the carrier of their sums does not hold.

    The carrier is float32 where the widths prove it or the layer's last eager step had sums of half its reach; sums
    of more than it holds, and a bias that saturates, are refused.

    Args:
        weight: The outputs on axis 0.
        frac: Fractional bits of the weights, one or one per output.
        bias: One number per output, or None.
        source: Fractional bits of the layer's input.
        grid: The weights' grid.
        sizes: Bits of the bias, largest absolute code of the input.
        narrow: Whether float32 held the sums of the last eager step with a bit to spare, or there was none.
    """
    fan_in = weight[0].numel()
    bias_width, reach = sizes
    static = fan_in * reach * grid.magnitude
    top = 1 << 24 if static < 1 << 24 or (narrow and static < _HOPELESS) else 1 << 53
    kind = torch.float32 if top == 1 << 24 else torch.float64
    axis = 0 if frac.dim() else None
    w = quantize(weight, frac, grid, axis=axis)
    with torch.no_grad():
        double, _ = factors(frac, w, axis)
        sums = (w * (double * 0.5)).abs().flatten(1).sum(1, dtype=torch.float64).amax() * reach
    b = None
    if bias is not None:
        with torch.no_grad():
            exponents = (frac.round() + source.round()).to(torch.int64)
            doubled = bias.double() * power_of_two(exponents + 1, torch.float64)
            limit = float(1 << (bias_width - 1))
            codes = round_doubled_(doubled, "RND").clamp(-limit, limit - 1)
            offset = codes.abs().amax()
            sums = sums + offset
        check(
            offset < limit - 1,
            f"a compiled layer has a bias that saturates its {bias_width} bits, where it has no gradient; run this "
            "model without torch.compile, or widen the bias",
        )
        b = Carried.apply(bias, codes, exponents, kind)
    check(
        sums < top,
        f"a compiled layer has partial sums of {top} LSBs and more, which its carrier does not hold exactly; run one "
        "step without torch.compile, from which the layer learns to take float64, or narrow the input or the weights",
    )
    return w.to(kind), b, top


# -- batch norms --------------------------------------------------------------------------------------------------
@torch.no_grad()
def move_statistics(norm: Any, mean: Tensor, var: Tensor) -> None:
    """Counts a batch and moves the running statistics of `norm` towards its mean and unbiased variance."""
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    weight = momentum if momentum is not None else 1.0 / norm.num_batches_tracked.to(mean.dtype)
    norm.running_mean.lerp_(mean, weight)
    norm.running_var.lerp_(var, weight)


def batch_statistics(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a batch per channel (axis 1); counts it and moves the running ones of `norm`."""
    var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
    count = x.numel() // x.shape[1]
    move_statistics(norm, mean, var * (count / (count - 1)))
    return mean, var


def normalize(norm: Any, x: Tensor) -> Tensor:
    """A training batch norm over axis 1."""
    mean, var = batch_statistics(norm, x)
    shape = [1, -1] + [1] * (x.dim() - 2)
    factor = torch.rsqrt(var + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight
    y = (x - mean.view(shape)) * factor.view(shape)
    return y if norm.bias is None else y + norm.bias.view(shape)


# -- sums of two tensors ------------------------------------------------------------------------------------------
def aligned_sum(x: Tensor, y: Tensor, fx: Tensor, fy: Tensor, reach: int, sign: int) -> Tensor:
    """``x + sign * y`` of codes that reach `reach` together, refused where float32 does not hold twice their sum.

    The aligned sum is meant, and twice, so that half an LSB of a coarser grid can be added to it exactly.
    """
    spread = ((1 << 23) - 1) // reach
    room = spread.bit_length() - 1
    points = torch.cat([fx.detach().reshape(-1), fy.detach().reshape(-1)]).round()
    check(
        points.amax() - points.amin() <= room,
        f"a compiled sum of two tensors has binary points more than {room} bits apart, beyond which float32 does not "
        "hold it; run this model without torch.compile, or give its operands nearer formats",
    )
    return torch.add(x, y, alpha=sign)
