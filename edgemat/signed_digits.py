"""Signed powers of two: how few of them an integer is the sum of, and the nearest integer that needs at most K.

The *canonical signed digits* of an integer are the one sum of signed powers of two in which no two neighbouring powers
occur. No other such sum has fewer terms (Reitwiesner, 1960), so their number decides whether a weight is K-hot. With
``h = n >> 1`` and ``t = n + h`` (which is ``3n >> 1``) the positive digits of ``n >= 0`` are the bits of ``t & ~h``,
the negative ones those of ``h & ~t``.

A *projection* replaces rounding: a real number becomes one of the sorted integers ``m[0] < m[1] < ...`` within a
format's rails that have at most K digits. Each rounding mode generalises to the two neighbours ``a < x < b``:

====================  ==============================================================================================
``TRN``               a
``TRN_ZERO``          the neighbour nearer to 0
``RND`` ...           the nearer neighbour; of two equally near ones
``RND``               b
``RND_MIN_INF``       a
``RND_INF``           the one farther from 0
``RND_ZERO``          the one nearer to 0
``RND_CONV``          the one divisible by the higher power of two (exactly one is)
====================  ==============================================================================================

Where every integer is allowed this is ordinary rounding. Numbers beyond ``m[0]`` or ``m[-1]`` become those.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from edgemat.errors import FormatError

KHOT = (1, 2, 3)
"""How many signed powers of two a weight may be the sum of."""


def _split(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positive and negative digits of the magnitudes as bit masks (uint64), and where codes are negative."""
    codes = np.asarray(codes, dtype=np.int64)
    n = np.abs(codes).astype(np.uint64)
    half = n >> np.uint64(1)
    total = n + half
    return total & ~half, half & ~total, codes < 0


def digit_count(codes: np.ndarray) -> np.ndarray:
    """Number of non-zero canonical signed digits of each code.

    Args:
        codes: int64 of any shape.

    Returns:
        int64 of the same shape; 0 for the code 0.
    """
    positive, negative, _ = _split(codes)
    octets = np.ascontiguousarray(positive | negative).reshape(-1, 1).view(np.uint8)
    return np.unpackbits(octets, axis=1).sum(axis=1, dtype=np.int64).reshape(positive.shape)


