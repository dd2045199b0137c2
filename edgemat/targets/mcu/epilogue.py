"""What happens to an accumulator: its width, the kind of its shifts, rounding and overflow of the result.

* ``int32_t`` where every partial sum in any order, every aligned operand and both rails of the result fit 32 bits, else
  ``int64_t``. Sums of products run in ``int16_t`` (``EM_SUM``) where the file states an accumulator of at most 16 bits,
  which its partial sums are proved to fit; the epilogue then widens them.
* A right shift beyond the accumulator's width is replaced by the largest legal one only where the accumulator's
  interval makes both round alike (``|a| < 2**(s-1)``, where every mode sees the same floor and no tie).
* The overflow code is left out (``EM_FITS``) where the rounded interval lies inside the format's rails.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgemat import formats
from edgemat.errors import UnsupportedOpError
from edgemat.formats import Fixed
from edgemat.targets.layout import NativeTensor, Step
from edgemat.targets.mcu.storage import ConstantArray, literal

SHORT_BITS = 16


class EpilogueChoice:
    """The choice for one step.

    Attributes:
        shift: right shifts, one or one per channel; empty where nothing is shifted.
        widths: bits of each channel's code where they differ and saturate; else empty.
        macros: what the variant defines.
        name: what tells the variant from others.
    """

    def __init__(self, step: Step, arrays: Sequence[ConstantArray | None]) -> None:
        self.step = step
        stated = step.bounds.width
        narrow = stated is not None and stated <= SHORT_BITS
        final = tuple(int(v) for v in step.bounds.final)
        reach = _reach(step, arrays)
        self.name: list[str] = []
        self.macros: list[tuple[str, str]] = []
        self.shift: tuple[int, ...] = ()
        self.widths: tuple[int, ...] = ()
        if narrow:
            self.macros.append(("EM_SUM_BITS", str(SHORT_BITS)))
            self.name.append(f"sum{SHORT_BITS}")
        if step.epilogue is None:
            if reach >= 1 << 63:
                self.refuse(reach)
            bits = 32 if reach < 1 << 31 else 64
            if bits == 64:
                self.accumulate(bits)
            return
        fmt: Fixed = step.epilogue.format
        y_min, y_max = fmt.rails
        shifts = tuple(int(s) for s in step.epilogue.shift)
        divide = False
        if step.stem == "average_pool":
            counts = _counts(step.params)
            divide = len(counts) > 1 or counts[0] & (counts[0] - 1) != 0
            if not divide:
                shifts = tuple(s + counts[0].bit_length() - 1 for s in shifts)
        magnitude = max(abs(final[0]), abs(final[1]))
        if divide:
            shifts, bits = self.divided(shifts, reach, magnitude, max(counts), y_min, y_max)
            overflow = overflow_kind(fmt, *self.divided_interval(final, shifts, counts))
        else:
            overflow = overflow_kind(fmt, *_shifted(final, shifts, fmt))
            bits, shifts = self.fit(shifts, reach, magnitude, y_min, y_max)
        kind = "NONE" if not any(shifts) else "RIGHT" if min(shifts) > 0 else "ANY"
        rounding = fmt.rounding if divide or max(shifts) > 0 else "TRN"
        if bits == 64:
            self.accumulate(bits)
        if kind != "NONE":
            self.macros.append(("EM_KIND", f"EM_SHIFT_{kind}"))
        if kind != "NONE" or divide:
            self.macros.append(("EM_ROUNDING", f"EM_{rounding}"))
            self.name.append(rounding.lower())
        if rounding == "RND" and not divide:
            roomy = magnitude + (1 << max(shifts) >> 1) < 1 << (bits - 1)
            self.macros.append(("EM_HEADROOM", str(int(roomy))))
            self.name += [] if roomy else ["full"]
        if overflow != "FITS":
            self.macros += overflow_macros(fmt, overflow)
            self.name.append(overflow_name(fmt))
            self.widths = fmt.widths or ()
        if kind == "ANY":
            self.name.append("any")
        if len(self.widths) == 1:
            self.widths *= step.outputs[0].shape[-1] if step.outputs[0].shape else 1
        if len(shifts) > 1 and kind != "NONE":
            self.macros.append(("EM_PER_CHANNEL", "1"))
            self.name.append("pc")
        if step.stem == "average_pool":
            self.macros.append(("EM_DIVIDE", "1" if divide else "0"))
            self.name += ["div", kind.lower()] if divide else []
        self.shift = shifts if kind != "NONE" else ()

    def accumulate(self, bits: int) -> None:
        self.macros.append(("EM_ACC_BITS", str(bits)))
        self.name.append(f"acc{bits}")

    def refuse(self, reach: int) -> None:
        raise UnsupportedOpError(
            f"node {self.step.node!r}: a partial sum or a requantised value reaches {reach.bit_length()} bits, the mcu "
            "target holds 63; narrow the formats"
        )

    def fit(
        self, shifts: tuple[int, ...], reach: int, magnitude: int, y_min: int, y_max: int
    ) -> tuple[int, tuple[int, ...]]:
        """Accumulator width, and shifts that are legal in it and round alike."""
        for bits in (32, 64):
            top = bits - 2
            if max(reach, -y_min, y_max) >= 1 << (bits - 1):
                continue
            if max(shifts) > top and magnitude >= 1 << (top - 1):
                continue
            return bits, tuple(max(min(s, top), -(bits - 1)) for s in shifts)
        self.refuse(reach)
        raise AssertionError

    def divided(
        self, shifts: tuple[int, ...], reach: int, magnitude: int, count: int, y_min: int, y_max: int
    ) -> tuple[tuple[int, ...], int]:
        """Shifts and width for the dividing average: numerator and denominator below a quarter of the range.

        Beyond ``bit_length(magnitude) + 2`` a larger right shift leaves ``|sum| / denominator < 1/2`` in any case.
        """
        shifts = tuple(min(s, magnitude.bit_length() + 2) for s in shifts)
        numerator = magnitude << max(0, -min(shifts))
        denominator = count << max(0, max(shifts))
        for bits in (32, 64):
            if max(numerator, denominator) < 1 << (bits - 3) and max(reach, -y_min, y_max) < 1 << (bits - 1):
                return shifts, bits
        self.refuse(max(numerator, denominator))
        raise AssertionError

    @staticmethod
    def divided_interval(final: tuple[int, ...], shifts: tuple[int, ...], counts: list[int]) -> tuple[int, int]:
        """A safe interval of the rounded average (one code wider than the exact quotients)."""
        ends = [(value << max(0, -s)) // (count << max(0, s)) for value in final for s in shifts for count in counts]
        return min(ends) - 1, max(ends) + 1


def _shifted(final: tuple[int, ...], shifts: tuple[int, ...], fmt: Fixed) -> tuple[int, int]:
    ends = np.array(final, dtype=object)
    rounded = [formats.round_shift(ends, shift, fmt.rounding) for shift in set(shifts)]
    return min(int(r[0]) for r in rounded), max(int(r[1]) for r in rounded)


def overflow_kind(fmt: Fixed, low: int, high: int) -> str:
    """The overflow mode a rounded interval needs; ``FITS`` where it needs none."""
    if fmt.holds(low, high):
        return "FITS"
    return {"SAT_SYM": "SAT"}.get(fmt.overflow, fmt.overflow)


def overflow_macros(fmt: Fixed, overflow: str) -> list[tuple[str, str]]:
    """The overflow mode and the code range of a variant."""
    low, high = fmt.rails
    made = [("EM_OVERFLOW", f"EM_{overflow}"), ("EM_Y_MIN", literal(low)), ("EM_Y_MAX", literal(high))]
    if fmt.widths is not None:
        rails = "UNSIGNED" if not fmt.signed else "SYMMETRIC" if fmt.overflow == "SAT_SYM" else "SIGNED"
        made += [("EM_WIDTHS", "1"), ("EM_RAILS", f"EM_RAILS_{rails}")]
    return made


def overflow_name(fmt: Fixed) -> str:
    """What tells variants of different code ranges apart: ``sat6`` saturates to six bits."""
    if fmt.bipolar:
        return "sign"
    # Codes of 17 to 31 unsigned bits share the element of signed ones.
    marks = ("u" if not fmt.signed and fmt.width > 16 else "") + ("" if fmt.widths is None else "w")
    return fmt.overflow.lower().replace("_", "") + str(fmt.width) + marks


def _reach(step: Step, arrays: Sequence[ConstantArray | None]) -> int:
    """A bound of the magnitude of everything the accumulator type has to hold before the epilogue."""
    bounds = [abs(int(v)) for v in (*step.bounds.final, *step.bounds.partial)]
    params = step.params
    for position, tensor in enumerate(step.inputs):
        align = int(params.get(f"align{position}", 0))
        bounds.append(_magnitude(tensor) << align)
    if step.stem in ("clip", "prelu"):
        bounds.append(_magnitude(step.inputs[0]) << int(params["align"]))
    if step.stem == "clip":
        bounds += [abs(int(params["low"])), abs(int(params["high"]))]
    if step.stem in ("affine", "prelu"):
        factor = arrays[0]
        assert factor is not None
        bounds.append(_magnitude(step.inputs[0]) * int(np.abs(factor.values).max()))
    bounds += [int(np.abs(array.values).max()) for array in arrays if array is not None and array.values.size]
    return max(bounds)


def _magnitude(tensor: NativeTensor) -> int:
    return max(abs(tensor.lo), abs(tensor.hi))


def _counts(params: dict) -> list[int]:
    """The distinct numbers of elements that average pooling divides by."""
    axes = []
    for size, kernel, stride, begin, end, out in (
        ("in_h", "kernel_h", "stride_h", "pad_top", "pad_bottom", "out_h"),
        ("in_w", "kernel_w", "stride_w", "pad_left", "pad_right", "out_w"),
    ):
        first, last = (-params[begin], params[size] + params[end]) if params["count_include_pad"] else (0, params[size])
        starts = np.arange(params[out]) * params[stride] - params[begin]
        axes.append(set((np.minimum(starts + params[kernel], last) - np.maximum(starts, first)).tolist()))
    return sorted({rows * columns for rows in axes[0] for columns in axes[1]})
