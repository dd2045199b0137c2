"""The fixed-point format: how wide a code is, where its binary point lies, how it rounds and overflows.

Import it from `edgemat.formats`, where what formats do to numbers is defined.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgemat.errors import FormatError
from edgemat.rounding import ROUNDINGS

OVERFLOWS = ("WRAP", "SAT", "SAT_SYM", "SAT_ZERO")
SIGN = "SIGN"
"""The overflow mode of `bipolar`, and of no other format: -1 below 0, else +1."""

IntBits = int | tuple[int, ...] | None

_TEXT = re.compile(
    r"(?P<u>u?)fixed<(?P<w>\d{1,4}|\[\d{1,4}(?:,\d{1,4})*\])(?:,(?P<i>-?\d{1,4}|\[-?\d{1,4}(?:,-?\d{1,4})*\]))?"
    r"(?:,(?P<q>[A-Z_]+))?(?:,(?P<o>[A-Z_]+))?>",
    re.ASCII,
)
_FRAC_LIMIT = 256


@dataclass(frozen=True, slots=True)
class Fixed:
    """A fixed-point format.

    Attributes:
        width: Number of bits of a code; 1 to 64 (unsigned: 1 to 63). With `widths`: the widest channel's (at least 1).
        int_bits: Bits left of the binary point, sign bit included. A tuple gives one binary point per channel; None
            says that the binary point is learned (recipes only).
        signed: Two's complement if true.
        rounding: One of `ROUNDINGS`.
        overflow: One of `OVERFLOWS` (`SIGN` for `bipolar` alone).
        widths: Width of each channel, 0 to `width`, or None where all have `width` bits. The code of a channel of
            width 0 is always 0. SAT and SAT_SYM only.

    Raises:
        FormatError: if a field is out of range.
    """

    width: int
    int_bits: IntBits = None
    signed: bool = True
    rounding: str = "RND"
    overflow: str = "SAT"
    widths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.overflow == SIGN:
            if (self.width, self.int_bits, self.signed, self.rounding, self.widths) != (1, 1, True, "TRN", None):
                raise FormatError(f"overflow {SIGN} in a format of {self.width} bits, expected it in 'bipolar' alone")
            return
        limit = 64 if self.signed else 63
        if isinstance(self.width, bool) or not isinstance(self.width, int) or not 1 <= self.width <= limit:
            kind = "signed" if self.signed else "unsigned"
            raise FormatError(f"width is {self.width!r}, expected an integer from 1 to {limit} for {kind} formats")
        for key in ("int_bits", "widths"):
            if isinstance(getattr(self, key), list):
                object.__setattr__(self, key, tuple(getattr(self, key)))
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
        if self.widths is not None:
            self._check_widths(self.widths)

    def _check_widths(self, widths: object) -> None:
        """Refuses widths that do not belong to the other fields; equal ones become `width` alone."""
        if not isinstance(widths, tuple) or not widths:
            raise FormatError(f"widths is {widths!r}, expected a tuple with the width of each channel")
        for width in widths:
            if isinstance(width, bool) or not isinstance(width, int) or not 0 <= width <= self.width:
                raise FormatError(f"a channel's width is {width!r}, expected an integer from 0 to {self.width}")
        if max(*widths, 1) != self.width:
            raise FormatError(f"width is {self.width}, expected {max(*widths, 1)}: the widest channel's")
        if isinstance(self.int_bits, tuple) and len(self.int_bits) != len(widths):
            raise FormatError(f"{len(widths)} widths and {len(self.int_bits)} binary points, expected as many")
        if self.overflow not in ("SAT", "SAT_SYM"):
            raise FormatError(f"overflow is {self.overflow} with a width per channel, expected SAT or SAT_SYM")
        if min(widths) == self.width:
            object.__setattr__(self, "widths", None)
        elif isinstance(self.int_bits, int):
            object.__setattr__(self, "int_bits", (self.int_bits,) * len(widths))

    @classmethod
    def parse(cls, text: str) -> Fixed:
        """Reads ``fixed<8,3>``, ``ufixed<8,3,TRN,WRAP>``, ``fixed<8>``, ``fixed<8,[3,2],RND,SAT>``, per-channel widths
        as in ``fixed<[6,3,0],[1,2,3],RND,SAT>``, or ``bipolar``.

        Raises:
            FormatError: if the text is not a format.
        """
        plain = re.sub(r"\s+", "", text) if isinstance(text, str) and len(text) < 1_000_000 else ""
        if plain == "bipolar":
            return BIPOLAR
        match = _TEXT.fullmatch(plain)
        if match is None:
            raise FormatError(
                f"format {str(text)[:80]!r} cannot be read, expected for example 'fixed<8,3>', 'ufixed<6>', "
                "'fixed<8,3,RND,SAT>' or 'bipolar'"
            )
        point = _numbers(match["i"]) if match["i"] else None
        bits = _numbers(match["w"])
        width, widths = (max(*bits, 1), bits) if isinstance(bits, tuple) else (bits, None)
        return cls(width, point, not match["u"], match["q"] or "RND", match["o"] or "SAT", widths)

    @classmethod
    def of_channels(
        cls,
        widths: Sequence[int],
        fracs: Sequence[int],
        signed: bool = True,
        rounding: str = "RND",
        overflow: str = "SAT",
    ) -> Fixed:
        """A format by the widths and fractional bits of its channels.

        Args:
            widths: Bits of each channel's code, 0 to 64; 0 says that its code is always 0.
            fracs: Fractional bits of each channel, as many.
            signed: Two's complement if true.
            rounding: One of `ROUNDINGS`.
            overflow: SAT or SAT_SYM; any where all widths are equal.

        Raises:
            FormatError: if the sequences differ in length or a field is out of range.
        """
        bits = tuple(int(width) for width in widths)
        if len(bits) != len(fracs) or not bits:
            raise FormatError(f"{len(bits)} widths and {len(fracs)} binary points, expected as many, at least one")
        points = tuple(width - int(frac) for width, frac in zip(bits, fracs, strict=True))
        same = min(bits) == max(bits) >= 1
        return cls(max(*bits, 1), points, signed, rounding, overflow, None if same else bits)

    def __str__(self) -> str:
        if self.bipolar:
            return "bipolar"
        head = f"{'' if self.signed else 'u'}fixed<{self.width}"
        if self.widths is not None:
            head = f"{'' if self.signed else 'u'}fixed<[" + ",".join(map(str, self.widths)) + "]"
        if isinstance(self.int_bits, tuple):
            head += ",[" + ",".join(map(str, self.int_bits)) + "]"
        elif self.int_bits is not None:
            head += f",{self.int_bits}"
        return f"{head},{self.rounding},{self.overflow}>"

    @property
    def bipolar(self) -> bool:
        """Whether the codes are -1 and +1."""
        return self.overflow == SIGN

    @property
    def ternary(self) -> bool:
        """Whether the codes are -1, 0 and +1: two bits with symmetric saturation (fewer bits in some channels)."""
        return self.width == 2 and self.signed and self.overflow == "SAT_SYM"

    @property
    def per_channel(self) -> bool:
        """Whether the binary point or the width differs by channel."""
        return isinstance(self.int_bits, tuple) or self.widths is not None

    @property
    def frac_bits(self) -> int | tuple[int, ...]:
        """Bits right of the binary point; a tuple for per-channel formats.

        Raises:
            FormatError: if the binary point is still to be learned.
        """
        if self.int_bits is None:
            raise FormatError(f"{self} has a learned binary point, expected a stated one; calibrate the model first")
        if isinstance(self.int_bits, tuple):
            widths = self.widths or (self.width,) * len(self.int_bits)
            return tuple(width - bits for width, bits in zip(widths, self.int_bits, strict=True))
        return self.width - self.int_bits

    @property
    def fracs(self) -> tuple[int, ...]:
        """`frac_bits` as a tuple of one entry or one per channel."""
        frac = self.frac_bits
        return frac if isinstance(frac, tuple) else (frac,)

    @property
    def finest(self) -> int:
        """Largest number of fractional bits of a channel that holds anything but 0 (0 where none does)."""
        live = [f for f, width in zip(self.fracs, self.widths or (1,) * len(self.fracs), strict=True) if width]
        return max(live, default=0)

    @property
    def layout(self) -> tuple[object, ...]:
        """What a code of the format means: all but the modes by which values become codes."""
        return self.width, self.widths, self.signed, self.fracs, self.bipolar

    @property
    def storage_width(self) -> int:
        """Bits of a two's complement (or unsigned) integer that holds every code: 2 for `bipolar`, else `width`."""
        return 2 if self.bipolar else self.width

    @property
    def min_code(self) -> int:
        """Smallest code of the format's two's complement range (of the widest channel's)."""
        return -(1 << (self.width - 1)) if self.signed else 0

    @property
    def max_code(self) -> int:
        """Largest code (of the widest channel)."""
        return 1 if self.bipolar else (1 << (self.width - 1)) - 1 if self.signed else (1 << self.width) - 1

    @property
    def rails(self) -> tuple[int, int]:
        """Smallest and largest code that overflow can produce in any channel (SAT_SYM leaves out the lowest)."""
        if self.widths is not None and not any(self.widths):
            return 0, 0
        if self.overflow == "SAT_SYM" and self.signed:
            return -self.max_code, self.max_code
        return self.min_code, self.max_code

    def channel_rails(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest code of each channel: two int64 arrays of one entry, or of one per channel."""
        if self.widths is None:
            return np.array(self.rails[:1], np.int64), np.array(self.rails[1:], np.int64)
        known = {width: self.rails_of(width) for width in set(self.widths)}
        low, high = zip(*(known[width] for width in self.widths), strict=True)
        return np.array(low, np.int64), np.array(high, np.int64)

    def rails_of(self, width: int) -> tuple[int, int]:
        """Smallest and largest code of a channel of `width` bits."""
        return (0, 0) if width == 0 else replace(self, width=width, int_bits=0, widths=None).rails

    def with_frac(self, frac: int | Sequence[int]) -> Fixed:
        """The same format with its binary point at `frac` fractional bits (an int, or one per channel).

        Raises:
            FormatError: if there are more or fewer entries than widths, or for `bipolar`, whose LSB is 1.
        """
        if self.bipolar:
            if tuple([frac] if isinstance(frac, int) else set(frac)) == (0,):
                return self
            raise FormatError(f"{frac} fractional bits for bipolar codes, expected 0")
        if isinstance(frac, int) and self.widths is None:
            return replace(self, int_bits=self.width - frac)
        count = len(self.widths) if self.widths is not None else None
        fracs = [frac] * (count or 1) if isinstance(frac, int) else [int(f) for f in frac]
        widths = self.widths or (self.width,) * len(fracs)
        if len(fracs) != len(widths):
            raise FormatError(f"{len(fracs)} binary points for {len(widths)} widths, expected as many")
        return replace(self, int_bits=tuple(w - f for w, f in zip(widths, fracs, strict=True)))

    def same_grid(self, other: Fixed) -> bool:
        """Whether both formats place their codes' LSB alike, whatever their width."""
        return uniform(self.fracs) == uniform(other.fracs)

    def holds(self, lo: int | np.ndarray, hi: int | np.ndarray) -> bool:
        """Whether all codes `lo` to `hi` (of every channel, or of each) pass this format's overflow unchanged."""
        if self.bipolar:
            return bool(np.all(lo == hi) and np.all(np.abs(lo) == 1))
        if self.widths is None:
            low, high = self.rails
            return bool(np.all(low <= lo) and np.all(hi <= high))
        lows, highs = self.channel_rails()
        return bool(np.all(lows <= lo) and np.all(hi <= highs))


BIPOLAR = Fixed(1, 1, True, "TRN", SIGN)
"""The format ``bipolar``: codes -1 and +1, x >= 0 gives +1. (Floor keeps the sign, so no code depends on rounding.)"""


def uniform(fracs: tuple[int, ...]) -> tuple[int, ...]:
    """Shortens a per-channel tuple of equal entries to one entry."""
    return fracs[:1] if len(set(fracs)) == 1 else fracs


def _numbers(text: str) -> int | tuple[int, ...]:
    """``3`` or ``[3,2]``."""
    return tuple(int(p) for p in text[1:-1].split(",")) if text[0] == "[" else int(text)
