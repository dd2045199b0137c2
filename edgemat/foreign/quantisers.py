"""What foreign quantisers do to a real number, to the bit: QONNX's Quant and ONNX's QuantizeLinear.

A `Quantiser` maps float32 values to codes ``q - zero_point``. QONNX's rounding modes are those of its code, not of its
names: HALF_UP rounds halves away from zero, ROUND halves to even.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgemat.errors import LoweringError
from edgemat.formats import BIPOLAR, Fixed

ROUNDING_NAMES: dict[str, str] = {
    "ROUND": "RND_CONV",
    "HALF_EVEN": "RND_CONV",
    "CEIL": "CEIL",
    "FLOOR": "TRN",
    "UP": "AWAY",
    "DOWN": "TRN_ZERO",
    "ROUND_TO_ZERO": "TRN_ZERO",
    "HALF_UP": "RND_INF",
    "HALF_DOWN": "RND_ZERO",
}
"""What a name of QONNX does, in the words of `edgemat.rounding`; CEIL (up) and AWAY (from zero) are not among those."""

LAYOUTS = {2: "NC", 3: "NWC", 4: "NCHW"}
"""What qonnx's MultiThreshold takes data of each rank for where the node does not say."""

ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "RND_CONV": np.round,
    "CEIL": np.ceil,
    "TRN": np.floor,
    "AWAY": lambda x: np.sign(x) * np.ceil(np.abs(x)),
    "TRN_ZERO": np.trunc,
    "RND_INF": lambda x: np.sign(x) * np.floor(np.abs(x) + x.dtype.type(0.5)),
    "RND_ZERO": lambda x: np.sign(x) * np.ceil(np.abs(x) - x.dtype.type(0.5)),
}


@dataclass(frozen=True)
class Quantiser:
    """``code = round(clip(x / scale + zero_point)) - zero_point`` in float32.

    Attributes:
        scale: float32, () or [C].
        zero_point: Integer.
        low: Smallest code (zero point subtracted).
        high: Largest code.
        rounding: A key of the rounding functions above.
        style: "qonnx" (add the zero point, clip, round), "onnx" (round, add the zero point, clip), or "stored": what
            follows an operator that an 8-bit kernel takes over, which rounds as "qonnx" does.
    """

    scale: np.ndarray
    zero_point: int
    low: int
    high: int
    rounding: str = "RND_CONV"
    style: str = "onnx"
    bipolar: bool = False

    def __post_init__(self) -> None:
        if not np.isfinite(self.scale).all() or (self.scale <= 0).any():
            raise LoweringError("a quantiser's scale is not a positive number; calibrate the model again")
        if not self.low <= self.high or self.high - self.low > 1 << 32:
            raise LoweringError(f"a quantiser gives codes from {self.low} to {self.high}, expected at most 32 bits")

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """int64 codes of float32 ``values[K, C]``."""
        return self.round(np.asarray(values, np.float32) / self.scale.astype(np.float32))

    def round(self, scaled: np.ndarray) -> np.ndarray:
        """int64 codes of float32 values that are divided by the scale already."""
        if self.bipolar:
            return np.where(scaled >= 0, np.int64(1), np.int64(-1))
        rounding = ROUNDINGS[self.rounding]
        zero = np.float32(self.zero_point)
        if self.style in ("qonnx", "stored"):
            shifted = scaled + zero
            kept = np.clip(shifted, np.float32(self.low) + zero, np.float32(self.high) + zero)
            return rounding(kept).astype(np.int64) - self.zero_point
        kept = np.clip(rounding(scaled).astype(np.float64), self.low, self.high)
        return kept.astype(np.int64)

    @property
    def fracs(self) -> tuple[int, ...] | None:
        """Fractional bits where every scale is a power of two, else None."""
        mantissa, exponent = np.frexp(np.asarray(self.scale, np.float64).reshape(-1))
        if (mantissa != 0.5).any():
            return None
        found = tuple(int(1 - e) for e in exponent)
        return found[:1] if len(set(found)) == 1 else found

    @property
    def format(self) -> Fixed:
        """The narrowest format that holds the codes; its rails may lie further out than the quantiser's."""
        if self.bipolar:
            return self._placed(BIPOLAR)
        low, high = self.low, self.high
        symmetric = low == -high and low < 0
        signed = low < 0
        width = max(high.bit_length() + signed, (-low - 1).bit_length() + 1 if low < 0 else 0, 1)
        overflow = "SAT_SYM" if symmetric and high == (1 << (width - 1)) - 1 else "SAT"
        return self._placed(Fixed(width, width, signed, "RND_CONV", overflow))

    def _placed(self, fmt: Fixed) -> Fixed:
        fracs = self.fracs
        if fmt.bipolar or fracs is None:
            return fmt
        return fmt.with_frac(fracs[0] if len(fracs) == 1 else fracs)

    @property
    def factor(self) -> np.ndarray:
        """float32 real value of 1.0 in `format`."""
        if self.fracs is not None and not self.bipolar:
            return np.ones((), np.float32)
        return np.asarray(self.scale, np.float32)

    @property
    def clipped(self) -> bool:
        """Whether the format's rails lie further out than the quantiser's."""
        return not self.bipolar and self.format.rails != (self.low, self.high)


