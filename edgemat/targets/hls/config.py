"""The config struct of each call: what a step of the network says, spelled in C++ for one template instantiation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import numpy as np

from edgemat.errors import UnsupportedOpError
from edgemat.formats import OVERFLOWS, ROUNDINGS, Fixed
from edgemat.targets.layout import NativeTensor, Step

DOTS = ("linear", "conv", "conv_transpose")
POOLS = ("max_pool", "average_pool")
UNARY = ("requantize", "relu", "clip", "affine", "prelu", "table", "thresholds")
BINARY = ("add", "sub", "mul")
ROWS = ("rms_norm", "layer_norm", "token_exponent", "token_quantize", "token_rescale")
HELD = ("slice", "transpose", "pad", "arg_max", "upsample", "softmax", "embedding", *ROWS)
COMPARATORS = 7
"""Thresholds of a channel that are compared side by side; more are searched."""
STEMS = (*DOTS, *POOLS, *UNARY, *BINARY, *HELD, "concat", "matmul")


@dataclass(frozen=True)
class Member:
    """A typedef, a constant or an accessor of a config struct: the text left and right of its name."""

    kind: str
    name: str
    value: str


@dataclass(frozen=True)
class Config:
    """A config struct."""

    name: str
    comment: str
    types: tuple[Member, ...]
    constants: tuple[Member, ...]
    accessors: tuple[Member, ...]


@dataclass(frozen=True)
class ConstantArray:
    """A constant array in ROM: its C++ element type, extents and rows of literals.

    `width` is 0 where the array takes no memory, because its entries are constants of an unrolled structure.
    """

    name: str
    element: str
    extents: str
    values: np.ndarray
    width: int
    qualifier: str = "const"

    @property
    def bits(self) -> int:
        """Bits of memory it fills."""
        return self.width * int(self.values.size)

    @property
    def lines(self) -> tuple[str, ...]:
        """The initialiser, line by line."""
        return tuple(_initialiser(self.values))


def code_type(fmt: Fixed) -> str:
    """The C++ type of a code of `fmt`."""
    return f"ap_int<{fmt.storage_width}>" if fmt.signed else f"ap_uint<{fmt.storage_width}>"


def signed_width(lo: int, hi: int) -> int:
    """Bits of the narrowest two's complement integer that holds lo and hi."""
    return max(hi.bit_length(), (-lo - 1).bit_length() if lo < 0 else 0) + 1


def constant_array(name: str, values: np.ndarray) -> ConstantArray:
    """A constant array of the narrowest element type that holds its values."""
    lo, hi = int(values.min(initial=0)), int(values.max(initial=0))
    width, signed = signed_width(lo, hi), "true"
    if lo >= 0 and width <= 32:
        width, signed = max(width - 1, 1), "false"
    extents = "".join(f"[{n}]" for n in values.shape)
    return ConstantArray(name, f"edgemat::constant<{width}, {signed}>::type", extents, values, width)


def integer(value: int) -> str:
    """A C++ literal of an integer that may be as long as 64 bits."""
    if value == -(1 << 63):
        return "(-9223372036854775807LL - 1)"
    return str(value) if -(1 << 31) < value < 1 << 31 else f"{value}LL"


