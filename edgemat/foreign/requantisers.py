"""From the codes of an accumulator to the codes of a quantiser: the chain between them as integer arithmetic.

The function ``codes -> codes`` that the file computes is known exactly (`Compiled`); it is written, best first, as

1. a Requantize, where every scale is a power of two and nothing but a ReLU stands between;
2. Thresholds, where they are few and differ by channel, and a Table, where it is small and the channels agree;
3. a multiplier, an offset and a shift for each channel (an Affine), where some equal the function everywhere;
4. a Table, for inputs of at most 12 bits and channels that agree;
5. Thresholds, for monotone functions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgemat.errors import LoweringError
from edgemat.foreign.chains import Chain
from edgemat.foreign.quantisers import Quantiser
from edgemat.foreign.reach import channel_reach
from edgemat.foreign.signals import Signal
from edgemat.foreign.solver import Gaps, Multipliers, find_thresholds, solve_multipliers
from edgemat.foreign.workbench import Workbench
from edgemat.formats import BIPOLAR, Fixed, accumulator
from edgemat.op import Tensor
from edgemat.ops.table import MAX_INPUT_BITS

FEW_LEVELS = 15
"""Up to so many thresholds, comparing is cheaper than multiplying."""
MAX_LEVELS = 1 << 16
MAX_TRIED = 1 << 22
"""Up to so many codes of all channels are evaluated to see whether a function is monotone."""
SMALL_TABLE = 1 << 9
"""Up to so many entries a table is as small as a multiplier's code."""


@dataclass(frozen=True)
class Compiled:
    """A function of integer codes, by channel.

    Attributes:
        fracs: Fractional bits of the input, [C] int64.
        lo: Smallest input code of each channel, [C].
        hi: Largest input code.
        factor: float32 [C]: real value of 1.0 in the input's format.
        chain: What is applied to the real value.
        quantiser: What ends it.
        fused: Whether scale and division are one float32 multiplication, as in integer kernels of onnxruntime.
    """

    fracs: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    factor: np.ndarray
    chain: Chain
    quantiser: Quantiser
    fused: bool

    @property
    def channels(self) -> int:
        """Channels it tells apart."""
        return self.lo.size

    def values(self, codes: np.ndarray) -> np.ndarray:
        """float32 real values [C, K] of codes [C, K], before the chain."""
        plain = np.ldexp(codes.astype(np.float64), -self.fracs[:, None]).astype(np.float32)
        return plain if (self.factor == 1).all() else plain * self.factor[:, None]

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        """int64 codes [C, K] of codes [C, K]."""
        scale = np.broadcast_to(self.quantiser.scale, (self.channels,)).astype(np.float32)[:, None]
        if self.fused and not self.chain:
            plain = np.ldexp(codes.astype(np.float64), -self.fracs[:, None]).astype(np.float32)
            return self.quantiser.round(plain * (self.factor[:, None] / scale))
        return self.finish(self.values(codes))

    def finish(self, values: np.ndarray) -> np.ndarray:
        """int64 codes [C, K] of float32 real values [C, K] before the chain."""
        scale = np.broadcast_to(self.quantiser.scale, (self.channels,)).astype(np.float32)[:, None]
        behind = self.chain.evaluate(values.T).T
        if np.isnan(behind).any():
            listed = ", ".join(step.node for step in self.chain.steps)
            raise LoweringError(f"the nodes {listed} make NaN of some codes; clip their input, or calibrate it again")
        return replace(self.quantiser, scale=scale)(np.asarray(behind, np.float32))

    def alone(self) -> Compiled:
        """The function of one channel where all channels have the same; otherwise itself."""
        same = all((values == values[:1]).all() for values in (self.fracs, self.factor))
        if not same or self.chain.channels > 1 or self.quantiser.scale.size > 1:
            return self
        lo, hi = (np.atleast_1d(edge) for edge in (self.lo.min(), self.hi.max()))
        return replace(self, fracs=self.fracs[:1], lo=lo, hi=hi, factor=self.factor[:1])

    def sign(self) -> np.ndarray:
        """1 non-decreasing, -1 non-increasing, 0 unknown, by channel."""
        return self.chain.sign(self.channels)

    def observed_sign(self) -> np.ndarray:
        """`sign` from all codes of each channel, one after the other; 0 where there are too many, or it turns."""
        span = int((self.hi - self.lo).max()) + 1
        if span * self.channels > MAX_TRIED:
            return np.zeros(self.channels, np.int64)
        steps = np.diff(self(np.minimum(self.lo[:, None] + np.arange(span), self.hi[:, None])), axis=1)
        return np.where((steps >= 0).all(axis=1), 1, np.where((steps <= 0).all(axis=1), -1, 0))

    def slopes(self) -> np.ndarray:
        """Levels a code, where the chain is a product: float64 [C], 0 where nothing is known."""
        scale = np.broadcast_to(np.asarray(self.quantiser.scale, np.float64), (self.channels,))
        slope = np.ldexp(np.broadcast_to(self.factor.astype(np.float64), (self.channels,)), -self.fracs) / scale
        for step in self.chain.steps:
            if step.op_type in ("Mul", "Div") and step.position == 0:
                k = np.abs(step.constant(1))
                slope = slope * np.broadcast_to(k if step.op_type == "Mul" else 1 / k, slope.shape)
            elif step.op_type == "BatchNormalization":
                eps = float(step.attributes.get("epsilon", 1e-5))
                slope = slope * np.abs(step.constant(1)) / np.sqrt(step.constant(4) + eps)
            elif step.op_type not in ("Relu", "Clip", "Add", "Sub", "Identity", "Neg"):
                return np.zeros(self.channels)
        return np.where(np.isfinite(slope), slope, 0.0)


