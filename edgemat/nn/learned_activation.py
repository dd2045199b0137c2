"""Activations whose widths are learned: `LearnedActivationQuantizer`.

Each tensor or channel learns its integer bits ``i`` (the sign not counted) and its fractional bits ``f``, both rounded
half to even; its codes have ``max(0, i + f)`` bits and, where the format is signed, a sign. The recipe's width is the
ceiling. Values saturate at ``high = 2**i - 2**-f`` and at ``low = -2**i`` (0 where unsigned), and the integer bits
learn by the gradient of that saturation, where HGQ (arXiv 2405.00645) wraps and follows the range: a rare large value
need not cost a bit.

Gradients: in range ``dv/dx = 1``, ``dv/df = ln2 * (x - v)``; above ``dv/di = ln2 * 2**i`` and ``dv/df = ln2 * 2**-f``;
below ``dv/di = -ln2 * 2**i``; each the derivative of the value that stands there. A channel of width 0 gives 0 and
keeps these gradients at its border, so that it lives again where the loss asks for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.nn import native
from edgemat.nn.emission import exporting
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.rounding import LN2, range_frac, round_doubled_

POINT_LIMIT = 60


def _blocks(x: Tensor, step: Tensor) -> tuple[int, int, int]:
    """Batch, channels and size of a channel's map; everything is one map where there is one step."""
    if step.dim() == 0:
        return 1, 1, x.numel()
    return x.shape[0], x.shape[1], x.numel() // max(x.shape[0] * x.shape[1], 1)