class ConfigBuilder:
    """Collects the members of one config struct.

    Args:
        step: the call.
        name: identifier of the step.
    """

    def __init__(self, step: Step, name: str) -> None:
        if step.stem not in STEMS:
            raise UnsupportedOpError(
                f"node {step.node!r}: operator {step.stem!r} has no HLS template; use --target mcu or another operator"
            )
        self.step = step
        self.name = name
        self.types: list[Member] = []
        self.constants: list[Member] = []
        self.accessors: list[Member] = []
        self.arrays: dict[str, ConstantArray] = {}
        self.y = step.outputs[0]
        self.channels = self.y.shape[-1] if self.y.shape else 1

    def typedef(self, name: str, value: str) -> None:
        self.types.append(Member("typedef", name, value))

    def constant(self, name: str, value: int | bool) -> None:
        if isinstance(value, bool):
            self.constants.append(Member("bool", name, "true" if value else "false"))
        else:
            wide = not -(1 << 31) < value < 1 << 31
            self.constants.append(Member("long long" if wide else "int", name, integer(int(value))))

    def named(self, name: str, enumerator: str) -> None:
        """A constant that is one of the library's enumerators."""
        self.constants.append(Member("int", name, f"edgemat::{enumerator}"))

    def array(self, key: str, values: np.ndarray) -> ConstantArray:
        # No underscore in the key: node `a` with key `exp_table` and node `a_exp` with key `table` must not meet.
        self.arrays[key] = constant_array(f"{self.name}_{key.replace('_', '')}", values)
        return self.arrays[key]

    def accessor(self, result: str, name: str, body: str) -> None:
        self.accessors.append(Member(result, name, body))

    def look_up(self, name: str, values: np.ndarray) -> None:
        """An accessor that reads a constant array; one entry serves every index."""
        array = self.array(name, values.reshape(-1))
        index = "0 * i" if values.size == 1 else "i"
        self.accessor(array.element, f"{name}(int i)", f"return {array.name}[{index}];")

    def threshold_parts(self, parts: Sequence[np.ndarray]) -> None:
        """An accessor of thresholds, part by part: memories of one element type that are read side by side."""
        whole = constant_array("", np.concatenate(parts))
        body = ""
        for i, part in enumerate(parts):
            made = self.array(f"threshold{i}", part)
            self.arrays[f"threshold{i}"] = replace(made, element=whole.element, width=whole.width)
            body += f"if (part == {i}) " if i + 1 < len(parts) else ""
            body += f"return {made.name}[i]; "
        part_name = "part" if len(parts) > 1 else ""
        self.accessor(whole.element, f"threshold(int {part_name}, int i)", body.strip())

    def pick(self, name: str, values: Sequence[int]) -> None:
        """An accessor over few values that is a constant expression."""
        text = integer(values[-1])
        for i in reversed(range(len(values) - 1)):
            text = f"i == {i} ? {integer(values[i])} : {text}"
        self.accessor("constexpr int", f"{name}(int {'i' if len(values) > 1 else ''})", f"return {text};")

    def build(self) -> Config:
        """The struct, once everything was added."""
        shape = "x".join(map(str, self.y.shape)) or "1"
        comment = f"{self.step.stem} -> {shape} of {self.y.format}"
        return Config(f"{self.name}_config", comment, tuple(self.types), tuple(self.constants), tuple(self.accessors))

    # -- the parts every operator has --------------------------------------------------------------------------
    def element_types(self, operands: Sequence[NativeTensor]) -> None:
        for i, x in enumerate(operands):
            self.typedef(f"x{i}_t", code_type(x.format))
        self.typedef("y_t", code_type(self.y.format))

    def accumulator(self) -> None:
        """acc_t from the final interval, sum_t from the interval of partial sums where it is a sum of products.

        Where the file states the accumulator's width, acc_t has exactly that, and partial sums are proved to fit it.
        """
        final, partial = self.intervals()
        stated = None if self.step.bounds is None else self.step.bounds.width
        width = signed_width(*final) if stated is None else stated
        if width > 64:
            raise UnsupportedOpError(
                f"node {self.step.node!r}: its exact result needs {width} bits, at most 64 are supported; "
                "narrow its inputs"
            )
        self.typedef("acc_t", f"ap_int<{width}>")
        proven = signed_width(*partial) if self.step.stem in (*DOTS, "matmul", "average_pool") else 64
        self.typedef("sum_t", f"edgemat::sum<acc_t, {min(max(proven, width), 64)}>::type")
        self.acc_width = width

    def intervals(self) -> tuple[tuple[int, int], tuple[int, int]]:
        bounds = self.step.bounds
        if bounds is not None:
            return bounds.final, bounds.partial
        tensors = (*self.step.inputs, *self.step.outputs)
        whole = min(t.lo for t in tensors), max(t.hi for t in tensors)
        return whole, whole

    def epilogue(self) -> None:
        fused = self.step.epilogue
        self.constant("requantized", fused is not None)
        self.constant("channels", self.channels)
        if fused is None:
            return
        shifts = tuple(fused.shift)
        self.constants.append(Member("int", "rounding", f"edgemat::{fused.rounding}"))
        self.constants.append(Member("int", "overflow", f"edgemat::{fused.overflow}"))
        self.constant("shift_min", min(shifts))
        self.constant("shift_max", max(shifts))
        widths = fused.format.widths
        self.constant("narrowed", widths is not None)
        if widths is not None:
            self.look_up("bits", np.asarray(widths, dtype=np.int64))
        if len(shifts) == 1:
            self.accessor("int", "shift(int)", f"return {shifts[0]};")
        else:
            self.look_up("shift", np.asarray(shifts, dtype=np.int64))

    def parameters(self, params: dict[str, Any], skip: Sequence[str] = ()) -> None:
        for key, value in params.items():
            if key in skip:
                continue
            if isinstance(value, tuple):
                self.pick(key, value)
            else:
                self.constant(key, int(value))

    def softmax(self) -> None:
        """Softmax has its own rounding of a quotient instead of an epilogue."""
        p, table = self.step.params, self.step.arrays["exp_table"]
        for key in ("outer", "axis_size", "inner"):
            self.constant(key, int(p[key]))
        self.constant("frac_bits", int(p["shift"]))
        self.constant("exp_width", int(table.max()).bit_length())
        self.constants.append(Member("int", "rounding", f"edgemat::{ROUNDINGS[p['rounding']]}"))
        self.constants.append(Member("int", "overflow", f"edgemat::{OVERFLOWS[p['overflow']]}"))
        self.look_up("exp_table", table)

    def thresholds(self) -> None:
        """Comparators where a channel has few thresholds, else a memory for each level of a binary search."""
        found, top = self.step.arrays["threshold"], self.step.inputs[0].hi + 1
        channels, count = found.shape
        for key in ("start", "step", "count"):
            self.constant(key, int(self.step.params[key]))
        self.constant("row_count", channels)
        levels = count.bit_length()
        self.constant("levels", levels)
        self.named("search", "COMPARE" if count <= COMPARATORS else "SEARCH")
        if count <= COMPARATORS:
            self.threshold_parts(list(found.T))
            return
        padded = np.full((channels, (1 << levels) - 1), top, np.int64)
        padded[:, :count] = found
        spans = [1 << (levels - 1 - level) for level in range(levels)]
        self.threshold_parts([padded[:, span - 1 :: 2 * span].reshape(-1) for span in spans])

    def rows(self) -> None:
        """Parameters of an operator over rows; a norm's gain and bias are looked up, its format is a type."""
        p = self.step.params
        flags = ("has_gain", "has_bias")
        self.parameters(p, flags)
        if "root" in p:
            signed = int(p["norm_min"]) < 0
            self.constant("norm_signed", signed)
            self.constant("norm_width", int(p["norm_max"]).bit_length() + signed)
            for key in flags:
                self.constant(key, bool(p[key]))
            for key, values in self.step.arrays.items():
                self.look_up(key, values)


