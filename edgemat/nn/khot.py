"""K-hot weights: trained sums of at most K signed powers of two, so that no target multiplies (QFX, arXiv 2401.17544).

A real weight x becomes ``v = p(x * 2**f) * 2**-f`` where p is the projection of `edgemat.signed_digits` onto the codes
of at most K canonical signed digits within the format's rails: it takes the place of rounding, and is not applied after
it, so nothing is rounded twice. The gradients are QFX's with the projected value: where plain rounding stays within the
rails ``dv/dx = 1`` and ``dv/df = ln2 * (x - v)``, outside ``dv/dx = 0`` and ``dv/df = -ln2 * v`` (``SAT_ZERO``: 0).

Up to 12 bits p is one look-up. p is constant between neighbouring multiples of one half, so ``floor(t) + ceil(t)`` of
the doubled value t numbers every multiple (even) and every gap (odd). Wider formats search the sorted thresholds.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.nn import compiled
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.rounding import LN2, Grid, channel_factors, round_doubled_
from edgemat.signed_digits import KHOT, project, sparse_codes, thresholds

TABLE_WIDTH = 12


class Projection:
    """The projection onto one format's K-hot codes, on torch tensors.

    Args:
        grid: Width, rails and modes; any overflow mode but WRAP.
        khot: Largest number of digits.
    """

    def __init__(self, grid: Grid, khot: int):
        self.grid, self.khot = grid, khot
        self.moved: dict[torch.device, tuple[Tensor, ...]] = {}
        if grid.width <= TABLE_WIDTH:
            self.first, self.last = 4 * grid.low - 4, 4 * grid.high + 4
            quarters = np.arange(self.first, self.last + 1) / 4.0
            codes = project(quarters, grid.low, grid.high, khot, grid.rounding)
            if grid.overflow == "SAT_ZERO":
                rounded = round_doubled_(torch.from_numpy(2.0 * quarters), grid.rounding).numpy()
                codes = np.where((rounded < grid.low) | (rounded > grid.high), 0, codes)
            self.parts: tuple[Tensor, ...] = (torch.from_numpy(codes.astype(np.float32)),)
            return
        found = thresholds(grid.low, grid.high, khot, grid.rounding)
        # float64 throughout: points between codes of 32 bits need 33.
        points = np.where(found.upward, found.points, np.nextafter(found.points, np.inf))
        self.parts = torch.from_numpy(points), torch.from_numpy(found.codes.astype(np.float64))

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The table, or the points and codes, where the weights are."""
        if device not in self.moved:
            self.moved[device] = tuple(part.to(device) for part in self.parts)
        return self.moved[device]

    def __call__(self, twice: Tensor) -> Tensor:
        """The codes, as integral floats of the carrier, of values scaled by ``2**(f + 1)``; overwrites `twice`.

        NaN stays NaN.
        """
        parts = self.on(twice.device)
        if len(parts) == 2:
            points, codes = parts
            scaled = twice.double().mul_(0.5)
            found = codes[torch.bucketize(scaled, points, right=True)]
            if self.grid.overflow == "SAT_ZERO":
                rounded = round_doubled_(scaled * 2.0, self.grid.rounding)
                found.masked_fill_((rounded < self.grid.low) | (rounded > self.grid.high), 0.0)
            return torch.where(scaled.isnan(), scaled, found).to(self.grid.carrier)
        number = twice.ceil().add_(twice.floor_()).clamp_(self.first, self.last)
        missing = number.isnan()
        number.sub_(self.first).nan_to_num_(0.0)
        found = parts[0].take(number.to(torch.int64)).to(twice.dtype)
        return found.masked_fill_(missing, math.nan)


@lru_cache(maxsize=256)
def projection(grid: Grid, khot: int) -> Projection:
    """The projection of a format, made once."""
    return Projection(grid, khot)


