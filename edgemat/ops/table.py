"""Table: any function of one code of at most 12 bits, looked up.

The table is computed once in float64 (`make_table`), stored in the file and read by every backend, so a backend's own
exp or tanh never matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from edgemat import formats
from edgemat.body import Body, Coded
from edgemat.errors import FormatError
from edgemat.formats import Fixed, holds_codes
from edgemat.op import Attr, Call, Native, Op, Result
from edgemat.ops.cases import constant, tensor

MAX_INPUT_BITS = 12


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def _safe_exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


FUNCTIONS: dict[str, Callable[[float], float]] = {
    "sigmoid": _sigmoid,
    "tanh": math.tanh,
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0))),
    "hardsigmoid": lambda x: min(max(x / 6.0 + 0.5, 0.0), 1.0),
    "hardswish": lambda x: x * min(max(x / 6.0 + 0.5, 0.0), 1.0),
    "exp": _safe_exp,
    "reciprocal": lambda x: 1.0 / x if x != 0 else math.inf,
    "rsqrt": lambda x: 1.0 / math.sqrt(x) if x > 0 else math.inf,
    "softplus": lambda x: max(x, 0.0) + math.log1p(math.exp(-abs(x))),
    "elu": lambda x: x if x > 0 else math.expm1(x),
}


def make_table(function: str, x_format: Fixed, y_format: Fixed) -> np.ndarray:
    """Codes of ``function`` for every code of `x_format`, from `x_format.min_code` up.

    Args:
        function: A key of `FUNCTIONS`.
        x_format: Input format of at most 12 bits.
        y_format: Output format; its rounding and overflow modes apply to the float64 result.

    Returns:
        int64 array of ``2**x_format.width`` codes.

    Raises:
        FormatError: for an unknown function or a wider input.
    """
    if function not in FUNCTIONS:
        raise FormatError(f"table function is {function!r}, expected one of {', '.join(FUNCTIONS)}")
    if x_format.width > MAX_INPUT_BITS or x_format.per_channel or x_format.bipolar:
        raise FormatError(
            f"a table of {function} is indexed by {x_format}, expected one binary point and at most {MAX_INPUT_BITS} "
            "bits; requantise the input first"
        )
    evaluate = FUNCTIONS[function]
    scale = 2.0 ** -x_format.fracs[0]
    codes = range(x_format.min_code, x_format.max_code + 1)
    values = np.array([evaluate(code * scale) for code in codes], dtype=np.float64)
    return formats.quantize(values, y_format)


class Table(Op):
    """``y = table[x - min_code]``; inputs x and the table's codes."""

    name = "Table"
    stem = "table"
    arity = (2, 2)
    attributes = {"function": Attr(str), "y_format": Attr(str)}

    def _table(self, call: Call) -> np.ndarray:
        table, fmt = call.constant(1), call.x[0].format
        fits = fmt.width <= MAX_INPUT_BITS and not fmt.bipolar
        if not fits or table is None or table.ndim != 1 or table.size != 1 << fmt.width:
            size = "none" if table is None else table.shape
            raise call.refuse(
                f"a table of size {size} for {fmt}",
                f"expected 2**width entries for at most {MAX_INPUT_BITS} bits",
            )
        return table

    def _reached(self, call: Call) -> np.ndarray:
        low = call.x[0].format.min_code
        return self._table(call)[call.x[0].lo - low : call.x[0].hi - low + 1]

    def infer(self, call: Call) -> tuple[Result, ...]:
        fmt, reached = call.format_attr("y_format"), self._reached(call)
        lo, hi = int(reached.min()), int(reached.max())
        if fmt.per_channel or not holds_codes(self._table(call), fmt):
            raise call.refuse(f"table codes {lo} to {hi} do not fit {fmt}", "rebuild the table")
        return (Result(call.x[0].shape, fmt, lo, hi),)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        return self._table(call)[x[0] - call.x[0].format.min_code]

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        index = body.cast(x[0], np.int32)
        index = body.binary("Sub", index, body.number(call.x[0].format.min_code, index))
        dtype = call.y[0].dtype
        return Coded(body.op("Gather", body.cast(x[1], dtype).value, index.value, axis=0), dtype)

    def native(self, call: Call) -> Native:
        params: dict[str, int | tuple[int, ...]] = {
            "size": call.x[0].size,
            "x_min": call.x[0].format.min_code,
        }
        return Native(params, {"table": self._table(call)})

    def cases(self) -> list[Call]:
        made = []
        for function in ("sigmoid", "tanh", "silu", "gelu", "hardswish"):
            for x_fmt, y_fmt in (
                ("fixed<8,4>", "fixed<8,3>"),
                ("ufixed<6,3>", "ufixed<8,2>"),
                ("fixed<12,4>", "fixed<16,4>"),
            ):
                codes = make_table(function, Fixed.parse(x_fmt), Fixed.parse(y_fmt))
                t = constant(y_fmt, codes, "table")
                attrs = {"function": function, "y_format": y_fmt}
                x = tensor(x_fmt, (None, 3, 5))
                made.append(Call(self, f"{function}_{x_fmt}", [x, t[0]], attrs, {1: t[1]}))
        return made