def compiled(bench: Workbench, signal: Signal, quantiser: Quantiser) -> Compiled:
    """The function from a signal's codes to a quantiser's.

    Raises:
        LoweringError: if its constants differ over more channels than axis 1 has.
    """
    tensor = bench.type(signal.value)
    lows, highs = channel_reach(bench, signal.value)
    counts = {
        np.size(signal.factor),
        signal.chain.channels,
        np.size(quantiser.scale),
        lows.size,
        len(tensor.format.fracs),
    }
    channels = max(counts)
    if counts - {1, channels} or (channels > 1 and channels != tensor.shape[1]):
        raise LoweringError(
            f"constants for {sorted(counts)} channels meet a tensor of shape {tensor.shape}, expected one or one for "
            "each entry of axis 1"
        )

    def spread(values: object, dtype: type) -> np.ndarray:
        return np.broadcast_to(np.asarray(values, dtype).reshape(-1), (channels,)).copy()

    return Compiled(
        spread(tensor.format.fracs, np.int64),
        spread(lows, np.int64),
        spread(highs, np.int64),
        spread(signal.factor, np.float32),
        signal.chain,
        quantiser,
        signal.fused,
    )


def quantise(bench: Workbench, signal: Signal, quantiser: Quantiser, name: str) -> tuple[Signal, str]:
    """Writes the quantiser behind a signal; returns the codes and what they were made with.

    Raises:
        LoweringError: where no exact integer form exists.
    """
    tensor = bench.type(signal.value)
    function = compiled(bench, signal, quantiser)
    made = _shifted(bench, signal, quantiser, name) or _written(bench, tensor, signal, function, name)
    value, how = made
    return Signal(value, quantiser.factor, perm=signal.perm), how


def _shifted(bench: Workbench, signal: Signal, quantiser: Quantiser, name: str) -> tuple[ir.Value, str] | None:
    """A Requantize, where binary points alone are moved; None elsewhere."""
    steps = [step.op_type for step in signal.chain.steps]
    if quantiser.fracs is None or (signal.factor != 1).any() or any(op not in ("Relu", "Identity") for op in steps):
        return None
    if quantiser.rounding in ("CEIL", "AWAY"):
        return None  # no Requantize rounds up
    if quantiser.style != "onnx" and shifts_ties(quantiser):
        return None
    rectified = "Relu" in steps
    if rectified and quantiser.low > 0:
        return None
    if quantiser.bipolar:
        return None if rectified else (bench.add("Requantize", [signal.value], {"requantize": "bipolar"}, name), "sign")
    value = bench.add("Relu", [signal.value], {}, f"{name}_relu") if rectified and quantiser.low < 0 else signal.value
    fmt = replace(quantiser.format, rounding=quantiser.rounding)
    return clipped(bench, bench.requantised(value, fmt, name), quantiser, name), f"{fmt}"