class ProjectChannels(torch.autograd.Function):
    """K-hot ``v`` from `x` and the learned `frac`, of shape ``[channels]`` along `axis` or ``[1]`` for all.

    With `scale` (one per channel, not 0) the result is ``v(x * scale) / scale`` (`FixedQuantizer.folded`).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, frac: Tensor, onto: Projection, axis: int, scale: Tensor | None) -> Tensor:
        work = x if x.dtype == torch.float64 or onto.grid.carrier == torch.float32 else x.double()
        double, step = channel_factors(frac, work, axis, scale)
        y = onto(work * double).mul_(step).to(onto.grid.carrier)
        ctx.setting = onto.grid, axis
        ctx.save_for_backward(x, y, double)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grid, axis = ctx.setting
        x, y, double = ctx.saved_tensors
        g = grads[0].to(x.dtype)
        rounded = round_doubled_((x.detach() * double), grid.rounding)
        inside = g * ((rounded >= grid.low) & (rounded <= grid.high))
        df = None
        if ctx.needs_input_grad[1]:
            df = LN2 * ((inside * x) - g * y.to(x.dtype))
            axes = [d for d in range(x.dim()) if d != axis % x.dim()]
            df = df.sum().view(1) if double.numel() == 1 else df.sum(axes) if axes else df
        return inside, df, None, None, None


@lru_cache(maxsize=256)
def _onto(width: int, signed: int, rounding: int, overflow: int, khot: int) -> Projection:
    return projection(Grid.from_numbers(width, signed, rounding, overflow), khot)


@torch.library.custom_op("edgemat::khot", mutates_args=())
def _compiled(x: Tensor, frac: Tensor, spec: list[int], khot: int, axis: int, scale: Tensor | None) -> Tensor:
    """`ProjectChannels` as an operator that `torch.compile` takes into its graph whole."""
    return ProjectChannels.apply(x.detach(), frac.detach(), _onto(*spec, khot), axis, scale).contiguous()


@_compiled.register_fake
def _(x: Tensor, frac: Tensor, spec: list[int], khot: int, axis: int, scale: Tensor | None) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32 if spec[0] <= 24 else torch.float64).contiguous()


@torch.library.custom_op("edgemat::khot_backward", mutates_args=())
def _compiled_backward(
    g: Tensor, x: Tensor, frac: Tensor, spec: list[int], khot: int, axis: int, scale: Tensor | None
) -> list[Tensor]:
    with torch.enable_grad():
        given, points = x.detach().requires_grad_(), frac.detach().requires_grad_()
        y = ProjectChannels.apply(given, points, _onto(*spec, khot), axis, scale)
    return [part.contiguous() for part in torch.autograd.grad(y, (given, points), g.to(y.dtype))]


@_compiled_backward.register_fake
def _(g: Tensor, x: Tensor, frac: Tensor, spec: list[int], khot: int, axis: int, scale: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(x).contiguous(), torch.empty_like(frac)]


def _keep(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, frac, *ctx.setting, scale = inputs
    ctx.save_for_backward(x, frac, scale)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, frac, scale = ctx.saved_tensors
    dx, df = _compiled_backward(g, x, frac, *ctx.setting, scale)
    return dx, df, None, None, None, None


_compiled.register_autograd(_gradients, setup_context=_keep)


class KHotQuantizer(FixedQuantizer):
    """Quantises weights, scales or slopes to sums of at most `khot` signed powers of two.

    Args:
        format: A format or its text, or with its binary point(s) left open to be learned; any overflow mode but WRAP.
        khot: 1, 2 or 3 signed powers of two.
        channels: Number of channels with a binary point each, or None for one.
        axis: The channel axis.

    Raises:
        FormatError: for another `khot`, for WRAP and for bipolar.
    """

    def __init__(self, format: str | Fixed = "fixed<8>", khot: int = 2, channels: int | None = None, axis: int = 0):
        super().__init__(format, channels=channels, axis=axis, role="weights")
        if khot not in KHOT or isinstance(khot, bool):
            raise FormatError(f"khot is {khot!r}, expected one of {', '.join(map(str, KHOT))}")
        if self.grid.overflow not in ("SAT", "SAT_SYM", "SAT_ZERO"):
            raise FormatError(
                f"khot={khot} was asked for with overflow {self.grid.overflow}, expected SAT, SAT_SYM or SAT_ZERO: "
                "sums of powers of two do not wrap; write 'fixed<8>' or the like"
            )
        self.khot = khot

    @property
    def promises(self) -> dict[str, int]:
        """``khot``: the node of these codes may be computed by shifts and additions."""
        return {"khot": self.khot}

    @property
    def kind(self) -> str:
        """The format with its binary point left open, and the number of digits."""
        return f"{self._blank} with khot={self.khot}"

    @property
    def onto(self) -> Projection:
        """The projection in use."""
        return projection(self.grid, self.khot)

    def forward(self, x: Tensor) -> Tensor:
        """Projects `x` (any shape); float32, or float64 for formats of more than 24 bits."""
        if x.dtype not in (torch.float32, torch.float64):
            x = x.float()
        if not self._ready:
            self._settle(x)
        return self._projected(x, self.frac if self.per_channel else self.frac.view(1), None)

    def _projected(self, x: Tensor, frac: Tensor, scale: Tensor | None) -> Tensor:
        if compiled.compiling():
            return _compiled(x, frac, self.grid.numbers(), self.khot, self.axis, scale)
        return ProjectChannels.apply(x, frac, self.onto, self.axis, scale)

    def folded(self, weight: Tensor, scale: Tensor) -> Tensor:
        """``Q(weight * scale) / scale`` for weights with a batch norm folded in."""
        if not self._ready:
            shape = [1] * weight.dim()
            shape[self.axis] = -1
            self._settle(weight * scale.view(shape))
        return self._projected(weight, self.frac if self.per_channel else self.frac.expand(scale.numel()), scale)

    def round_codes(self, values: Tensor, scale: float) -> Tensor:
        """Codes of values times `scale`, as integral floats."""
        return self.onto(values * (2.0 * scale))

    def fit(self, x: Tensor) -> None:
        """Sets the binary point(s) to the finest whose rails hold the projection of the range of `x`.

        Plain rails are not enough: 127 of 8 bits is nearest to 128 among the powers of two, which they do not hold.
        """
        super().fit(x)
        rows = self._rows(x.detach().double()) if self.per_channel else x.detach().double().reshape(1, -1)
        if not rows.numel():
            return
        ends = torch.stack([rows.amin(1), rows.amax(1)]).cpu().numpy()
        fracs = self.exponents().reshape(-1).cpu().numpy()
        reach = 2 * self.grid.magnitude
        nearest = project(np.ldexp(ends, fracs), -reach, reach, self.khot, self.grid.rounding)
        kept = sparse_codes(self.grid.low, self.grid.high, self.khot)
        too_fine = ((nearest < kept[0]) & (self.grid.low < 0)) | (nearest > kept[-1])
        fracs = torch.from_numpy(fracs - too_fine.any(0)).float()
        self.set_frac(fracs if self.per_channel else fracs[0])

    def get_extra_state(self) -> Tensor:
        """Width, signedness, modes and the number of digits."""
        return torch.cat([super().get_extra_state(), torch.tensor([self.khot])])

    def extra_repr(self) -> str:
        """The format, for printing."""
        return f"{super().extra_repr()}, khot={self.khot}"
