"""Fixed-point formats and the two lossy steps of edgemat: rounding and overflow.

A value is ``code * 2**-frac_bits`` with ``frac_bits = width - int_bits``; ``int_bits`` counts the sign bit, exactly as
in ``ap_fixed<W, I, Q, O>``, and may be negative or larger than ``width``. Codes are ``int64`` arrays; every function
here is exact for every code of every legal format. Rounding (`edgemat.rounding`) comes first, then overflow.

A format may give each channel a width of its own, down to 0: such a channel's code is always 0. ``bipolar`` is the set
{-1, +1} as a format of its own; its codes are the integers -1 and +1, and every value of at least 0 becomes +1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from edgemat.errors import FormatError
from edgemat.fixed import BIPOLAR, OVERFLOWS, SIGN, Fixed, IntBits, uniform
from edgemat.rounding import ROUNDINGS, round_div, round_float, round_shift

__all__ = [
    "BIPOLAR",
    "OVERFLOWS",
    "ROUNDINGS",
    "SIGN",
    "Fixed",
    "IntBits",
    "accumulator",
    "channel_accumulator",
    "channel_array",
    "dequantize",
    "holds_codes",
    "quantize",
    "requantize",
    "round_div",
    "round_float",
    "round_shift",
    "uniform",
    "wrap",
]


def accumulator(lo: int, hi: int, fracs: Sequence[int]) -> Fixed:
    """The narrowest format on the grid `fracs` that holds the codes `lo` to `hi`.

    Raises:
        FormatError: if more than 64 bits are needed.
    """
    signed = lo < 0
    width = max(1, max(hi.bit_length() if hi > 0 else 0, (-lo - 1).bit_length() if signed else 0) + signed)
    if width > (64 if signed else 63):
        raise FormatError(f"an accumulator of {width} bits is needed for codes {lo} to {hi}, at most 64 are supported")
    frac = uniform(tuple(int(f) for f in fracs))
    return Fixed(width, 0, signed).with_frac(frac[0] if len(frac) == 1 else frac)


def wrap(codes: np.ndarray, fmt: Fixed, axis: int = 1) -> np.ndarray:
    """Brings rounded integers into the format's code range by its overflow mode; returns int64.

    Args:
        codes: Integers, int64 or Python's in an object array.
        fmt: Format whose overflow mode applies.
        axis: Channel axis, where the channels have widths of their own.
    """
    if fmt.widths is not None:
        lows, highs = (channel_array(rail, codes.ndim, axis) for rail in fmt.channel_rails())
        return np.minimum(np.maximum(codes, lows), highs).astype(np.int64)
    low, high = fmt.rails
    if fmt.overflow == SIGN:
        return np.where(codes < 0, np.int64(-1), np.int64(1))
    if fmt.overflow == "WRAP":
        if fmt.width < 64 or codes.dtype == object:
            mask = (1 << fmt.width) - 1
            codes = ((codes - fmt.min_code) & mask) + fmt.min_code if codes.dtype == object else _wrap64(codes, fmt)
    elif fmt.overflow == "SAT_ZERO":
        codes = np.where((codes < low) | (codes > high), np.zeros((), codes.dtype), codes)
    else:
        codes = np.minimum(np.maximum(codes, low), high)
    return codes.astype(np.int64)


def _wrap64(codes: np.ndarray, fmt: Fixed) -> np.ndarray:
    mask = np.int64((1 << fmt.width) - 1)
    low = np.int64(fmt.min_code)
    with np.errstate(over="ignore"):
        return ((codes - low) & mask) + low


def channel_accumulator(lows: np.ndarray, highs: np.ndarray, fracs: Sequence[int]) -> Fixed:
    """The narrowest format on the grid `fracs` whose channels hold the codes ``lows[c]`` to ``highs[c]``.

    Args:
        lows: Smallest code of each channel, one entry or one per channel.
        highs: Largest code of each channel, as many.
        fracs: Fractional bits, one entry or one per channel.

    Raises:
        FormatError: if more than 64 bits are needed.
    """
    if lows.size == 1:
        return accumulator(int(lows[0]), int(highs[0]), fracs)
    whole = accumulator(int(lows.min()), int(highs.max()), (0,))
    widths = []
    for lo, hi in zip(lows.tolist(), highs.tolist(), strict=True):
        alone = accumulator(lo, hi, (0,))
        widths.append(0 if lo == hi == 0 else alone.width + (whole.signed and not alone.signed))
    points = [int(fracs[i % len(fracs)]) for i in range(len(widths))]
    return Fixed.of_channels(widths, points, whole.signed)


def holds_codes(codes: np.ndarray, fmt: Fixed, axis: int = 1) -> bool:
    """Whether `codes` pass the format's overflow unchanged; channels of their own width lie along `axis`."""
    codes = np.asarray(codes)
    return codes.size == 0 or bool((wrap(codes, fmt, axis) == codes).all())