def qonnx_quantiser(
    scale: np.ndarray, zero_point: np.ndarray, bits: np.ndarray, signed: bool, narrow: bool, rounding: str
) -> Quantiser:
    """QONNX's Quant (IntQuant) as a `Quantiser`.

    Raises:
        LoweringError: for a fractional zero point or width, a width over 32, or an unknown rounding mode.
    """
    if np.size(bits) == 0 or np.size(zero_point) == 0 or not np.isfinite(zero_point).all():
        raise LoweringError("a Quant has a bit width or a zero point that is no number, expected one integer each")
    width, zero = float(np.asarray(bits).reshape(-1)[0]), float(np.asarray(zero_point).reshape(-1)[0])
    if np.unique(bits).size != 1 or not 1 <= width <= 32 or width != int(width):
        raise LoweringError(f"a Quant has a bit width of {np.unique(bits).tolist()[:4]}, expected one integer up to 32")
    if np.unique(zero_point).size != 1 or zero != int(zero):
        raise LoweringError(f"a Quant has the zero point {np.unique(zero_point).tolist()[:4]}, expected one integer")
    name = ROUNDING_NAMES.get(rounding.upper())
    if name is None:
        known = ", ".join(ROUNDING_NAMES)
        raise LoweringError(f"a Quant rounds by {rounding[:40]!r}, expected one of {known}")
    bits_, zp = int(width), int(zero)
    if bits_ == 1 and signed:
        return Quantiser(_flat(scale), 0, -1, 1, name, "qonnx", True)
    low = -(1 << (bits_ - 1)) + narrow if signed else 0
    high = (1 << (bits_ - 1)) - 1 if signed else (1 << bits_) - 1 - narrow
    return Quantiser(_flat(scale), zp, low - zp, high - zp, name, "qonnx")


def onnx_quantiser(scale: np.ndarray, zero_point: np.ndarray | None) -> Quantiser:
    """ONNX's QuantizeLinear as a `Quantiser`; the zero point's type gives the rails (uint8 without one).

    Raises:
        LoweringError: for zero points that differ by channel, or a type that is no integer.
    """
    zero = np.zeros((), np.uint8) if zero_point is None else np.asarray(zero_point)
    if zero.size == 0:
        raise LoweringError("a QuantizeLinear has an empty zero point, expected one integer")
    if zero.dtype.kind not in "iu" or zero.dtype.itemsize > 4:
        raise LoweringError(f"a QuantizeLinear has a zero point of type {zero.dtype}, expected int8 to int32")
    if np.unique(zero).size != 1:
        raise LoweringError("a QuantizeLinear of data has zero points that differ by channel, expected one")
    info, zp = np.iinfo(zero.dtype), int(zero.reshape(-1)[0])
    return Quantiser(_flat(scale), zp, int(info.min) - zp, int(info.max) - zp)


def _flat(scale: np.ndarray) -> np.ndarray:
    array = np.asarray(scale, np.float32)
    return array.reshape(()) if array.size == 1 else array.reshape(-1)