def shifts_ties(quantiser: Quantiser) -> bool:
    """Whether rounding after the zero point was added differs from rounding before."""
    zero = quantiser.zero_point
    return quantiser.rounding != "TRN" and (zero % 2 != 0 if quantiser.rounding == "RND_CONV" else zero != 0)


def clipped(bench: Workbench, value: ir.Value, quantiser: Quantiser, name: str) -> ir.Value:
    """Clips to the quantiser's rails where the format's lie further out and the interval reaches there."""
    tensor = bench.type(value)
    if not quantiser.clipped or (quantiser.low <= tensor.lo and tensor.hi <= quantiser.high):
        return value
    made = bench.add("Clip", [value], {"low": quantiser.low, "high": quantiser.high}, f"{name}_clip")
    fmt = quantiser.format
    return made if bench.type(made).format.fracs == fmt.fracs else bench.requantised(made, fmt, f"{name}_format")


def _written(bench: Workbench, tensor: Tensor, signal: Signal, function: Compiled, name: str) -> tuple[ir.Value, str]:
    quantiser = function.quantiser
    span = int((function.hi - function.lo).max()) + 1
    small = tensor.format.width <= MAX_INPUT_BITS and not (tensor.format.bipolar or tensor.format.per_channel)
    sign = function.sign()
    if (sign == 0).any():
        if small and function.alone().channels == 1:
            return _table(bench, tensor, signal, function.alone(), name)
        sign = function.observed_sign()
        if (sign == 0).any():
            raise LoweringError(
                f"a function that is not monotone, or not known to be, behind {span} codes"
                f"{f' and {function.channels} channels' if function.channels > 1 else ''}; quantise its input to at "
                f"most {MAX_INPUT_BITS} bits, one scale for all channels"
            )
    rising = _rising(function, sign)
    lo, hi = np.where(sign < 0, -function.hi, function.lo), np.where(sign < 0, -function.lo, function.hi)
    ends = rising(np.stack([lo, hi], axis=1))
    low, high = int(ends.min()), int(ends.max())
    if quantiser.bipolar:
        low, high = -1, 1
    by_table = small and function.channels == 1
    if high - low >= MAX_LEVELS:
        if by_table:
            return _table(bench, tensor, signal, function, name)
        raise LoweringError(f"{high - low + 1} levels behind a real scale, expected at most {MAX_LEVELS}")
    few = high - low <= FEW_LEVELS and function.channels > 1
    if not few and not quantiser.bipolar and not (by_table and span <= SMALL_TABLE):
        # One level more on each side where the rails lie further out: the product must not leave low .. high either.
        floor, top = max(low - 1, quantiser.low), min(high + 1, quantiser.high)
        gaps = Gaps.of(find_thresholds(rising, lo, hi, floor, top), lo, hi, floor)
        solved = solve_multipliers(gaps, function.slopes())
        if solved is not None:
            return _multiplied(bench, tensor, signal, quantiser, replace(solved, a=solved.a * sign), name)
    if by_table and not quantiser.bipolar:
        return _table(bench, tensor, signal, function, name)
    thresholds = find_thresholds(rising, lo, hi, low, max(high, low + 1))  # of a constant: one that is never reached
    value = _flipped(bench, tensor, signal.value, sign, name) if (sign < 0).any() else signal.value
    return _compared(bench, value, quantiser, thresholds, low, name)


def _rising(function: Compiled, sign: np.ndarray):  # type: ignore[no-untyped-def]
    """The function over codes of flipped sign where it falls: non-decreasing on every channel."""
    return lambda codes: function(codes * sign[:, None])


