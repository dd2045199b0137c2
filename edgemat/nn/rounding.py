"""Exact rounding and overflow of torch tensors, and the straight-through gradients of QFX.

With ``s = 2**f`` a value becomes ``v = overflow(round(x * s)) / s``. Every step is exact in the carrier: ``s`` is a
power of two, and each rounding mode is built from ``floor``, ``ceil`` and ``trunc`` of exactly doubled values, because
the usual ``floor(v + 0.5)`` rounds 0.49999997 up. Where the format is unsigned, ``floor(v + 0.49999997)`` is exact for
every float32 ``v`` (its one wrong tie, -0.5, is clamped anyway) and saves two passes.

Gradients (`docs/numerics.md`, straight-through gradients): in range ``dv/dx = 1`` and ``dv/df = ln2 * (x - v)``;
outside ``dv/dx = 0`` and ``dv/df = -ln2 * v`` (SAT_ZERO has ``v = 0`` there). Summed over a tensor with incoming
gradient ``g`` this is ``ln2 * (<g * inside, x> - <g, v>)``: two dot products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgemat.errors import FormatError
from edgemat.formats import OVERFLOWS, ROUNDINGS, Fixed
from edgemat.nn import native

LN2 = math.log(2.0)
EXPONENT_LIMIT = 120
_BELOW_HALF = torch.tensor(float(np.nextafter(np.float32(0.5), np.float32(0.0))))


@dataclass(frozen=True)
class Grid:
    """The part of a format that does not learn: width, rails and modes."""

    width: int
    signed: bool
    rounding: str
    overflow: str
    low: int
    high: int

    @classmethod
    def of(cls, fmt: Fixed) -> Grid:
        """The grid of a format, its binary point left open."""
        low, high = fmt.rails
        return cls(fmt.width, fmt.signed, fmt.rounding, fmt.overflow, low, high)

    def numbers(self) -> list[int]:
        """Width, signedness and modes as integers, which operators of `torch.library` can take."""
        return [self.width, int(self.signed), ROUNDINGS.index(self.rounding), OVERFLOWS.index(self.overflow)]

    @classmethod
    @lru_cache(maxsize=1024)
    def from_numbers(cls, width: int, signed: int, rounding: int, overflow: int) -> Grid:
        """The grid that `numbers` wrote."""
        return cls.of(Fixed(width, None, bool(signed), ROUNDINGS[rounding], OVERFLOWS[overflow]))

    @property
    def carrier(self) -> torch.dtype:
        """float32 where it holds every code, else float64."""
        return torch.float32 if self.width <= 24 else torch.float64

    @property
    def common(self) -> bool:
        """Whether this is the common case that has single passes: half up, saturating, exact in float32 with room."""
        return self.rounding == "RND" and self.overflow in ("SAT", "SAT_SYM") and self.width <= 22

    @property
    def magnitude(self) -> int:
        """Largest absolute code."""
        return max(-self.low, self.high)


def power_of_two(exponent: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``2**exponent`` from its bit pattern, exact where ``exp2`` and ``pow`` need not be.

    Args:
        exponent: Integer tensor within the normal range of `dtype`.
        dtype: float32 or float64.
    """
    if dtype == torch.float64:
        return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def channel_factors(frac: Tensor, like: Tensor, axis: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``2**(f + 1)`` and ``2**-f`` per channel, laid along `axis` of `like`, in its dtype.

    Args:
        frac: Fractional bits, rounded half to even here; shape ``[channels]``.
        like: The tensor the factors will multiply.
        axis: The channel axis.
        scale: A factor per channel that multiplies before rounding and divides afterwards, or None.
    """
    shape = [1] * like.dim()
    shape[axis] = -1
    if frac.device.type != "cpu" or torch.compiler.is_compiling():
        # Also where a compiler traces: what it puts in numpy's place gives ldexp of a number the wrong shape.
        exponents = frac.detach().float().round().to(torch.int32)
        double = power_of_two(exponents + 1, like.dtype)
        step = double.reciprocal().mul_(2.0)
    else:
        # A handful of numbers: numpy needs a fraction of the time of as many torch calls. ldexp is exact.
        bits = np.rint(frac.detach().numpy()).astype(np.int32)
        if np.abs(bits.astype(np.int64)).max(initial=0) > EXPONENT_LIMIT:
            raise FormatError(
                f"fractional bits from {bits.min()} to {bits.max()} were learned, expected within +-{EXPONENT_LIMIT}; "
                "lower the learning rate of the binary points"
            )
        kind = np.float64 if like.dtype == torch.float64 else np.float32
        double, step = (torch.from_numpy(np.ldexp(kind(1), e)) for e in (bits + 1, -bits))
    if scale is not None:
        double, step = double * scale, step / scale
    return double.view(shape), step.view(shape)


def round_doubled_(twice: Tensor, rounding: str) -> Tensor:
    """Rounds half of `twice` to integers, in place and exactly for every finite float.

    Args:
        twice: Twice the values to round, float32 or float64; overwritten.
        rounding: One of ``edgemat.formats.ROUNDINGS``.
    """
    if rounding == "RND":
        return twice.floor_().mul_(0.5).ceil_()
    if rounding == "RND_MIN_INF":
        return twice.ceil_().mul_(0.5).floor_()
    if rounding == "RND_CONV":
        return twice.mul_(0.5).round_()
    if rounding == "TRN":
        return twice.mul_(0.5).floor_()
    if rounding == "TRN_ZERO":
        return twice.mul_(0.5).trunc_()
    magnitude = twice.abs()
    if rounding == "RND_INF":
        magnitude.floor_().mul_(0.5).ceil_()
    elif rounding == "RND_ZERO":
        magnitude.ceil_().mul_(0.5).floor_()
    else:
        raise FormatError(f"rounding is {rounding!r}, expected a mode of edgemat.formats.ROUNDINGS")
    return magnitude.copysign_(twice)


def overflow_(codes: Tensor, grid: Grid, low: int) -> Tensor:
    """Brings integral floats into `low`..`grid.high` by the grid's overflow mode, in place where possible."""
    if grid.overflow == "SAT_ZERO":
        return codes.masked_fill_((codes < low) | (codes > grid.high), 0.0)
    if grid.overflow == "WRAP":
        modulus = math.ldexp(1.0, grid.width)
        codes = codes.remainder_(modulus)
        return torch.where(codes > grid.high, codes - modulus, codes)
    return codes.clamp_(low, grid.high)


def quantize_codes(x: Tensor, grid: Grid, scale: float | Tensor, relu: bool) -> Tensor:
    """Integral floats ``overflow(round(x * scale))`` in a fresh tensor.

    Args:
        x: float32, or float64 where the codes or the values need it.
        grid: Width and modes.
        scale: ``2**f``; a tensor broadcasts against `x` and has its dtype.
        relu: Whether negative values become 0 first.
    """
    low = max(grid.low, 0) if relu else grid.low
    clamps = grid.overflow in ("SAT", "SAT_SYM")
    if relu and not clamps:
        x = x.clamp_min(0.0)
    if (
        low == 0
        and grid.rounding == "RND"
        and grid.overflow != "WRAP"
        and grid.width <= 22
        and x.dtype == torch.float32
        and isinstance(scale, float)
    ):
        codes = torch.add(_BELOW_HALF, x, alpha=scale).floor_()
    else:
        codes = round_doubled_(x * (scale * 2), grid.rounding)
    return overflow_(codes, grid, low)


@lru_cache(maxsize=4096)
def open_interval(grid: Grid, exponent: int, relu: bool, double: bool) -> tuple[float, float]:
    """Floats ``(a, b)`` such that `x` rounds into the rails exactly if ``a < x < b``.

    Args:
        grid: Width and modes.
        exponent: The fractional bits f.
        relu: Whether x <= 0 counts as outside.
        double: Whether x is float64.
    """
    low, high, mode = grid.low, grid.high, grid.rounding
    if mode == "TRN":
        bottom, with_bottom, top, with_top = float(low), True, high + 1.0, False
    elif mode == "TRN_ZERO":
        bottom, with_bottom, top, with_top = low - 1.0, False, high + 1.0, False
    else:
        bottom, top = low - 0.5, high + 0.5
        with_bottom = mode in ("RND", "RND_ZERO") or (mode == "RND_CONV" and low % 2 == 0)
        with_top = mode in ("RND_MIN_INF", "RND_ZERO") or (mode == "RND_CONV" and high % 2 == 0)
    bottom, top = math.ldexp(bottom, -exponent), math.ldexp(top, -exponent)
    kind = np.float64 if double else np.float32
    with np.errstate(over="ignore"):
        a = kind(bottom)
        if float(a) > bottom or (with_bottom and float(a) == bottom):
            a = np.nextafter(a, kind(-np.inf))
        b = kind(top)
        if float(b) < top or (with_top and float(b) == top):
            b = np.nextafter(b, kind(np.inf))
    return (max(float(a), 0.0) if relu else float(a)), float(b)


def quantize_rows(
    x: Tensor, frac: Tensor, grid: Grid, gamma: Tensor | None = None, var: Tensor | None = None, eps: float = 0.0
) -> tuple[Tensor, Tensor, float] | None:
    """A weight quantised row by row in one native pass; None where eager torch must do it (and report what is wrong).

    Args:
        x: Weights, the rows on axis 0.
        frac: Fractional bits per row.
        grid: A common grid (`Grid.common`).
        gamma: A factor per row before rounding, divided out afterwards; with `var` that of a batch norm.
        var: Running variance: the factor is ``gamma / sqrt(var + eps)``, 1 where that is 0.
        eps: Added to the variance.

    Returns:
        The values, ``2**(f + 1)`` times the factor per row (for `rows_gradients`), and the largest sum of a row's
        absolute codes.
    """
    passes = native.kernel(x, frac, *(t for t in (gamma, var) if t is not None))
    if passes is None:
        return None
    rows = x.shape[0]
    y, factors = torch.empty_like(x), torch.empty(2, rows)
    twice = factors.data_ptr()
    places = y.data_ptr(), twice, twice + 4 * rows, x.data_ptr(), frac.data_ptr()
    folded = (None if gamma is None else gamma.data_ptr(), None if var is None else var.data_ptr(), eps)
    sizes = rows, x.numel() // max(rows, 1), grid.low, grid.high, torch.get_num_threads()
    most = passes.edgemat_quantize_rows(*places, *folded, *sizes)
    return None if most < 0 else (y, factors[0], most)


def rows_gradients(g: Tensor, x: Tensor, y: Tensor, twice: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Gradients of x and frac of `quantize_rows`."""
    g = g.contiguous()
    passes = None if torch.is_grad_enabled() else native.kernel(g, x, y)
    rows = x.shape[0]
    if passes is None:
        rounded = round_doubled_(x.detach() * twice.view(-1, *[1] * (x.dim() - 1)), grid.rounding)
        inside = torch.ops.aten.hardtanh_backward(g, rounded, grid.low - 0.5, grid.high + 0.5)
        return inside, LN2 * (inside * x - g * y).reshape(rows, -1).sum(1)
    inside, df = torch.empty_like(x), torch.empty(rows)
    pointers = (t.data_ptr() for t in (inside, df, g, x, y, twice))
    sizes = rows, x.numel() // max(rows, 1), grid.low, grid.high, torch.get_num_threads()
    passes.edgemat_quantize_rows_backward(*pointers, *sizes)
    return inside, df


class QuantizeTensor(torch.autograd.Function):
    """One binary point for the whole tensor: ``v`` from `x` and the learned `frac`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frac: Tensor, grid: Grid, exponent: int, relu: bool) -> Tensor:
        ctx.setting = grid, exponent, relu
        passes = native.kernel(x) if grid.common and any(ctx.needs_input_grad) else None
        if passes is not None:
            y = torch.empty_like(x)
            low = max(grid.low, 0) if relu else grid.low
            scale, mode = math.ldexp(1.0, exponent), int(low == 0)
            passes.edgemat_quantize(
                y.data_ptr(), x.data_ptr(), x.numel(), scale, 1.0 / scale, low, grid.high, mode, torch.get_num_threads()
            )
        else:
            work = x if x.dtype == torch.float64 or grid.carrier == torch.float32 else x.double()
            codes = quantize_codes(work, grid, math.ldexp(1.0, exponent), relu)
            y = codes.to(grid.carrier).mul_(math.ldexp(1.0, -exponent))
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(x, y)
        elif ctx.needs_input_grad[0]:
            ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grid, exponent, relu = ctx.setting
        x = ctx.saved_tensors[0]
        g = grads[0].to(x.dtype)
        if grid.overflow == "WRAP":
            return (g * (x > 0) if relu else g), None, None, None, None
        low, high = open_interval(grid, exponent, relu, x.dtype == torch.float64)
        df = None
        g = g.contiguous()
        passes = None if torch.is_grad_enabled() else native.kernel(g, *ctx.saved_tensors)
        if passes is not None:
            inside, y = torch.empty_like(x), ctx.saved_tensors[-1]
            pointers = (t.data_ptr() for t in (inside, g, x, y))
            total = passes.edgemat_quantize_backward(*pointers, x.numel(), low, high, torch.get_num_threads())
            df = torch.tensor(LN2 * total) if ctx.needs_input_grad[1] else None
            return (inside if ctx.needs_input_grad[0] else None), df, None, None, None
        inside = torch.ops.aten.hardtanh_backward(g, x, low, high)
        if ctx.needs_input_grad[1]:
            y = ctx.saved_tensors[1].to(x.dtype)
            df = LN2 * (_dot(inside, x) - _dot(g, y))
        return (inside if ctx.needs_input_grad[0] else None), df, None, None, None


class QuantizeChannels(torch.autograd.Function):
    """One binary point per channel along `axis`: ``v`` from `x` and the learned `frac` of shape ``[channels]``.

    With `scale` (one per channel, not 0) the result is ``v(x * scale) / scale``: weights as they are deployed with a
    batch norm folded in, brought back to their own size. The chain rule cancels the scale in both gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frac: Tensor, grid: Grid, points: Tensor, axis: int, relu: bool, scale: Tensor | None
    ) -> Tensor:
        ctx.setting = grid, axis, relu
        plain = grid.common and not relu and axis == 0 and all(ctx.needs_input_grad[:2])
        found = quantize_rows(x, points, grid, scale) if plain else None
        ctx.single = found is not None
        if found is not None:
            y, double, _ = found
            ctx.save_for_backward(x, y, double)
            return y
        work = x if x.dtype == torch.float64 or grid.carrier == torch.float32 else x.double()
        double, step = channel_factors(points, work, axis, scale)
        if relu:
            work = work.clamp_min(0.0)
        rounded = round_doubled_(work * double, grid.rounding)
        needed = any(ctx.needs_input_grad[:2]) and grid.overflow != "WRAP"
        kept = rounded.clone() if needed and grid.overflow == "SAT_ZERO" else rounded
        codes = rounded.clamp(grid.low, grid.high) if needed and kept is rounded else overflow_(rounded, grid, grid.low)
        # A step divided by the scale is no power of two; its product is rounded in the carrier, as training may.
        y = codes.mul_(step).to(grid.carrier)
        if needed and ctx.needs_input_grad[1]:
            ctx.save_for_backward(kept, x, y)
        elif needed:
            ctx.save_for_backward(kept, x) if relu else ctx.save_for_backward(kept)
        elif relu:
            ctx.save_for_backward(rounded, x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grid, axis, relu = ctx.setting
        g = grads[0]
        saved = ctx.saved_tensors
        if ctx.single:
            x, y, twice = saved
            return *rows_gradients(g.to(x.dtype), x, y, twice, grid), None, None, None, None, None
        inside = g
        if saved and grid.overflow != "WRAP":
            inside = torch.ops.aten.hardtanh_backward(g.to(saved[0].dtype), saved[0], grid.low - 0.5, grid.high + 0.5)
        if relu:
            inside = inside * (saved[1] > 0)
        df = None
        if len(saved) == 3:
            x, y = saved[1:]
            axes = [d for d in range(x.dim()) if d != axis % x.dim()]
            df = (inside * x).sub_(g * y)
            df = LN2 * (df.sum(axes) if axes else df)
        return inside, df, None, None, None, None, None


class ReplaceForward(torch.autograd.Function):
    """Value `y` (exact, from a table) with the gradients of quantising `x` to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, frac: Tensor, grid: Grid, exponent: int) -> Tensor:
        ctx.setting = grid, exponent
        ctx.save_for_backward(x, y)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grid, exponent = ctx.setting
        x, y = ctx.saved_tensors
        g = grads[0].to(x.dtype)
        if grid.overflow == "WRAP":
            return g, None, None, None, None
        low, high = open_interval(grid, exponent, False, x.dtype == torch.float64)
        inside = torch.ops.aten.hardtanh_backward(g, x, low, high)
        df = LN2 * (_dot(inside, x) - _dot(g, y.to(x.dtype))) if ctx.needs_input_grad[2] else None
        return inside, None, df, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))


def range_frac(low: float, high: float, grid: Grid) -> int:
    """The largest number of fractional bits at which `low`..`high` round into the rails (0 for an all-zero range)."""
    if not (math.isfinite(low) and math.isfinite(high)):
        raise FormatError(f"values span {low} to {high}, expected finite numbers; clean the data or the weights")
    if grid.low == 0:
        low = 0.0
    largest = max(abs(low), abs(high))
    if largest == 0.0:
        return 0
    frac = grid.width + 1 - math.frexp(largest)[1]
    frac = min(frac, EXPONENT_LIMIT)
    while frac > -EXPONENT_LIMIT:
        a, b = open_interval(grid, frac, False, True)
        if (low > a or low == 0.0) and (high < b or high == 0.0):
            break
        frac -= 1
    return frac
