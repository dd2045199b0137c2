"""Fixed-point formats and the two lossy steps of edgemat: rounding and overflow.

A value is ``code * 2**-frac_bits`` with ``frac_bits = width - int_bits``; ``int_bits`` counts the sign bit, exactly as
in ``ap_fixed<W, I, Q, O>``, and may be negative or larger than ``width``. Codes are ``int64`` arrays; every function
here is exact for every code of every legal format. Rounding comes first, then overflow.

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

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgemat.errors import FormatError

ROUNDINGS = ("TRN", "TRN_ZERO", "RND", "RND_ZERO", "RND_INF", "RND_MIN_INF", "RND_CONV")
OVERFLOWS = ("WRAP", "SAT", "SAT_SYM", "SAT_ZERO")

IntBits = int | tuple[int, ...] | None

_TEXT = re.compile(
    r"(?P<u>u?)fixed<(?P<w>\d{1,4})(?:,(?P<i>-?\d{1,4}|\[-?\d{1,4}(?:,-?\d{1,4})*\]))?"
    r"(?:,(?P<q>[A-Z_]+))?(?:,(?P<o>[A-Z_]+))?>",
    re.ASCII,
)
_FRAC_LIMIT = 256


@dataclass(frozen=True, slots=True)
class Fixed:
    """A fixed-point format.

    Attributes:
        width: Number of bits of a code; 1 to 64 (unsigned: 1 to 63).
        int_bits: Bits left of the binary point, sign bit included. A tuple gives one binary point per channel; None
            says that the binary point is learned (recipes only).
        signed: Two's complement if true.
        rounding: One of `ROUNDINGS`.
        overflow: One of `OVERFLOWS`.

    Raises:
        FormatError: if a field is out of range.
    """

    width: int
    int_bits: IntBits = None
    signed: bool = True
    rounding: str = "RND"
    overflow: str = "SAT"

    def __post_init__(self) -> None:
        limit = 64 if self.signed else 63
        if isinstance(self.width, bool) or not isinstance(self.width, int) or not 1 <= self.width <= limit:
            kind = "signed" if self.signed else "unsigned"
            raise FormatError(f"width is {self.width!r}, expected an integer from 1 to {limit} for {kind} formats")
        if isinstance(self.int_bits, list):
            object.__setattr__(self, "int_bits", tuple(self.int_bits))
        points = self.int_bits if isinstance(self.int_bits, tuple) else (self.int_bits,)
        if not points:
            raise FormatError("int_bits is an empty tuple, expected one binary point per channel")
        for bits in points:
            if bits is None and not isinstance(self.int_bits, tuple):
                continue
            if isinstance(bits, bool) or not isinstance(bits, int) or abs(bits) > _FRAC_LIMIT:
                raise FormatError(f"int_bits is {bits!r}, expected an integer within +-{_FRAC_LIMIT}")
        if self.rounding not in ROUNDINGS:
            raise FormatError(f"rounding is {self.rounding!r}, expected one of {', '.join(ROUNDINGS)}")
        if self.overflow not in OVERFLOWS:
            raise FormatError(f"overflow is {self.overflow!r}, expected one of {', '.join(OVERFLOWS)}")

    @classmethod
    def parse(cls, text: str) -> Fixed:
        """Reads ``fixed<8,3>``, ``ufixed<8,3,TRN,WRAP>``, ``fixed<8>`` or ``fixed<8,[3,2],RND,SAT>``.

        Raises:
            FormatError: if the text is not a format.
        """
        match = _TEXT.fullmatch(re.sub(r"\s+", "", text)) if isinstance(text, str) and len(text) < 1_000_000 else None
        if match is None:
            raise FormatError(
                f"format {str(text)[:80]!r} cannot be read, expected for example 'fixed<8,3>', 'ufixed<6>' or "
                "'fixed<8,3,RND,SAT>'"
            )
        point: IntBits = None
        if match["i"]:
            point = tuple(int(p) for p in match["i"][1:-1].split(",")) if match["i"][0] == "[" else int(match["i"])
        return cls(int(match["w"]), point, not match["u"], match["q"] or "RND", match["o"] or "SAT")

    def __str__(self) -> str:
        head = f"{'' if self.signed else 'u'}fixed<{self.width}"
        if isinstance(self.int_bits, tuple):
            head += ",[" + ",".join(map(str, self.int_bits)) + "]"
        elif self.int_bits is not None:
            head += f",{self.int_bits}"
        return f"{head},{self.rounding},{self.overflow}>"

    @property
    def per_channel(self) -> bool:
        """Whether the binary point differs by channel."""
        return isinstance(self.int_bits, tuple)

    @property
    def frac_bits(self) -> int | tuple[int, ...]:
        """Bits right of the binary point; a tuple for per-channel formats.

        Raises:
            FormatError: if the binary point is still to be learned.
        """
        if self.int_bits is None:
            raise FormatError(f"{self} has a learned binary point, expected a stated one; calibrate the model first")
        if isinstance(self.int_bits, tuple):
            return tuple(self.width - bits for bits in self.int_bits)
        return self.width - self.int_bits

    @property
    def fracs(self) -> tuple[int, ...]:
        """`frac_bits` as a tuple of one entry or one per channel."""
        frac = self.frac_bits
        return frac if isinstance(frac, tuple) else (frac,)

    @property
    def min_code(self) -> int:
        """Smallest code of the format's two's complement range."""
        return -(1 << (self.width - 1)) if self.signed else 0

    @property
    def max_code(self) -> int:
        """Largest code."""
        return (1 << (self.width - 1)) - 1 if self.signed else (1 << self.width) - 1

    @property
    def rails(self) -> tuple[int, int]:
        """Smallest and largest code that overflow handling can produce (SAT_SYM leaves out the lowest)."""
        if self.overflow == "SAT_SYM" and self.signed:
            return -self.max_code, self.max_code
        return self.min_code, self.max_code

    def with_frac(self, frac: int | Sequence[int]) -> Fixed:
        """The same format with its binary point at `frac` fractional bits (an int, or one per channel)."""
        if isinstance(frac, int):
            return replace(self, int_bits=self.width - frac)
        return replace(self, int_bits=tuple(self.width - int(f) for f in frac))

    def same_grid(self, other: Fixed) -> bool:
        """Whether both formats place their codes' LSB alike, whatever their width."""
        return uniform(self.fracs) == uniform(other.fracs)

    def holds(self, lo: int, hi: int) -> bool:
        """Whether the codes `lo` to `hi` pass this format's overflow unchanged."""
        low, high = self.rails
        return low <= lo and hi <= high


