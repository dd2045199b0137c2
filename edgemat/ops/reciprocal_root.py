"""The integer reciprocal square root of RmsNorm and LayerNorm, step by step (docs/normalization.md).

For an integer ``T >= 1`` (0 counts as 1) and a constant ``c`` with ``c * 2**-30`` in [1, 2)::

    e = number of j >= 0 with T >= 4**j             4**(e-1) <= T < 4**e
    u = floor(T * 4**(15-e))                        30 bits: v = u * 2**-30 lies in [1/4, 1)
    a = TABLE[(u >> 22) - 64]                       16 bits: 1/sqrt(v) * 2**15, at the middle of 192 intervals
    t = (a * a * u) >> 30                           32 x 30 bits: v * (a * 2**-15)**2 * 2**30
    b = (a * (3 * 2**30 - t)) >> 16                 one Newton step, 16 x 32 bits: 1/sqrt(v) * 2**30
    p = b * c                                       32 x 31 bits, below 2**62
    g = 1 where p >= 2**61, else 0
    m = p >> (45 + g)                               16 bits, at least 2**15 - 1

so that ``m * 2**(g - 15 - e)`` is ``(c * 2**-30) / sqrt(T)`` within a relative error of ``RELATIVE_ERROR``. A table
entry is wrong by at most 2**-8 relatively, the Newton step squares that to 1.5 * 2**-16, the two truncations of 30 bits
cost less than 2**-27, that of m less than 2**-15; all but those of u and t make the result smaller.
"""

from __future__ import annotations

import math

import numpy as np

from edgemat.body import Body, Coded

MANTISSA_BITS = 16
UNIT_BITS = 15
ROOT_BITS = 30
LIMIT = 1 << 62
"""What T must stay below."""
RELATIVE_ERROR = 2.0**-14
TABLE = np.array([(math.isqrt((1 << 41) // (2 * i + 1)) + 1) >> 1 for i in range(64, 256)], dtype=np.int64)
"""Entry ``i - 64``: ``1 / sqrt((i + 1/2) / 256)``, times ``2**15``, rounded; 16 bits."""


def exponent_of(total: int) -> int:
    """``e`` of the module's text for one integer."""
    return (max(total, 1).bit_length() + 1) >> 1


def root_of(count: int) -> tuple[int, int]:
    """``sqrt(count)`` as ``c * 2**(h - 30)``, c of 31 bits and truncated.

    Args:
        count: At least 1.

    Returns:
        c in [2**30, 2**31), and h.
    """
    half = (count.bit_length() - 1) >> 1
    return math.isqrt(count << (2 * (ROOT_BITS - half))), half


def reciprocal_root(totals: np.ndarray, root: int) -> tuple[np.ndarray, np.ndarray]:
    """Mantissas and exponents of ``root * 2**-30 / sqrt(totals)``.

    Args:
        totals: int64, 0 to 2**62 - 1; 0 counts as 1.
        root: c of the module's text.

    Returns:
        m (int64, 2**15 - 1 to 2**16 - 1) and ``e - g`` (int64): the result is ``m * 2**(-15 - (e - g))``.
    """
    totals = np.maximum(totals, 1)
    exponent = np.zeros(totals.shape, np.int64)
    for j in range(31):
        exponent += totals >= (1 << 2 * j)
    u = (totals << np.maximum(30 - 2 * exponent, 0)) >> np.maximum(2 * exponent - 30, 0)
    a = TABLE[(u >> 22) - 64]
    t = (a * a * u) >> 30
    b = (a * ((3 << 30) - t)) >> 16
    product = b * root
    doubled = (product >= 1 << 61).astype(np.int64)
    return product >> (45 + doubled), exponent - doubled


def emit_reciprocal_root(body: Body, total: Coded, top: int, root: int) -> tuple[Coded, Coded]:
    """`reciprocal_root` in a body.

    Args:
        body: The body.
        total: T in int64, 0 to `top`.
        top: Largest T.
        root: c.

    Returns:
        m and ``e - g``, both int64.
    """
    largest = exponent_of(top)
    total = body.maximum(total, body.number(1, total))
    steps = np.array([1 << 2 * j for j in range(largest)], np.int64)
    if largest == 1:
        exponent = body.number(1, total)
        grown = body.scale(total, 1 << 28)
    else:
        # A trailing axis of thresholds: the values are positive, so comparisons of int64 are right.
        wide = body.op("Unsqueeze", total.value, body.const([-1], np.int64))
        reached = body.op("GreaterOrEqual", wide, body.const(steps, np.int64))
        flags = body.cast(Coded(reached, np.dtype(bool)), np.dtype(np.int64))
        count = body.op("ReduceSum", flags.value, body.const([-1], np.int64), keepdims=0)
        exponent = Coded(count, flags.dtype)
        exponents = np.arange(largest + 1)
        up = np.int64(1) << np.maximum(30 - 2 * exponents, 0)
        down = np.int64(1) << np.maximum(2 * exponents - 30, 0)
        grown = body.binary("Mul", total, look_up(body, up, exponent))
        if largest > 15:
            grown = body.binary("Div", grown, look_up(body, down, exponent))
    index = body.binary("Div", grown, body.number(1 << 22, grown))
    index = body.binary("Sub", index, body.number(64, index))
    a = look_up(body, TABLE, index)
    t = body.binary("Mul", body.binary("Mul", a, a), grown)
    t = body.binary("Div", t, body.number(1 << 30, t))
    b = body.binary("Mul", a, body.binary("Sub", body.number(3 << 30, t), t))
    product = body.scale(body.binary("Div", b, body.number(1 << 16, b)), root)
    above = body.op("GreaterOrEqual", product.value, body.const(1 << 61, np.int64))
    doubled = body.cast(Coded(above, np.dtype(bool)), np.dtype(np.int64))
    divisor = look_up(body, np.array([1 << 45, 1 << 46]), doubled)
    return body.binary("Div", product, divisor), body.binary("Sub", exponent, doubled)


def look_up(body: Body, entries: np.ndarray, index: Coded) -> Coded:
    """``entries[index]``, int64."""
    made = body.op("Gather", body.const(entries, np.int64), index.value, axis=0)
    return Coded(made, np.dtype(np.int64))