class _Saturated(torch.autograd.Function):
    """``clamp(round(x * 2**f) * 2**-f, low, high)``; gradients of x, of `frac` and of `whole`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        frac: Tensor,
        whole: Tensor,
        bounds: tuple[Tensor, ...],
        rounding: str,
        relu: bool,
        carrier: torch.dtype,
    ) -> Tensor:
        double, step, low, high, peak = bounds
        ctx.relu, ctx.shape = relu, frac.shape
        passes = native.kernel(x) if rounding == "RND" and any(ctx.needs_input_grad) else None
        if passes is not None:
            y = torch.empty_like(x)
            pointers = (t.data_ptr() for t in (y, x, double, step, low, high))
            passes.edgemat_saturate(*pointers, *_blocks(x, step), torch.get_num_threads())
            ctx.save_for_backward(x, y, step, low, high, peak)
            return y
        y = round_doubled_(x * double, rounding).mul_(step).clamp_(low, high)
        ctx.save_for_backward(x, y, step, low, high, peak)
        return y.float() if x.dtype == torch.float64 and carrier == torch.float32 else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, step, low, high, peak = ctx.saved_tensors
        g = grads[0].to(x.dtype).contiguous()
        passes = None if torch.is_grad_enabled() else native.kernel(g, x, y)
        if passes is not None:
            dx, df, dw = torch.empty_like(x), torch.empty(ctx.shape), torch.empty(ctx.shape)
            pointers = (t.data_ptr() for t in (dx, df, dw, g, x, y, step, low, high, peak))
            passes.edgemat_saturate_backward(*pointers, *_blocks(x, step), int(ctx.relu), torch.get_num_threads())
            return dx, df, dw, None, None, None, None
        error = x - y
        # Rounding moves a value by at most a step; beyond that, on a rail, it was clamped.
        half = step * 0.5
        above = (y == high) & (error >= half)
        below = (y == low) & ((x <= 0.0) if ctx.relu else (error < -half))
        outside = above | below
        dx = g.masked_fill(outside, 0.0)
        df = dw = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            axes = [d for d in range(x.dim()) if peak.dim() == 0 or peak.shape[d] == 1]
            over = (g * above).sum(axes, keepdim=True)
            df = (dx * error).sum(axes, keepdim=True) + over * step
            dw = over * peak
            if not ctx.relu:
                dw = dw - (g * below).sum(axes, keepdim=True) * peak
            df, dw = (LN2 * df).view(ctx.shape).float(), (LN2 * dw).view(ctx.shape).float()
        return dx, df, dw, None, None, None, None


class _Width(torch.autograd.Function):
    """``max(0, i + f)``, both rounded; each of them adds a bit where there is one."""

    @staticmethod
    def forward(ctx: Any, frac: Tensor, whole: Tensor, bits: Tensor) -> Tensor:
        ctx.save_for_backward(bits)
        return bits.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        live = grads[0] * (ctx.saved_tensors[0] > 0)
        return live, live, None


class LearnedActivationQuantizer(FixedQuantizer):
    """Rounds and saturates a tensor between layers, or a network input, to a learned width per tensor or channel.

    Attributes:
        frac: Fractional bits, a float parameter, ``[]`` or ``[channels]``.
        whole: Integer bits without the sign, a float parameter of the same shape.

    Args:
        format: Ceiling of the width, SAT or SAT_SYM. A stated binary point is the finest a channel may learn.
        channels: Number of channels with a width each, or None for one width.
        relu: Whether negative values become 0 first.
        role: ``"requantize"`` or ``"input"``.
    """

    def __init__(self, format: str | Fixed, channels: int | None = None, relu: bool = False, role: str = "requantize"):
        fmt = Fixed.parse(format) if isinstance(format, str) else format
        if fmt.bipolar or fmt.overflow not in ("SAT", "SAT_SYM") or fmt.per_channel or not fmt.signed < fmt.width <= 24:
            raise FormatError(
                f"an activation of learned width is {fmt}, expected one ceiling that saturates, of one bit "
                "beside the sign to 24 bits in all, such as 'fixed<8>'"
            )
        super().__init__(Fixed(fmt.width, None, fmt.signed, fmt.rounding, fmt.overflow), channels, 1, relu, role)
        self.finest_stated = POINT_LIMIT if fmt.int_bits is None else int(fmt.fracs[0])
        self.whole = nn.Parameter(torch.zeros_like(self.frac))
        self._aligned: tuple[int, int] | None = None
        if fmt.int_bits is not None:
            self.set_frac(float(self.finest_stated))

    # -- formats ---------------------------------------------------------------------------------------------------
    def _points(self) -> tuple[np.ndarray, np.ndarray]:
        """Integer bits without the sign, and fractional bits, int32; the latter within the ceiling."""
        # A handful of numbers: numpy needs a fraction of the time of as many torch calls.
        whole, frac = (
            np.rint(p.detach().cpu().numpy()).clip(-POINT_LIMIT, POINT_LIMIT) for p in (self.whole, self.frac)
        )
        most = np.minimum(self.grid.width - int(self.signed) - whole, self.finest_stated)
        whole, frac = whole.astype(np.int32), np.minimum(frac, most).astype(np.int32)
        return whole, frac if self.per_channel else np.maximum(frac, 1 - whole)  # a tensor keeps one bit

    def widths(self) -> Tensor:
        """Bits of a code without the sign, int32, ``[]`` (at least 1) or ``[channels]``."""
        whole, frac = self._points()
        return torch.from_numpy(np.asarray(np.maximum(whole + frac, 0), np.int32))

    @property
    def format(self) -> Fixed:
        """The format as deployed; per channel with the widths of the channels, 0 for a pruned one."""
        self._check_ready()
        sign, widths, fracs = int(self.signed), self.widths(), self.exponents()
        modes = self.grid.rounding, self.grid.overflow
        if not self.per_channel:
            return Fixed(int(widths) + sign, None, self.signed, *modes).with_frac(int(fracs))
        bits = torch.where(widths > 0, widths + sign, 0)
        return Fixed.of_channels(bits.tolist(), fracs.tolist(), self.signed, *modes)

    def exponent(self) -> int:
        """Fractional bits of a per-tensor format."""
        return int(self.exponents().item())

    def exponents(self) -> Tensor:
        """Fractional bits, int32, ``[]`` or ``[channels]``; a pruned channel has 0."""
        whole, frac = self._points()
        found = torch.from_numpy(np.asarray(np.where(whole + frac > 0, frac, 0), np.int32))
        return found.to(self.frac.device)

    def finest(self) -> int:
        """Fractional bits of the finest channel that holds anything but 0."""
        return self._alignment()[0]

    def reach(self) -> int:
        """Largest absolute code on the grid of `finest`, or one more."""
        return self._alignment()[1]

    def _alignment(self) -> tuple[int, int]:
        if self.training and self._aligned is not None:
            return self._aligned  # of this step's forward, which comes before that of the layers behind
        return self._align(*self._points())

    def _align(self, whole: np.ndarray, frac: np.ndarray) -> tuple[int, int]:
        live = whole + frac > 0
        if not live.any():
            return 0, 1
        finest = int(frac.max(where=live, initial=-POINT_LIMIT))
        return finest, 1 << max(int(whole.max(where=live, initial=-POINT_LIMIT)) + finest, 0)

    # -- start -----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def set_frac(self, frac: float | Tensor) -> None:
        """Sets the fractional bits; integer bits fill the ceiling."""
        found = torch.as_tensor(frac, dtype=torch.float32, device=self.frac.device)
        self.whole.copy_((self.grid.width - int(self.signed) - found).expand_as(self.whole))
        super().set_frac(found)

    @torch.no_grad()
    def fit_range(self, lows: Tensor, highs: Tensor, frac: float | None = None) -> None:
        """Integer bits that hold each channel's range; fractional bits fill the ceiling of the widest channel.

        Args:
            lows: Lowest value of each channel, ``[channels]`` or ``[]``.
            highs: Highest value.
            frac: Fractional bits to start from instead.
        """
        low, high = float(lows.amin()), float(highs.amax())
        if frac is None:
            frac = range_frac(low, high, self.grid)
        frac = min(frac, self.finest_stated)
        top = torch.maximum(highs.clamp_min(0.0), -lows if self.signed else torch.zeros_like(lows))
        # The largest value rounds to at most high = 2**i - 2**-f.
        held = torch.frexp(top.double() + 2.0 ** -(frac + 1)).exponent.float()
        most = self.grid.width - int(self.signed) - frac
        self.frac.fill_(frac)
        self.whole.copy_(held.clamp(-frac, most).view(self.whole.shape))
        self.calibrated.fill_(True)
        self._ready = True

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Starts from the range of `x`."""
        x = x.detach().clamp_min(0.0) if self.relu else x.detach()
        if self.per_channel:
            rows = self._rows(x)
            self.fit_range(rows.amin(1), rows.amax(1))
        else:
            self.fit_range(*torch.aminmax(x))

    # -- computation -----------------------------------------------------------------------------------------------
    def forward(self, x: Tensor) -> Tensor:
        """Quantises `x` (axis 1 has the channels); float32."""
        if exporting():
            return self._emit(x)
        return self._quantize(x)

    @torch.compiler.disable  # a handful of numbers in numpy, and native passes: nothing for a compiler
    def _quantize(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float64 or self.role == "input":
            x = x.float()
        if self.observing:
            x = x.relu() if self.relu else x
            if self._observer is not None:
                self._observer.update(x)
            return x
        if not self._ready:
            self._settle(x)
        if self.training:
            self._confine()
        if self.per_channel and (x.dim() < 2 or x.shape[1] != self.frac.shape[0]):
            raise FormatError(
                f"quantiser {self.path or self.role!r} has a width for each of {self.frac.shape[0]} channels and got "
                f"a tensor of shape {tuple(x.shape)}, expected the channels on axis 1; use activation_groups='tensor'"
            )
        bounds = self._bounds(x)
        return _Saturated.apply(
            x, self.frac, self.whole, bounds, self.grid.rounding, not self.signed or self.relu, self.grid.carrier
        )

    @torch.no_grad()
    def _confine(self) -> None:
        """Keeps the parameters where they still act: at most the ceiling, at least one bit short of the first."""
        most = self.grid.width - int(self.signed) + 0.49
        self.frac.copy_(torch.minimum(self.frac, most - self.whole).clamp_(-POINT_LIMIT, self.finest_stated))
        self.frac.copy_(torch.maximum(self.frac, -self.whole))

    def _bounds(self, x: Tensor) -> tuple[Tensor, ...]:
        """``2**(f + 1)``, ``2**-f``, low, high and ``2**i`` along axis 1 of `x`, in its dtype."""
        whole, frac = self._points()
        self._aligned = self._align(whole, frac)
        one = np.float64(1) if x.dtype == torch.float64 else np.float32(1)
        double, step, peak = np.ldexp(one, frac + 1), np.ldexp(one, -frac), np.ldexp(one, whole)
        live = whole + frac > 0
        high = (peak - step) * live
        if not self.signed or self.relu:
            low = high * 0
        else:
            low = -high if self.grid.overflow == "SAT_SYM" else -peak * live
        shape = [-1 if d == 1 and self.per_channel else 1 for d in range(x.dim())] if self.per_channel else []
        return tuple(torch.from_numpy(np.asarray(v)).view(shape).to(x.device) for v in (double, step, low, high, peak))

    @property
    def takes_affine(self) -> bool:
        """Never: the single pass knows no learned width."""
        return False

    # -- cost ------------------------------------------------------------------------------------------------------
    def bits(self) -> Tensor:
        """Bits of each channel's codes without the sign, float32; differentiable in `frac` and `whole`."""
        return _Width.apply(self.frac, self.whole, self.widths().float())

    def extra_repr(self) -> str:
        """Ceiling and present widths, for printing."""
        widths = self.widths().tolist() if self.ready else "?"
        return f"{self._blank}, learned width, bits={widths}{', relu' if self.relu else ''}"