def uniform(fracs: tuple[int, ...]) -> tuple[int, ...]:
    """Shortens a per-channel tuple of equal entries to one entry."""
    return fracs[:1] if len(set(fracs)) == 1 else fracs


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


def wrap(codes: np.ndarray, fmt: Fixed) -> np.ndarray:
    """Brings rounded integers into the format's code range by its overflow mode; returns int64."""
    low, high = fmt.rails
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


def channel_array(values: Sequence[int], ndim: int, axis: int = 1) -> np.ndarray:
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
        codes: int64 codes, any shape; per-channel binary points lie along `axis`.
        source: Format of `codes`.
        target: Format of the result.
        axis: Channel axis.

    Returns:
        int64 codes of `target`.
    """
    codes = np.asarray(codes)
    src = channel_array(source.fracs, codes.ndim, axis)
    dst = channel_array(target.fracs, codes.ndim, axis)
    return wrap(round_shift(codes, src - dst, target.rounding), target)


def quantize(values: np.ndarray, fmt: Fixed, axis: int = 1) -> np.ndarray:
    """Rounds real values to codes.

    Args:
        values: Array of reals; cast to float32 first unless it is float64 (weights may be given in either).
        fmt: Target format.
        axis: Channel axis for per-channel binary points.

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
    scaled = np.ldexp(values, channel_array(fmt.fracs, values.ndim, axis))
    rounded = round_float(scaled, fmt.rounding)
    low, high = fmt.rails
    if fmt.overflow == "WRAP":
        modulus = math.ldexp(1.0, fmt.width)
        rest = np.fmod(rounded, modulus)
        if fmt.width == 64:  # into int64, where what lies outside is a multiple of 2**11 and the difference exact
            rest = np.where(rest >= modulus / 2, rest - modulus, np.where(rest < -modulus / 2, rest + modulus, rest))
        return wrap(rest.astype(np.int64), fmt)
    over = rounded >= float(high + 1)
    under = rounded < float(low)
    inside = np.where(over | under, 0.0, rounded).astype(np.int64)
    if fmt.overflow == "SAT_ZERO":
        return inside
    inside = np.maximum(inside, low)  # float(low) of a wide SAT_SYM format is one below low
    return np.where(over, np.int64(high), np.where(under, np.int64(low), inside))


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


def dequantize(codes: np.ndarray, fmt: Fixed, axis: int = 1) -> np.ndarray:
    """Codes to real values: float32 up to 24 bits, float64 beyond."""
    codes = np.asarray(codes)
    values = np.ldexp(codes.astype(np.float64), -channel_array(fmt.fracs, codes.ndim, axis))
    return values.astype(np.float32) if fmt.width <= 24 else values