def signed_digits(codes: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The digits of each code, the lowest first.

    Args:
        codes: int64 of any shape, none with more than `count` digits.
        count: How many digits to give.

    Returns:
        Signs (int8: -1, 1, or 0 where there is no further digit) and shifts (int8), both ``[count, *codes.shape]``;
        ``codes == sum(signs * 2**shifts)``.

    Raises:
        FormatError: if a code has more digits.
    """
    positive, negative, flip = _split(codes)
    signs = np.zeros((count, *positive.shape), np.int8)
    shifts = np.zeros((count, *positive.shape), np.int8)
    for k in range(count):
        rest = positive | negative
        lowest = rest & (~rest + np.uint64(1))
        found = lowest != 0
        # A power of two is exact in float64, whose exponent is the shift.
        shifts[k] = np.where(found, np.frexp(lowest.astype(np.float64))[1] - 1, 0)
        signs[k] = np.where(found, np.where(((negative & lowest) != 0) != flip, -1, 1), 0)
        positive, negative = positive & ~lowest, negative & ~lowest
    if (positive | negative).any():
        worst = int(np.asarray(codes).reshape(-1)[int((positive | negative).reshape(-1).argmax())])
        raise FormatError(
            f"the code {worst} is a sum of {int(digit_count(np.asarray(worst)))} signed powers of two, expected at "
            f"most {count}; train it with khot={count}"
        )
    return signs, shifts


@lru_cache(maxsize=256)
def sparse_codes(low: int, high: int, count: int) -> np.ndarray:
    """All integers `low` to `high` with at most `count` digits, ascending, int64.

    Args:
        low: Smallest code, at most 0.
        high: Largest code, at least 0.
        count: Largest number of digits.
    """
    reach = max(-low, high)
    powers = np.int64(1) << np.arange((2 * reach).bit_length(), dtype=np.int64)
    found = np.zeros(1, np.int64)
    for _ in range(count):
        # Digits added from the highest down never lead further away than twice the sum.
        more = (found[:, None] + np.concatenate([powers, -powers])).reshape(-1)
        found = np.unique(np.concatenate([found, more[np.abs(more) <= 2 * reach]]))
    found = found[(found >= low) & (found <= high)]
    found.flags.writeable = False
    return found


@dataclass(frozen=True)
class Thresholds:
    """A projection as sorted codes and, between each two, where the upper one begins.

    Attributes:
        codes: int64 ``[n]``, ascending.
        points: float64 ``[n - 1]``: numbers below ``points[i]`` become a code up to ``codes[i]``, above it a later one.
        upward: bool ``[n - 1]``: whether ``points[i]`` itself becomes ``codes[i + 1]``.
    """

    codes: np.ndarray
    points: np.ndarray
    upward: np.ndarray


@lru_cache(maxsize=256)
def thresholds(low: int, high: int, count: int, rounding: str) -> Thresholds:
    """The projection of scaled real numbers onto the codes `low` to `high` of at most `count` digits.

    Args:
        low: Lowest rail.
        high: Highest rail; both within 32 bits, so that points between codes are exact in float64.
        count: Largest number of digits.
        rounding: One of `edgemat.formats.ROUNDINGS`.

    Raises:
        FormatError: for an unknown rounding mode.
    """
    codes = sparse_codes(low, high, count)
    a, b = codes[:-1], codes[1:]
    middle = (a + b) / 2.0
    if rounding == "TRN":
        points, upward = b.astype(np.float64), np.ones(len(a), bool)
    elif rounding == "TRN_ZERO":
        points, upward = np.where(b > 0, b, a).astype(np.float64), b > 0
    elif rounding == "RND":
        points, upward = middle, np.ones(len(a), bool)
    elif rounding == "RND_MIN_INF":
        points, upward = middle, np.zeros(len(a), bool)
    elif rounding == "RND_INF":
        points, upward = middle, middle > 0
    elif rounding == "RND_ZERO":
        points, upward = middle, middle < 0
    elif rounding == "RND_CONV":
        points, upward = middle, (b == 0) | ((a != 0) & ((b & -b) > (a & -a)))
    else:
        raise FormatError(f"rounding is {rounding!r}, expected a mode of edgemat.formats.ROUNDINGS")
    return Thresholds(codes, points, upward)


def project(scaled: np.ndarray, low: int, high: int, count: int, rounding: str = "RND") -> np.ndarray:
    """The nearest code of at most `count` signed digits within the rails, ties by the rounding mode.

    Args:
        scaled: float64 of any shape: values divided by the format's step, not rounded.
        low: Lowest rail.
        high: Highest rail.
        count: Largest number of digits.
        rounding: One of `edgemat.formats.ROUNDINGS`.

    Returns:
        int64 codes.
    """
    found = thresholds(low, high, count, rounding)
    # A point that belongs to the lower code is passed only by what lies above it.
    points = np.where(found.upward, found.points, np.nextafter(found.points, np.inf))
    return found.codes[np.searchsorted(points, scaled, side="right")]


@dataclass(frozen=True)
class DigitWords:
    """Codes as packed digits, the layout that the shift-add kernels of every target read.

    A word holds `count` fields of `field_bits` bits, the lowest digit in the lowest field. Bit 0 of a field is the sign
    (1: subtract), the others are the left shift; a shift equal to `none` stands for no digit. Unused upper bits are 0.

    Attributes:
        words: int64 words of the shape of the codes, below ``2**(count * field_bits)``.
        count: Fields of a word.
        field_bits: Bits of a field.
        none: The shift that says that there is no digit; one that no field can hold where every word is full.
    """

    words: np.ndarray
    count: int
    field_bits: int
    none: int

    @property
    def width(self) -> int:
        """Bits of a word."""
        return self.count * self.field_bits


def pack_digits(codes: np.ndarray, count: int, dense: bool = False) -> DigitWords:
    """Packs codes of at most `count` digits, in fields as narrow as their largest shift allows.

    Args:
        codes: int64 codes.
        count: Fields of a word.
        dense: Whether every word is to have `count` terms (`filled_terms`), so that a kernel that spends `count`
            additions on each weight anyway need not ask. `none` is then a shift that no field holds, unless a single
            field must stand for the code 0.

    Raises:
        FormatError: if a code has more digits.
    """
    values, places = np.unique(np.asarray(codes, dtype=np.int64), return_inverse=True)
    signs, shifts = (part.T.tolist() for part in signed_digits(values, count))
    terms = [[(s, n) for s, n in zip(*row, strict=True) if s] for row in zip(signs, shifts, strict=True)]
    if dense:
        terms = [filled_terms(row, count) for row in terms]
    highest = max((shift for row in terms for _, shift in row), default=0)
    full = all(len(row) == count for row in terms)
    field_bits = 1 + max((highest if full else highest + 1).bit_length(), 1)
    none = 1 << (field_bits - 1) if full else highest + 1
    words = np.zeros(len(values), np.int64)
    for index, row in enumerate(terms):
        fields = [(shift << 1) | (sign < 0) for sign, shift in row] + [none << 1] * (count - len(row))
        words[index] = sum(field << (k * field_bits) for k, field in enumerate(fields))
    return DigitWords(words[places].reshape(np.shape(codes)), count, field_bits, none)


def filled_terms(terms: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """The same sum with exactly `count` terms, no longer canonical; the code 0 of a single term stays empty.

    A missing pair becomes ``1 - 1``. A single missing term splits the lowest one: ``2**n = 2**(n-1) + 2**(n-1)``, or
    ``1 = 2 - 1``; and ``0 = 2 - 1 - 1``.

    Args:
        terms: Sign (-1 or 1) and shift of each term, the lowest first.
        count: Number of terms wanted, at least as many.
    """
    terms = list(terms)
    if (count - len(terms)) % 2:
        if terms:
            sign, shift = terms.pop(0)
            terms += [(sign, shift - 1)] * 2 if shift else [(sign, 1), (-sign, 0)]
        elif count > 1:
            terms = [(1, 1), (-1, 0), (-1, 0)]
        else:
            return terms
    return terms + [(1, 0), (-1, 0)] * ((count - len(terms)) // 2)


def unpack_digits(packed: DigitWords) -> np.ndarray:
    """The codes of packed digits, int64."""
    total = np.zeros(packed.words.shape, np.int64)
    for k in range(packed.count):
        field = (packed.words >> (k * packed.field_bits)) & ((1 << packed.field_bits) - 1)
        term = np.where(field >> 1 == packed.none, 0, np.int64(1) << np.minimum(field >> 1, 62))
        total += np.where(field & 1, -term, term)
    return total
