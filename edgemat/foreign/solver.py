"""Integer arithmetic that equals a monotone step function everywhere: thresholds by bisection, multipliers by search.

A function f of an integer code, non-decreasing, with values low .. high, is known by its *thresholds*

    T[j] = the smallest x in lo .. hi with f(x) >= j        (hi + 1 where there is none),   j = low + 1 .. high

and two such functions are equal on lo .. hi exactly if their thresholds are. So whether
``round((a * x + b) * 2**-s)``, saturated at low and high, is f is decided without trying every code: the product
reaches level j where

    a * x + b >= R[j],    R[j] = j * 2**s - 2**(s - 1)   (RND: halves go up),   one more for odd j under RND_CONV

and that is so exactly where f(x) >= j if ``a * T[j] + b >= R[j]`` and ``a * (T[j] - 1) + b < R[j]`` for every j (each
condition only where that x lies within lo .. hi): for a given a and s an interval of b, found for all channels and
thresholds at once.

Float32 arithmetic rounds twice: the product to 24 bits, then to an integer, halves to even. Where that puts a threshold
beside the line, two roundings do it in integers too: first to ``2**-g`` (RND), then RND_CONV. Then

    R[j] = (j * 2**g - 2**(g - 1) + (j odd)) * 2**(s - g) - 2**(s - g - 1)

With levels up to 255 a float32 product has the grid ``2**-16`` where it is coarsest, so g = 16 is tried first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgemat.errors import LoweringError

Function = Callable[[np.ndarray], np.ndarray]
"""int64 codes [C, K] to int64 codes [C, K], channel by channel."""

MAX_MULTIPLIER_BITS = 30
MAX_SHIFT = 56
MAX_THRESHOLDS = 1 << 23
"""Thresholds of all channels together: more would take gigabytes to find."""
GRIDS = (16, 15, 17, 14, 18, 13, 19, 12, 20)
"""Fractional bits tried between two roundings."""


def find_thresholds(function: Function, lo: np.ndarray, hi: np.ndarray, low: int, high: int) -> np.ndarray:
    """The thresholds of a non-decreasing function of codes.

    Args:
        function: f; asked only for codes within lo .. hi of their channel.
        lo: Smallest code of each channel, int64 [C].
        hi: Largest code of each channel, int64 [C].
        low: Smallest value of f.
        high: Largest value of f, at most 65,535 above.

    Returns:
        int64 [C, high - low]: T[c, j - low - 1], from lo[c] to hi[c] + 1.

    Raises:
        LoweringError: for more than `MAX_THRESHOLDS` thresholds.
    """
    if lo.size * (high - low) > MAX_THRESHOLDS:
        raise LoweringError(
            f"{high - low} thresholds for each of {lo.size} channels, expected at most {MAX_THRESHOLDS} together; "
            "use one scale for all channels"
        )
    levels = np.arange(low + 1, high + 1, dtype=np.int64)
    left = np.repeat(lo[:, None], levels.size, axis=1)
    right = np.repeat(hi[:, None] + 1, levels.size, axis=1)
    while (left < right).any():
        middle = left + (right - left) // 2
        reached = function(np.minimum(middle, hi[:, None])) >= levels
        open_ = left < right
        right = np.where(open_ & reached, middle, right)
        left = np.where(open_ & ~reached, middle + 1, left)
    return left


@dataclass(frozen=True)
class Gaps:
    """What an integer function must separate, by channel and level: the last code below it and the first at it.

    Attributes:
        low: Value below all levels; level k of the arrays is ``low + 1 + k``.
        below: Largest code whose value is under the level, int64 [C, L].
        above: Smallest code whose value is at the level or over it, int64 [C, L].
        has_below: Whether there is such a code, bool [C, L].
        has_above: Likewise.
    """

    low: int
    below: np.ndarray
    above: np.ndarray
    has_below: np.ndarray
    has_above: np.ndarray

    @classmethod
    def between(cls, codes: np.ndarray, values: np.ndarray, low: int, high: int) -> Gaps:
        """The gaps between codes whose values are known one by one: levels above `low` up to `high`, one channel.

        Where codes of different values interleave, ``below`` is not below ``above`` and nothing separates them.
        """
        far = np.iinfo(np.int64).max
        places = np.clip(values.reshape(-1) - low, 0, high - low)
        largest, smallest = np.full(high - low + 1, -far), np.full(high - low + 1, far)
        np.maximum.at(largest, places, codes.reshape(-1))
        np.minimum.at(smallest, places, codes.reshape(-1))
        below = np.maximum.accumulate(largest)[:-1]
        above = np.minimum.accumulate(smallest[::-1])[::-1][1:]
        known = below[None] != -far, above[None] != far
        return cls(low, np.where(known[0], below, 0), np.where(known[1], above, 0), *known)

    @property
    def levels(self) -> np.ndarray:
        """The levels, int64 [L]."""
        return self.low + 1 + np.arange(self.below.shape[1], dtype=np.int64)

    @classmethod
    def of(cls, thresholds: np.ndarray, lo: np.ndarray, hi: np.ndarray, low: int) -> Gaps:
        """The gaps beside thresholds of codes lo .. hi."""
        return cls(low, thresholds - 1, thresholds, thresholds > lo[:, None], thresholds <= hi[:, None])


@dataclass(frozen=True)
class Multipliers:
    """``round((a[c] * x + b[c]) * 2**-shift[c])``.

    Attributes:
        a: Multipliers, int64 [C].
        b: Offsets, int64 [C].
        shift: Right shifts, int64 [C].
        rounding: "RND" or "RND_CONV".
        grid: Fractional bits to which RND rounds first, int64 [C], or None where there is one rounding.
    """

    a: np.ndarray
    b: np.ndarray
    shift: np.ndarray
    rounding: str = "RND"
    grid: np.ndarray | None = None

    @property
    def width(self) -> int:
        """Bits of the widest multiplier, its sign included where one is negative."""
        magnitudes = [int(v) if v >= 0 else -int(v) - 1 for v in self.a.tolist()]
        return max(1, max(v.bit_length() for v in magnitudes) + int((self.a < 0).any()))


@dataclass(frozen=True)
class Rounding:
    """One rounding, or two: what a multiplied code must reach for each level."""

    mode: str
    grid: int | None = None

    def targets(self, levels: np.ndarray, shifts: np.ndarray) -> np.ndarray:
        """R[c, j] for int64 levels [1, L] and shifts [C, 1] (of at least `grid`)."""
        odd = levels & 1
        if self.grid is None:
            half = np.where(shifts > 0, np.int64(1) << np.maximum(shifts - 1, 0), 0)
            return (levels << shifts) - half + (odd * (shifts > 0) if self.mode == "RND_CONV" else 0)
        rest = shifts - self.grid
        half = np.where(rest > 0, np.int64(1) << np.maximum(rest - 1, 0), 0)
        return (((levels << self.grid) - (1 << (self.grid - 1)) + odd) << np.maximum(rest, 0)) - half

    def halves(self, levels: np.ndarray) -> np.ndarray:
        """Where the levels begin, in levels: what R tends to for long shifts."""
        if self.grid is None:
            return levels - 0.5
        return levels - 0.5 + np.ldexp((levels & 1) - 0.5, -self.grid)


def solve_multipliers(gaps: Gaps, slopes: np.ndarray, offset_bits: int = 31) -> Multipliers | None:
    """The narrowest multipliers and shifts that separate every level exactly, or None.

    Args:
        gaps: What is to be separated.
        slopes: Where to look: levels a code, positive float64 [C]; 0 where unknown.
        offset_bits: Bits the offsets may have beside their sign.

    Returns:
        Multipliers of at most `MAX_MULTIPLIER_BITS` bits for every channel, or None where a channel has none; with two
        roundings only where one is not enough.
    """
    slopes = np.where(slopes > 0, slopes, estimated_slopes(gaps))
    once = [_solved(gaps, slopes, offset_bits, Rounding(mode)) for mode in ("RND", "RND_CONV")]
    whole = [found for found, solved in once if solved.all()]
    if whole:
        return min(whole, key=lambda m: m.width)
    channels = len(slopes)
    a, b, shift, grids = (np.zeros(channels, np.int64) for _ in range(4))
    left = np.ones(channels, bool)
    for grid in GRIDS:
        found, solved = _solved(gaps, slopes, offset_bits, Rounding("RND_CONV", grid))
        taken = left & solved
        a, b, shift = np.where(taken, found.a, a), np.where(taken, found.b, b), np.where(taken, found.shift, shift)
        grids = np.where(taken, grid, grids)
        left &= ~taken
        if not left.any():
            return Multipliers(a, b, shift, "RND_CONV", grids)
    return None


def solve_offset(gaps: Gaps, shift: int, offset_bits: int = 31) -> tuple[Rounding, int] | None:
    """The rounding and the offset b with which ``round((x + b) * 2**-shift)`` separates every level, or None.

    Args:
        gaps: What is to be separated, of one channel.
        shift: Right shift.
        offset_bits: Bits the offset may have beside its sign.
    """
    roundings = [Rounding("RND"), Rounding("RND_CONV"), *(Rounding("RND_CONV", g) for g in GRIDS if g < shift)]
    for rounding in roundings:
        found, offsets = _offsets(gaps, np.ones(1, np.int64), np.array([shift], np.int64), rounding)
        if found.all() and abs(int(offsets[0])) < 1 << offset_bits:
            return rounding, int(offsets[0])
    return None


def _solved(gaps: Gaps, slopes: np.ndarray, offset_bits: int, rounding: Rounding) -> tuple[Multipliers, np.ndarray]:
    """Multipliers, and for which channels they are right."""
    channels = len(gaps.below)
    a, b, shift = (np.zeros(channels, np.int64) for _ in range(3))
    slopes, feasible = best_slopes(gaps, slopes, rounding)
    solved = ~feasible  # nothing to look for there
    exponents = np.frexp(slopes)[1].astype(np.int64)
    for bits in range(1, MAX_MULTIPLIER_BITS + 1):
        shifts = np.clip(bits - exponents, 0, MAX_SHIFT)
        for step in (0, 1, -1, 2, -2):
            if solved.all():
                break
            tried = np.rint(np.ldexp(slopes, shifts)).astype(np.int64) + step
            found, offsets = _offsets(gaps, tried, shifts, rounding)
            fits = ~solved & found & (tried > 0) & (np.abs(offsets) < 1 << offset_bits)
            a, b, shift = np.where(fits, tried, a), np.where(fits, offsets, b), np.where(fits, shifts, shift)
            solved |= fits
    return Multipliers(a, b, shift, rounding.mode), solved & feasible


def _offsets(gaps: Gaps, a: np.ndarray, shifts: np.ndarray, rounding: Rounding) -> tuple[np.ndarray, np.ndarray]:
    """Whether some offset separates every level, and the smallest one that does."""
    levels = gaps.levels[None, :]
    far = np.int64(1) << 62
    top = max(int(np.abs(levels).max(initial=0)), 1)
    reach = max(int(np.abs(gaps.below).max(initial=0)), int(np.abs(gaps.above).max(initial=0)), 1)
    safe = (shifts < 61 - top.bit_length()) & (a < (far >> 1) // reach) & (a > -((far >> 1) // reach))
    safe &= shifts >= (rounding.grid or 0)
    a, shifts = np.where(safe, a, 1), np.where(safe, shifts, rounding.grid or 0)
    targets = rounding.targets(levels, shifts[:, None])
    least = np.where(gaps.has_above, targets - a[:, None] * gaps.above, -far).max(axis=1, initial=-far)
    most = np.where(gaps.has_below, targets - 1 - a[:, None] * gaps.below, far).min(axis=1, initial=far)
    return safe & (least <= most), np.clip(0, least, most)


def best_slopes(gaps: Gaps, slopes: np.ndarray, rounding: Rounding) -> tuple[np.ndarray, np.ndarray]:
    """The slopes that leave the widest interval of offsets, and whether any is left.

    The width of that interval is a concave function of the slope (a minimum of lines), so a golden-section search from
    half to twice the given slopes finds its maximum.
    """
    halves = rounding.halves(gaps.levels)[None, :]

    def room(slope: np.ndarray) -> np.ndarray:
        least = np.where(gaps.has_above, halves - slope[:, None] * gaps.above, -np.inf).max(axis=1, initial=-np.inf)
        most = np.where(gaps.has_below, halves - slope[:, None] * gaps.below, np.inf).min(axis=1, initial=np.inf)
        return most - least

    golden = (np.sqrt(5.0) - 1) / 2
    left, right = slopes / 2, slopes * 2
    for _ in range(90):
        span = golden * (right - left)
        low, high = right - span, left + span
        lower = room(low) < room(high)
        left, right = np.where(lower, low, left), np.where(lower, right, high)
    best = (left + right) / 2
    best = np.where(room(slopes) >= room(best), slopes, best)
    return best, room(best) > -1e-6


def estimated_slopes(gaps: Gaps) -> np.ndarray:
    """Levels a code, from the outermost gaps that lie inside; 1 where fewer than two do."""
    inner = gaps.has_below & gaps.has_above
    levels = np.arange(inner.shape[1])
    first = np.where(inner, levels, inner.shape[1]).min(axis=1, initial=inner.shape[1])
    last = np.where(inner, levels, -1).max(axis=1, initial=-1)
    made = np.ones(len(inner))
    for c in np.nonzero(last > first)[0]:
        run = int(gaps.above[c, last[c]]) - int(gaps.above[c, first[c]])
        made[c] = (last[c] - first[c]) / max(run, 0.5)
    return made
