"""TokenQuantize: codes of a row divided by the row's power of two, rounded into a narrower format.

With one exponent e for each row (`TokenExponent`), of any value its interval allows::

    q = overflow(round(x * 2**-e))          RND and SAT unless the format says otherwise

`y_format` has the fractional bits of x: a code q stands for the value ``q * 2**(e - frac)``. What comes of q by exact
linear arithmetic is brought back by `TokenRescale` with the same exponents. Under RND a row's largest code may round up
to ``2**(width - 1)``, which SAT holds one below.
"""

from __future__ import annotations

import numpy as np

from edgemat import formats
from edgemat.body import Body, Coded
from edgemat.op import Attr, Call, Cost, Native, Op, Result, Tensor, overflow_interval
from edgemat.ops.cases import tensor
from edgemat.ops.reciprocal_root import look_up

MAX_EXPONENT = 53


def check_exponents(call: Call, x: Tensor, exponents: Tensor) -> None:
    """Refuses exponents that are not one non-negative integer for each row of x."""
    if not x.batched or exponents.shape != (*x.shape[:-1], 1) or not x.sample_shape:
        raise call.refuse(f"exponents of shape {exponents.shape} for {x.shape}", "expected one for each row: [..., 1]")
    if exponents.format.fracs != (0,) or not 0 <= exponents.lo <= exponents.hi <= MAX_EXPONENT:
        raise call.refuse(
            f"exponents {exponents.lo} to {exponents.hi} of {exponents.format}",
            f"expected integers from 0 to {MAX_EXPONENT} without fractional bits",
        )


class TokenQuantize(Op):
    """Inputs x [N, ..., n] and exponents [N, ..., 1]; the result has the shape of x."""

    name = "TokenQuantize"
    stem = "token_quantize"
    arity = (2, 2)
    attributes = {"y_format": Attr(str)}

    def infer(self, call: Call) -> tuple[Result, ...]:
        x, exponents, fmt = *call.x, call.format_attr("y_format")
        check_exponents(call, x, exponents)
        if fmt.per_channel or fmt.bipolar or fmt.fracs != x.format.fracs or fmt.width > 32:
            raise call.refuse(
                f"y_format {fmt} for an input of {x.format}",
                f"expected at most 32 bits with {x.format.fracs[0]} fractional bits, as the input has",
            )
        if x.magnitude >= 1 << 53:
            raise call.refuse(f"codes of {x.format}", "expected less than 54 bits; requantise the input")
        low, high = self._rounded(call)
        return (Result(x.shape, fmt, *overflow_interval(low, high, fmt)),)

    def _rounded(self, call: Call) -> tuple[int, int]:
        """Interval of the rounded quotients: rounding is monotone in x, and the ends lie at the extreme exponents."""
        x, exponents, fmt = *call.x, call.format_attr("y_format")
        ends = [
            int(formats.round_shift(np.array(code), shift, fmt.rounding))
            for code in (x.lo, x.hi)
            for shift in (exponents.lo, exponents.hi)
        ]
        return min(ends), max(ends)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        fmt = call.format_attr("y_format")
        return formats.wrap(formats.round_shift(x[0], x[1], fmt.rounding), fmt)

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        fmt, top = call.format_attr("y_format"), call.x[1].hi
        index = body.cast(x[1], np.int64)
        reach = call.x[0].magnitude + (1 << top)
        if reach < 1 << 53:
            carrier = np.dtype(np.float32 if reach < 1 << 24 else np.float64)
            factors = body.op("Gather", body.const(np.ldexp(1.0, -np.arange(top + 1)), carrier), index.value, axis=0)
            value = body.round(body.binary("Mul", body.cast(x[0], carrier), Coded(factors, carrier)), fmt.rounding)
        else:
            whole = look_up(body, np.int64(1) << np.arange(top + 1), index)
            value = body.round_div_int64(body.cast(x[0], np.int64), whole, fmt.rounding)
        return body.overflow(value, fmt, *self._rounded(call))

    def row_major(self, call: Call) -> bool:
        return len(call.x[0].sample_shape) > 1

    def native(self, call: Call) -> Native:
        fmt, n = call.format_attr("y_format"), call.x[0].sample_shape[-1]
        return Native(
            {
                "rows": call.x[0].size // n,
                "features": n,
                "exponent_max": call.x[1].hi,
                "rounding": formats.ROUNDINGS.index(fmt.rounding),
                "overflow": formats.OVERFLOWS.index(fmt.overflow),
                "y_min": fmt.rails[0],
                "y_max": fmt.rails[1],
            }
        )

    def cost(self, call: Call) -> Cost:
        return Cost(0, call.x[0].size)

    def cases(self) -> list[Call]:
        made = []
        rounded = zip(formats.ROUNDINGS, ("SAT", "SAT_SYM", "WRAP", "SAT_ZERO", "SAT", "SAT", "SAT"), strict=True)
        settings = [("fixed<12,4>", f"fixed<8,0,{rounding},{overflow}>", 4) for rounding, overflow in rounded]
        settings += [
            ("fixed<16,9>", "fixed<8,1,RND,SAT>", 9),
            ("fixed<33,9>", "fixed<8,-16,RND,SAT>", 26),
            ("ufixed<8,3>", "fixed<4,-1,RND,SAT>", 5),
            ("fixed<50,9>", "fixed<9,-32,RND_CONV,SAT>", 50),
            ("fixed<50,9>", "fixed<8,-33,RND_ZERO,SAT>", 53),
            ("fixed<4,2>", "fixed<8,6,RND,SAT>", 0),
        ]
        for shape in ((None, 1), (None, 7), (None, 3, 5), (None, 2, 3, 4)):
            for x_fmt, y_fmt, top in settings:
                exponents = tensor("ufixed<6,6>", (*shape[:-1], 1), "e", 0, top)
                attrs = {"y_format": y_fmt}
                made.append(Call(self, f"{shape}_{x_fmt}_{y_fmt}", [tensor(x_fmt, shape), exponents], attrs))
        return made
