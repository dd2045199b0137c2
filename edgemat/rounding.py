"""The seven rounding modes, of integer codes by a shift or a division and of float64 values.

Rounding of a code ``c`` by a right shift ``s`` with ``q = c >> s`` (floor) and remainder ``r``:

========== ============================== ============
mode       rule                           twin
========== ============================== ============
TRN        q                              AP_TRN
TRN_ZERO   toward zero                    AP_TRN_ZERO
RND        half toward +inf               AP_RND
RND_ZERO   half toward zero               AP_RND_ZERO
RND_INF    half away from zero            AP_RND_INF
RND_MIN_INF half toward -inf              AP_RND_MIN_INF
RND_CONV   half to even                   AP_RND_CONV
========== ============================== ============
"""

from __future__ import annotations

import numpy as np

from edgemat.errors import FormatError

ROUNDINGS = ("TRN", "TRN_ZERO", "RND", "RND_ZERO", "RND_INF", "RND_MIN_INF", "RND_CONV")


def _object_if_wide(codes: np.ndarray, left: int) -> np.ndarray:
    """Python integers where a left shift could leave int64."""
    if codes.dtype == object or codes.size == 0:
        return codes
    largest = max(int(codes.max()), -int(codes.min()) - 1)
    return codes.astype(object) if largest.bit_length() + left > 63 else codes


def round_shift(codes: np.ndarray, shift: int | np.ndarray, rounding: str) -> np.ndarray:
    """``codes * 2**-shift`` rounded to integers.

    Args:
        codes: Integer codes, int64 (or Python integers in an object array).
        shift: Right shift; negative shifts left exactly. An array broadcasts against `codes`.
        rounding: One of `ROUNDINGS`.

    Returns:
        int64 array, or an object array of Python integers where int64 could not hold the result.
    """
    codes = np.asarray(codes)
    if codes.dtype != object:
        codes = codes.astype(np.int64, copy=False)
    shifts = np.asarray(shift, dtype=np.int64)
    left = int(max(0, -shifts.min())) if shifts.size else 0
    if shifts.size and int(shifts.max()) > 62:
        codes = codes.astype(object)
    codes = _object_if_wide(codes, left)
    kind = codes.dtype
    up = np.maximum(-shifts, 0).astype(kind)
    down = np.maximum(shifts, 0).astype(kind)
    one = np.ones((), kind)
    scaled = codes << up
    floor = scaled >> down
    return _round_remainder(floor, (scaled - (floor << down)) << one, one << down, rounding)


def round_div(codes: np.ndarray, divisor: int | np.ndarray, rounding: str) -> np.ndarray:
    """``codes / divisor`` as an exact rational, rounded to integers; `divisor` is positive."""
    codes = np.asarray(codes)
    divisor = np.asarray(divisor, dtype=codes.dtype)
    floor = codes // divisor
    return _round_remainder(floor, 2 * (codes - floor * divisor), divisor, rounding)


def _round_remainder(floor: np.ndarray, twice: np.ndarray, whole: np.ndarray, rounding: str) -> np.ndarray:
    """Adds 0 or 1 to `floor` given twice the remainder and the whole unit (0 <= twice < 2 * whole)."""
    if rounding == "TRN":
        return floor
    tie = twice == whole
    above = twice > whole
    if rounding == "TRN_ZERO":
        carry = (twice != 0) & (floor < 0)
    elif rounding == "RND":
        carry = above | tie
    elif rounding == "RND_MIN_INF":
        carry = above
    elif rounding == "RND_ZERO":
        carry = above | (tie & (floor < 0))
    elif rounding == "RND_INF":
        carry = above | (tie & (floor >= 0))
    elif rounding == "RND_CONV":
        carry = above | (tie & ((floor & 1) != 0))
    else:
        raise FormatError(f"rounding is {rounding!r}, expected one of {', '.join(ROUNDINGS)}")
    return floor + carry.astype(floor.dtype)


def round_float(values: np.ndarray, rounding: str) -> np.ndarray:
    """Rounds float64 values to integral float64 by the named mode (exact for inputs that came from float32)."""
    floor = np.floor(values)
    if rounding == "TRN":
        return floor
    finite = np.isfinite(values)
    rest = np.subtract(values, floor, out=np.zeros_like(floor), where=finite)
    if rounding == "TRN_ZERO":
        carry = (rest > 0) & (values < 0)
    elif rounding == "RND":
        carry = rest >= 0.5
    elif rounding == "RND_MIN_INF":
        carry = rest > 0.5
    elif rounding == "RND_ZERO":
        carry = (rest > 0.5) | ((rest == 0.5) & (values < 0))
    elif rounding == "RND_INF":
        carry = (rest > 0.5) | ((rest == 0.5) & (values > 0))
    elif rounding == "RND_CONV":
        carry = (rest > 0.5) | ((rest == 0.5) & (np.fmod(floor, 2.0, out=np.zeros_like(floor), where=finite) != 0))
    else:
        raise FormatError(f"rounding is {rounding!r}, expected one of {', '.join(ROUNDINGS)}")
    return floor + carry