def average_divisor(builder: ConfigBuilder) -> None:
    """The counts of an average pooling and, for a constant divisor, its proven reciprocal."""
    p, fused = builder.step.params, builder.step.epilogue
    down = _counts(p["out_h"], p["stride_h"], p["kernel_h"], p["pad_top"], p["in_h"], p["pad_bottom"], p)
    right = _counts(p["out_w"], p["stride_w"], p["kernel_w"], p["pad_left"], p["in_w"], p["pad_right"], p)
    counts = {a * b for a in down for b in right}
    builder.constant("uniform_count", len(counts) == 1)
    builder.constant("count", max(counts))
    builder.constant("count_width", max(counts).bit_length())
    multiplier = shift = offset = 0
    product_width = 1
    if len(counts) == 1:
        (lo, hi), _ = builder.intervals()
        largest, smallest = max(fused.shift), min(fused.shift)
        up = largest - smallest + max(-largest, 0)
        divisor = max(counts) << max(largest, 0)
        multiplier, shift, offset = reciprocal(min(lo, 0) << up, max(hi, 0) << up, divisor)
        product_width = signed_width(0, ((max(hi, 0) << up) + offset * divisor) * multiplier)
        # The sum in front of the product must fit as well.
        product_width = max(product_width, signed_width(lo << up, hi << up) + 2)
    builder.constant("multiplier", multiplier)
    builder.constant("multiplier_shift", shift)
    builder.constant("offset", offset)
    builder.constant("product_width", product_width)


def reciprocal(lo: int, hi: int, divisor: int) -> tuple[int, int, int]:
    """Constants with which a product replaces a floor division, proved over lo..hi (lo <= 0 <= hi).

    ``floor(n / d) == ((n + offset * d) * m >> s) - offset``: with ``e = m * d - 2**s >= 0`` the product is
    ``(n' + n' * e / 2**s) / d`` for ``n' = n + offset * d >= 0``, whose floor is right as long as ``n' * e < 2**s``.

    Returns:
        m, s and offset.
    """
    offset = -(lo // divisor)
    largest = hi + offset * divisor
    shift = 0
    while True:
        multiplier = -(-(1 << shift) // divisor)
        if largest * (multiplier * divisor - (1 << shift)) < 1 << shift:
            return multiplier, shift, offset
        shift += 1


def _counts(out: int, stride: int, kernel: int, before: int, size: int, after: int, params: dict[str, Any]) -> set[int]:
    margin = params["count_include_pad"]
    found = set()
    for i in range(out):
        first = i * stride - before
        found.add(min(first + kernel, size + margin * after) - max(first, -margin * before))
    return found


def common_lanes(extents: Sequence[int], width: int, limit_bits: int, wanted: int | None) -> int:
    """Elements per beat: the largest divisor of all extents whose beat is at most `limit_bits` wide.

    A wanted number is taken where it divides; otherwise the largest divisor below it.
    """
    whole = 0
    for extent in extents:
        whole = gcd(whole, extent)
    ceiling = wanted if wanted is not None else max(1, limit_bits // width)
    return max(d for d in range(1, min(whole, ceiling) + 1) if whole % d == 0)


def _initialiser(values: np.ndarray) -> list[str]:
    if values.ndim == 1:
        numbers = [integer(v) for v in values.tolist()]
        rows = [", ".join(numbers[i : i + 20]) for i in range(0, len(numbers), 20)]
        return [row + "," for row in rows[:-1]] + rows[-1:]
    lines: list[str] = []
    for i, row in enumerate(values):
        inner = _initialiser(row)
        inner[0] = "{" + inner[0]
        inner[-1] += "}" + ("," if i + 1 < len(values) else "")
        lines += inner
    return lines
