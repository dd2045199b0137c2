"""Requantize, once for all operators: its shifts, the intervals it can reach, and its body in standard ONNX.

Formats may differ by channel in their binary points and in their widths. A channel of width 0 holds only the code 0:
its shift does not matter, and it takes that of the others. `bipolar` looks at the sign alone: its shift is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from edgemat import formats
from edgemat.body import Body, Coded
from edgemat.errors import FormatError
from edgemat.formats import Fixed


def channel_shifts(source: Fixed, target: Fixed) -> tuple[int, ...]:
    """Right shifts (negative: left) from the grid of `source` to that of `target`: one entry, or one per channel."""
    if target.bipolar:
        return (0,)
    have, wanted = source.fracs, target.fracs
    count = max(len(have), len(wanted))
    pairs = [have[i % len(have)] - wanted[i % len(wanted)] for i in range(count)]
    if source.widths is not None or target.widths is not None:
        widths = [source.widths or (1,), target.widths or (1,)]
        live = [all(w[i % len(w)] for w in widths) for i in range(count)]
        usual = next((pair for pair, alive in zip(pairs, live, strict=True) if alive), 0)
        pairs = [pair if alive else usual for pair, alive in zip(pairs, live, strict=True)]
    return formats.uniform(tuple(pairs))


def narrowed_interval(lo: int, hi: int, source: Fixed, shifts: Sequence[int], target: Fixed) -> tuple[int, int]:
    """Interval of Requantize over codes of `source` within lo..hi, channel by channel where widths differ."""
    if source.widths is None and target.widths is None:
        return shifted_interval(lo, hi, shifts, target)
    have, wanted = source.widths or (None,), target.widths or (None,)
    count = max(len(have), len(wanted), len(shifts))
    ends = []
    for before, shift, after in {
        (have[i % len(have)], shifts[i % len(shifts)], wanted[i % len(wanted)]) for i in range(count)
    }:
        low, high = (
            (lo, hi) if before is None else (max(lo, source.rails_of(before)[0]), min(hi, source.rails_of(before)[1]))
        )
        if after == 0 or low > high:
            ends += [0]
        else:
            narrow = target if after is None else replace(target, width=after, int_bits=0, widths=None)
            ends += shifted_interval(low, high, (shift,), narrow)
    return min(ends), max(ends)


def shifted_interval(lo: int, hi: int, shifts: Sequence[int], target: Fixed) -> tuple[int, int]:
    """Interval of Requantize over the codes lo..hi for any of the right shifts.

    Rounding is monotone and so is SAT; where WRAP or SAT_ZERO would act, the answer is the whole code range
    (for SAT_ZERO: the part of it between 0 and the rounded ends).
    """
    ends = np.array([lo, hi], dtype=object)
    lows, highs = zip(*(formats.round_shift(ends, s, target.rounding) for s in set(shifts)), strict=True)
    return overflow_interval(min(lows), max(highs), target)


def overflow_interval(low: int, high: int, target: Fixed) -> tuple[int, int]:
    """Interval of rounded codes low..high after the overflow mode of `target`."""
    floor, top = target.rails
    if target.bipolar:
        return (-1 if low < 0 else 1), (1 if high >= 0 else -1)
    if floor <= low and high <= top:
        return int(low), int(high)
    if target.overflow == "WRAP":
        return floor, top
    if target.overflow == "SAT_ZERO":
        return max(min(int(low), 0), floor), min(max(int(high), 0), top)
    return min(max(int(low), floor), top), max(min(int(high), top), floor)


def emit_requantize(
    body: Body, acc: Coded, shift: tuple[int, ...], target: Fixed, lo: int, hi: int, ndim: int, axis: int = 1
) -> Coded:
    """Writes round-then-overflow of codes lo..hi, in the fastest carrier that keeps every step exact."""
    shifts = formats.channel_array(shift, ndim, axis)
    largest, smallest = max(shift), min(shift)
    reach = max(abs(lo), abs(hi)) + (1 << max(largest, 0))
    reach = max(reach, max(abs(lo), abs(hi), 1) << max(-smallest, 0), 1 << min(target.width, 62))
    ends = np.array([lo, hi], dtype=object)
    rounded = [formats.round_shift(ends, s, target.rounding) for s in set(shift)]
    low, high = min(int(r[0]) for r in rounded), max(int(r[1]) for r in rounded)
    carrier = carrier_for(reach, minimum=acc.dtype)
    if carrier.kind == "f":
        value = body.cast(acc, carrier)
        if any(shift):
            value = body.scale(value, np.ldexp(1.0, -shifts))
            value = body.round(value, target.rounding)
        return body.overflow(value, target, low, high, ndim, axis)
    wraps = target.overflow == "WRAP" and target.width > 62 and not target.holds(low, high)
    if max(abs(low), abs(high)) >= 1 << 62 or -smallest > 61 or largest > 61 or wraps:
        raise FormatError(
            f"requantising codes {lo} to {hi} to {target} needs more than 63 bits, expected less; narrow the formats"
        )
    value = body.round_shift_int64(body.cast(acc, np.dtype(np.int64)), shifts, target.rounding)
    return body.overflow(value, target, low, high, ndim, axis)


def carrier_for(magnitude: int, minimum: np.dtype | None = None) -> np.dtype:
    """float32 where |codes| stay below 2**24, float64 below 2**53, else int64.

    Args:
        magnitude: Largest absolute integer that occurs, partial sums included.
        minimum: Type the value has already; a float64 is not narrowed to float32, an int64 of small codes is.
    """
    # `is None` first: numpy takes None for float64 in a comparison of dtypes.
    if magnitude < 1 << 24 and (minimum is None or minimum != np.dtype(np.float64)):
        return np.dtype(np.float32)
    return np.dtype(np.float64) if magnitude < 1 << 53 else np.dtype(np.int64)
