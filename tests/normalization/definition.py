"""docs/normalization.md once more, in Python's own integers and one row at a time: the tests' second opinion.

Nothing of edgemat's arithmetic is used; the results are values (`Fraction`), before the operator's own Requantize.
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import numpy as np

from edgemat.formats import Fixed
from edgemat.op import Call


@functools.cache
def table_entry(index: int) -> int:
    """The integer nearest to ``2**15 / sqrt((index + 1/2) / 256)``, by comparing squares."""
    near = int(2**15 / math.sqrt((index + 0.5) / 256))
    return max(a for a in range(near - 3, near + 4) if (2 * a - 1) ** 2 * (2 * index + 1) <= 2**41)


def scaled_root(total: int, count: int) -> Fraction:
    """``sqrt(count / total)`` as the fixed-point steps give it."""
    total = max(total, 1)
    e = 0
    while 4**e <= total:
        e += 1
    u = total * 4**15 // 4**e
    index = u // 2**22
    entry = table_entry(index)
    t = entry * entry * u // 2**30
    b = entry * (3 * 2**30 - t) // 2**16
    h = 0
    while 4 ** (h + 1) <= count:
        h += 1
    p = b * math.isqrt(count * 4 ** (30 - h))
    g = 1 if p >= 2**61 else 0
    return Fraction(p // 2 ** (45 + g), 2**15) * Fraction(2) ** (g + h - e)


def norm_row(row: list[int], eps: int, centred: bool) -> list[Fraction]:
    """Normalised values of one row of codes, before they are rounded."""
    n = len(row)
    if centred:
        total = n * sum(v * v for v in row) - sum(row) ** 2 + n * n * eps
        return [(n * v - sum(row)) * scaled_root(total, 1) for v in row]
    return [v * scaled_root(sum(v * v for v in row) + n * eps, n) for v in row]


def token_exponent(row: list[int], width: int) -> int:
    """The smallest e >= 0 with every |code| below 2**(e + width - 1)."""
    e = 0
    while max(map(abs, row)) >= 2 ** (e + width - 1):
        e += 1
    return e


def rows_of(x: np.ndarray) -> list[tuple[tuple[int, ...], list[int]]]:
    """Index and codes of every row."""
    return [(at, [int(v) for v in x[at]]) for at in np.ndindex(x.shape[:-1])]


def norm(call: Call, to_code, lsb, x: np.ndarray, gain: np.ndarray | None = None, bias: np.ndarray | None = None):
    """Values of an RmsNorm or LayerNorm; `to_code` and `lsb` are the oracle's."""
    fmt = Fixed.parse(call.attrs["norm_format"])
    made = np.empty(x.shape, object)
    for at, row in rows_of(x):
        for i, value in enumerate(norm_row(row, call.attrs["eps"], call.op.name == "LayerNorm")):
            z = to_code(value, fmt) * lsb(fmt)
            if gain is not None:
                w = lsb(Fixed.parse(call.attrs["w_format"]))
                z = z * int(gain[i]) * w
                z += 0 if bias is None else int(bias[i]) * lsb(fmt) * w
            made[*at, i] = z
    return made
