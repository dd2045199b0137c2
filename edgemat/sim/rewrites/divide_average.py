"""AveragePool by a count that is no power of two, as one float32 division instead of integer arithmetic.

With a = sum * 2**max(-s, 0) and D = count * 2**max(s, 0), integers, the three modes are

    RND          floor((2 a + D) / (2 D))
    RND_MIN_INF  ceil((2 a - D) / (2 D))
    TRN          floor(a / D)

Floor of a correctly rounded quotient p / q of integers with ``|p| < 2**24`` is the floor of p / q. Rounding is
monotone, so the quotient cannot fall below the integer under p / q. It moves p / q by at most ``2**-24 |p| / q``, less
than 1 / q, while the next integer is at least 1 / q away unless it is p / q itself. Ceil mirrors that.
"""

from __future__ import annotations

import math

import numpy as np

from edgemat.op import Call
from edgemat.ops.pooling import AveragePool
from edgemat.sim.carriers import SINGLE, SINGLE_LIMIT, Carried, FusedBody
from edgemat.sim.rewrites.epilogue import effective_rounding

_MODES = {"RND": ("Floor", 1), "RND_MIN_INF": ("Ceil", -1), "TRN": ("Floor", 0)}
MAX_MAP = 1 << 16
"""Output positions from which a table of divisors is not worth its memory."""


def divide_average(body: FusedBody, call: Call, x: list[Carried]) -> Carried | None:
    """Rewrites an AveragePool whose doubled sum and divisor fit float32."""
    assert isinstance(call.op, AveragePool) and call.epilogue is not None
    (shift,), target = call.epilogue.shift, call.epilogue.format
    axes = call.op.counts(call)
    if math.prod(len(axis) for axis in axes) > MAX_MAP:
        return None
    counts = axes[0] if len(axes) == 1 else np.multiply.outer(axes[0], axes[1])
    if (counts == counts.flat[0]).all():
        counts = counts.reshape(-1)[:1]
    rounding = effective_rounding(target)
    if (counts.size == 1 and counts[0] & (counts[0] - 1) == 0) or rounding not in _MODES:
        return None
    if abs(shift) > 20 or target.width > 24:
        return None
    divisor = counts.astype(np.int64) << max(shift, 0)
    largest = call.bounds.magnitude << max(-shift, 0)
    if 2 * largest + 2 * int(divisor.max()) >= SINGLE_LIMIT:
        return None
    total = call.op.emit(body, call, x[0].coded())
    if total.dtype != SINGLE:
        return None
    operator, half = _MODES[rounding]
    twice = 1 if half == 0 else 2
    value = body.scale(total, twice << max(-shift, 0))
    if half:
        value = body.binary("Add", value, body.number(half * divisor, value))
    value = body.unary(operator, body.binary("Div", value, body.number(twice * divisor, value)))
    return Carried(body, call.y[0], coded=lambda: body.overflow(value, target, -largest, largest))
