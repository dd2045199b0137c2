"""Softmax along one axis, every intermediate stated.

With codes x of at most 12 bits on the grid f, and along the axis::

    d_i = max(x) - x_i                       exact, 0 .. 2**width - 1
    e_i = exp_table[d_i]                     exp(-d_i * 2**-f), computed in float64, stored in `table_format`
    S   = sum(e)                             exact
    y_i = Requantize(e_i / S)                the exact rational, rounded once into `y_format`

The largest input always has e = 1, so S is never 0 and the arg max of y never lies elsewhere than that of x.
"""

from __future__ import annotations

import math

import numpy as np

from edgemat import formats
from edgemat.body import Body, Coded
from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.op import Attr, Bounds, Call, Cost, Native, Op, Result, overflow_interval
from edgemat.ops.cases import constant, tensor
from edgemat.ops.table import MAX_INPUT_BITS

DEFAULT_TABLE = "ufixed<16,1,RND,SAT>"


def make_softmax_table(x_format: Fixed, table_format: Fixed) -> np.ndarray:
    """Codes of ``exp(-d * 2**-frac_x)`` for d = 0 .. 2**width - 1.

    Args:
        x_format: Format of the softmax's input, at most 12 bits.
        table_format: Format of the exponentials; must hold 1.0.

    Returns:
        int64 array of ``2**x_format.width`` codes.

    Raises:
        FormatError: for a wider input, or a table format that cannot hold 1.0.
    """
    if x_format.width > MAX_INPUT_BITS or x_format.per_channel or x_format.bipolar:
        raise FormatError(
            f"softmax is given {x_format}, expected one binary point and at most {MAX_INPUT_BITS} bits; "
            "requantise the input first"
        )
    scale = 2.0 ** -x_format.fracs[0]
    values = np.array([math.exp(-d * scale) for d in range(1 << x_format.width)], dtype=np.float64)
    table = formats.quantize(values, table_format)
    if int(table[0]) != 1 << max(table_format.fracs[0], 0) or table_format.fracs[0] < 0:
        raise FormatError(f"the exponentials' format {table_format} cannot hold 1.0; use {DEFAULT_TABLE}")
    return table


class Softmax(Op):
    """Inputs x and the exponentials' table; `axis` counts behind the batch."""

    name = "Softmax"
    stem = "softmax"
    arity = (2, 2)
    attributes = {"axis": Attr(int), "table_format": Attr(str, DEFAULT_TABLE), "y_format": Attr(str)}

    def _table(self, call: Call) -> np.ndarray:
        table, fmt = call.constant(1), call.x[0].format
        fits = fmt.width <= MAX_INPUT_BITS and not fmt.bipolar
        if not fits or table is None or table.shape != (1 << fmt.width,):
            raise call.refuse(f"its table for {fmt}", f"expected 2**width entries for at most {MAX_INPUT_BITS} bits")
        target = call.format_attr("table_format")
        if int(table.min()) < 0 or int(table.max()) > target.max_code or int(table[0]) < 1 or target.width > 24:
            raise call.refuse("table entries out of range", "expected codes of at most 24 bits, the first positive")
        return table

    def infer(self, call: Call) -> tuple[Result, ...]:
        x, axis, fmt = call.x[0], call.attrs["axis"], call.format_attr("y_format")
        self._table(call)
        if not 0 <= axis < len(x.sample_shape) or not x.batched:
            raise call.refuse(f"axis {axis} of {x.shape}", "normalise an axis behind the batch")
        if fmt.per_channel or fmt.bipolar or not 0 <= fmt.fracs[0] <= 30 or x.sample_shape[axis] >= 1 << 30:
            raise call.refuse(f"the output format {fmt}", "expected one binary point with 0 to 30 fractional bits")
        lo, hi = overflow_interval(0, 1 << fmt.fracs[0], fmt)
        return (Result(x.shape, fmt, lo, hi),)

    def bounds(self, call: Call) -> Bounds:
        """The sum of exponentials, and a numerator shifted to the output's grid."""
        table = self._table(call)
        top = int(table.max())
        reach = max(top * call.x[0].sample_shape[call.attrs["axis"]], top << call.format_attr("y_format").fracs[0])
        return Bounds((0, reach), (0, reach))

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        axis, fmt = call.attrs["axis"] + 1, call.format_attr("y_format")
        e = self._table(call)[x[0].max(axis=axis, keepdims=True) - x[0]]
        rounded = formats.round_div(e << fmt.fracs[0], e.sum(axis=axis, keepdims=True), fmt.rounding)
        return formats.wrap(rounded, fmt)

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        fmt, axes = call.format_attr("y_format"), body.const([call.attrs["axis"] + 1], np.int64)
        value = body.cast(x[0], np.float32)
        largest = Coded(body.op("ReduceMax", value.value, axes, keepdims=1), value.dtype)
        distance = body.cast(body.binary("Sub", largest, value), np.int32)
        table = body.cast(x[1], np.int64)
        e = Coded(body.op("Gather", table.value, distance.value, axis=0), table.dtype)
        total = Coded(body.op("ReduceSum", e.value, axes, keepdims=1), e.dtype)
        rounded = body.round_div_int64(body.scale(e, 1 << fmt.fracs[0]), total, fmt.rounding)
        return body.overflow(rounded, fmt, 0, 1 << fmt.fracs[0])

    def row_major(self, call: Call) -> bool:
        return len(call.x[0].sample_shape) > 1

    def native(self, call: Call) -> Native:
        shape, axis = call.x[0].sample_shape, call.attrs["axis"]
        fmt = call.format_attr("y_format")
        params: dict[str, int | tuple[int, ...]] = {
            "outer": math.prod(shape[:axis]),
            "axis_size": shape[axis],
            "inner": math.prod(shape[axis + 1 :]),
            "shift": fmt.fracs[0],
            "rounding": formats.ROUNDINGS.index(fmt.rounding),
            "overflow": formats.OVERFLOWS.index(fmt.overflow),
            "y_min": fmt.min_code,
            "y_max": fmt.max_code,
        }
        return Native(params, {"exp_table": self._table(call)})

    def cost(self, call: Call) -> Cost:
        return Cost(0, 2 * call.x[0].size, 0)

    def cases(self) -> list[Call]:
        made = []
        for shape, axis in (((10,), 0), ((1,), 0), ((3, 5), 1), ((4, 3, 2), 0)):
            for x_fmt, y_fmt in (
                ("fixed<8,4>", "ufixed<8,0>"),
                ("ufixed<6,3>", "ufixed<16,1,RND_CONV,SAT>"),
                ("fixed<12,5>", "fixed<8,1,TRN,SAT>"),
                ("fixed<4,4>", "ufixed<4,0,RND,WRAP>"),
            ):
                t = constant(DEFAULT_TABLE, make_softmax_table(Fixed.parse(x_fmt), Fixed.parse(DEFAULT_TABLE)), "table")
                x = tensor(x_fmt, (None, *shape))
                attrs = {"axis": axis, "y_format": y_fmt}
                made.append(Call(self, f"{shape}_{axis}_{x_fmt}_{y_fmt}", [x, t[0]], attrs, {1: t[1]}))
        return made