def channel_array(values: Sequence[int] | np.ndarray, ndim: int, axis: int = 1) -> np.ndarray:
    """Lays per-channel integers along `axis` of an `ndim`-dimensional tensor (one entry: a scalar array)."""
    array = np.asarray(values, dtype=np.int64)
    if array.size == 1:
        return array.reshape(())
    shape = [1] * ndim
    shape[axis] = array.size
    return array.reshape(shape)


def requantize(codes: np.ndarray, source: Fixed, target: Fixed, axis: int = 1) -> np.ndarray:
    """Re-expresses codes of `source` in `target`: round, then overflow.

    Args:
        codes: int64 codes, any shape; per-channel binary points and widths lie along `axis`.
        source: Format of `codes`.
        target: Format of the result.
        axis: Channel axis.

    Returns:
        int64 codes of `target`.
    """
    codes = np.asarray(codes)
    src = channel_array(source.fracs, codes.ndim, axis)
    dst = channel_array(target.fracs, codes.ndim, axis)
    return wrap(round_shift(codes, src - dst, target.rounding), target, axis)


def quantize(values: np.ndarray, fmt: Fixed, axis: int = 1) -> np.ndarray:
    """Rounds real values to codes.

    Args:
        values: Array of reals; cast to float32 first unless it is float64 (weights may be given in either).
        fmt: Target format.
        axis: Channel axis for per-channel binary points and widths.

    Returns:
        int64 codes.

    Raises:
        FormatError: for NaN, and for infinities under WRAP.
    """
    values = np.asarray(values)
    if values.dtype != np.float64:
        values = values.astype(np.float32).astype(np.float64)
    if np.isnan(values).any():
        raise FormatError(f"a value to quantise to {fmt} is NaN, expected numbers; clean the data or the weights")
    if fmt.overflow == "WRAP" and np.isinf(values).any():
        raise FormatError(f"a value to quantise to {fmt} is infinite, which has no meaning under WRAP; use SAT")
    if fmt.bipolar:
        return np.where(values < 0, np.int64(-1), np.int64(1))
    scaled = np.ldexp(values, channel_array(fmt.fracs, values.ndim, axis))
    rounded = round_float(scaled, fmt.rounding)
    if fmt.overflow == "WRAP":
        modulus = math.ldexp(1.0, fmt.width)
        rest = np.fmod(rounded, modulus)
        if fmt.width == 64:  # into int64, where what lies outside is a multiple of 2**11 and the difference exact
            rest = np.where(rest >= modulus / 2, rest - modulus, np.where(rest < -modulus / 2, rest + modulus, rest))
        return wrap(rest.astype(np.int64), fmt)
    low, high = (channel_array(rail, values.ndim, axis) for rail in fmt.channel_rails())
    over = rounded >= _doubles(high, 1)
    under = rounded < _doubles(low, 0)
    inside = np.where(over | under, 0.0, rounded).astype(np.int64)
    if fmt.overflow == "SAT_ZERO":
        return inside
    inside = np.maximum(inside, low)  # low as float64, of a wide SAT_SYM format, is one below low
    return np.where(over, high, np.where(under, low, inside))


def _doubles(codes: np.ndarray, plus: int) -> np.ndarray:
    """``float(code + plus)``, rounded once."""
    return np.array([float(code + plus) for code in codes.ravel().tolist()]).reshape(codes.shape)


def dequantize(codes: np.ndarray, fmt: Fixed, axis: int = 1) -> np.ndarray:
    """Codes to real values: float32 up to 24 bits, float64 beyond."""
    codes = np.asarray(codes)
    values = np.ldexp(codes.astype(np.float64), -channel_array(fmt.fracs, codes.ndim, axis))
    return values.astype(np.float32) if fmt.width <= 24 else values
