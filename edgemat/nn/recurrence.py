"""The gated recurrence ``h_t = Q(f_t * h_(t-1) + (1 - f_t) * c_t)`` over whole sequences, as one autograd function.

Values are those of the state's quantiser, step by step, to the bit; gradients are those of the real recurrence and of
the straight-through quantiser (`edgemat.nn.rounding`), back through time. What can be done for all steps at once is:
forward the products ``(1 - f) * c``; backward everything but the sum of gradients over time.

**Carrier.** f is an unsigned share of 1 with w bits, so that h_t before its rounding is a mean of h_(t-1) and c_t with
weights of w bits. Products and sum lie on the grid of the finer of both, w bits further down, and none exceeds the
larger of both: float32 is exact where that is below 2**24 grid steps, with one bit kept for the doubled value that is
rounded. Else float64 is taken.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from edgemat.nn import compiled
from edgemat.nn.layer import FLOAT32_EXACT
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.rounding import LN2, open_interval, overflow_, round_doubled_


def takes_sequences(state: FixedQuantizer, share: FixedQuantizer, fresh: FixedQuantizer) -> bool:
    """Whether `gated_means` may run: plain quantisers of one binary point each that is set, nobody observing."""
    found = (state, share, fresh)
    return not compiled.compiling() and all(
        type(q) is FixedQuantizer and q.ready and not q.observing and not q.per_channel and not q.tracks for q in found
    )


def carrier_of(state: FixedQuantizer, share: FixedQuantizer, fresh: FixedQuantizer) -> torch.dtype:
    """float32 where every product and sum of a step is exact in it, else float64."""
    finest = max(state.exponent(), fresh.exponent())
    reach = max(q.grid.magnitude << (finest - q.exponent()) for q in (state, fresh))
    return torch.float32 if reach << share.exponent() < FLOAT32_EXACT else torch.float64


def gated_means(f: Tensor, c: Tensor, state: FixedQuantizer, share: FixedQuantizer, fresh: FixedQuantizer) -> Tensor:
    """States ``[N, T, dim]`` of whole sequences that begin with zeros.

    Args:
        f: Shares of the state before, ``[N, T, dim]``, values of `share`.
        c: What enters, ``[N, T, dim]``, values of `fresh`.
        state: The quantiser of the state.
        share: The quantiser of f, unsigned with no integer bits.
        fresh: The quantiser of c.
    """
    carrier = carrier_of(state, share, fresh)
    y: Tensor = GatedMeans.apply(f.to(carrier), c.to(carrier), state.frac, state)
    return y


class GatedMeans(torch.autograd.Function):
    """See `gated_means`; f and c are in the carrier."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, c: Tensor, frac: Tensor, state: FixedQuantizer) -> Tensor:
        grid, exponent = state.grid, state.exponent()
        # In codes: doubled values before rounding, integers behind it.
        entering = ((1.0 - f) * c).mul_(math.ldexp(2.0, exponent))
        codes = torch.empty_like(f)
        h = torch.zeros_like(f[:, 0])
        for f_t, entering_t, kept in zip(f.unbind(1), entering.unbind(1), codes.unbind(1), strict=True):
            twice = torch.addcmul(entering_t, f_t, h, value=2.0)
            h = kept.copy_(overflow_(round_doubled_(twice, grid.rounding), grid, grid.low))
        states = codes.mul_(math.ldexp(1.0, -exponent))
        ctx.state, ctx.exponent = state, exponent
        ctx.save_for_backward(f, c, states)
        return states.to(grid.carrier)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        f, c, states = ctx.saved_tensors
        grid = ctx.state.grid
        g = grads[0].to(f.dtype)
        before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
        real = torch.addcmul((1.0 - f) * c, f, before)
        saturates = grid.overflow != "WRAP"
        low, high = open_interval(grid, ctx.exponent, False, f.dtype == torch.float64)
        passes = ((real > low) & (real < high)).to(f.dtype) if saturates else torch.ones_like(f)
        total = torch.empty_like(f)  # gradient of each state, all later steps included
        inside = torch.empty_like(f)  # of each value before its rounding
        later = torch.zeros_like(f[:, 0])
        steps = [list(x.unbind(1)) for x in (f, g, passes, total, inside)]
        for f_t, g_t, passes_t, total_t, inside_t in zip(*(reversed(x) for x in steps), strict=True):
            torch.add(g_t, later, out=total_t)
            torch.mul(total_t, passes_t, out=inside_t)
            later = f_t * inside_t
        df = dc = dfrac = None
        if ctx.needs_input_grad[0]:
            df = inside * (before - c)
        if ctx.needs_input_grad[1]:
            dc = inside * (1.0 - f)
        if ctx.needs_input_grad[2] and saturates:
            dfrac = (LN2 * (_dot(inside, real) - _dot(total, states))).to(ctx.state.frac.dtype)
        return df, dc, dfrac, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))