def _multiplied(
    bench: Workbench, tensor: Tensor, signal: Signal, quantiser: Quantiser, solved: Multipliers, name: str
) -> tuple[ir.Value, str]:
    channels = int(tensor.shape[1] or 1) if len(tensor.shape) > 1 else 1

    def spread(values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values, (channels,)).copy()

    a, b, shift = spread(solved.a), spread(solved.b), spread(solved.shift)
    target = replace(quantiser.format, rounding=solved.rounding)
    points = np.broadcast_to(np.asarray(target.fracs), (channels,))
    fracs = shift + points - np.broadcast_to(np.asarray(tensor.format.fracs), (channels,))
    width = solved.width + (0 if (a < 0).any() else 1)
    w_format = Fixed(width, width).with_frac(_uniform(fracs))
    b_format = Fixed(32, 32).with_frac(_uniform(fracs + np.broadcast_to(np.asarray(tensor.format.fracs), (channels,))))
    inputs = [signal.value, bench.codes(a, w_format, f"{name}_multiplier"), bench.codes(b, b_format, f"{name}_offset")]
    attrs = {"w_format": str(w_format), "b_format": str(b_format)}
    scaled = bench.add("Affine", inputs, attrs, f"{name}_scale")
    stated = _span(solved.shift)
    if solved.grid is not None:
        scaled = rounded_first(bench, scaled, points + spread(solved.grid), name)
        stated += f", rounded at {_span(solved.grid)} bits first"
    value = clipped(bench, bench.requantised(scaled, target, name), quantiser, name)
    return value, f"multiplier of {solved.width} bits, shift {stated}"


def _span(shifts: np.ndarray) -> str:
    found = sorted(set(shifts.tolist()))
    return f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"


def rounded_first(bench: Workbench, scaled: ir.Value, fracs: np.ndarray, name: str) -> ir.Value:
    """The products on a coarser grid, halves up, nothing cut off."""
    tensor = bench.type(scaled)
    # The least shift of a channel sizes the format: nothing may saturate between the two roundings.
    lost = int((np.broadcast_to(np.asarray(tensor.format.fracs), fracs.shape) - fracs).min())
    lo, hi = (tensor.lo >> lost, -(-tensor.hi >> lost) + 1) if lost > 0 else (tensor.lo << -lost, tensor.hi << -lost)
    fmt = replace(accumulator(min(lo, -1), max(hi, 1), (0,)), rounding="RND")
    return bench.requantised(scaled, fmt.with_frac(_uniform(fracs)), f"{name}_first")


def _table(bench: Workbench, tensor: Tensor, signal: Signal, function: Compiled, name: str) -> tuple[ir.Value, str]:
    fmt, target = tensor.format, replace(function.quantiser.format, rounding="RND")
    codes = np.clip(np.arange(fmt.min_code, fmt.max_code + 1), tensor.lo, tensor.hi)[None, :]
    table = bench.codes(function(codes)[0], target, f"{name}_table")
    attrs = {"function": "imported", "y_format": str(target)}
    return bench.add("Table", [signal.value, table], attrs, name), f"table of {codes.size}"


def _flipped(bench: Workbench, tensor: Tensor, value: ir.Value, sign: np.ndarray, name: str) -> ir.Value:
    """Negates the channels on which the function falls."""
    channels = int(tensor.shape[1] or 1)
    fmt = Fixed(2, 2)
    signs = np.broadcast_to(sign, (channels,)).astype(np.int64)
    b_format = Fixed(32, 32).with_frac(tensor.format.fracs[0] if not tensor.format.per_channel else tensor.format.fracs)
    inputs = [value, bench.codes(signs, fmt, f"{name}_sign"), bench.codes(signs * 0, b_format, f"{name}_none")]
    return bench.add("Affine", inputs, {"w_format": str(fmt), "b_format": str(b_format)}, f"{name}_flip")


def _compared(
    bench: Workbench, value: ir.Value, quantiser: Quantiser, thresholds: np.ndarray, low: int, name: str
) -> tuple[ir.Value, str]:
    target = BIPOLAR if quantiser.bipolar else replace(quantiser.format, rounding="RND")
    step = 2 if quantiser.bipolar else 1
    if quantiser.bipolar:  # levels 0 and 1 are one step from -1 to +1
        thresholds = thresholds[:, -1:]
    stored = bench.plain(thresholds, f"{name}_thresholds")
    attrs = {"start": low, "step": step, "y_format": str(target)}
    made = bench.add("Thresholds", [value, stored], attrs, name)
    return made, f"{thresholds.shape[1]} thresholds"


def _uniform(fracs: np.ndarray) -> int | tuple[int, ...]:
    values = tuple(int(v) for v in fracs)
    return values[0] if len(set(values)) == 1 else values
