"""TokenRescale: integers that were computed from a row of `TokenQuantize` brought back to the row's own scale.

``y = x * 2**e`` with the row's exponent e: exact, on the grid of x. Narrowing is the fused Requantize.
"""

from __future__ import annotations

import numpy as np

from edgemat.body import Body, Coded
from edgemat.formats import accumulator
from edgemat.op import Call, Cost, Native, Op, Result, carrier_for
from edgemat.ops.cases import tensor
from edgemat.ops.reciprocal_root import look_up
from edgemat.ops.token_quantize import check_exponents


class TokenRescale(Op):
    """Inputs x [N, ..., n] and exponents [N, ..., 1]; the result has the shape of x."""

    name = "TokenRescale"
    stem = "token_rescale"
    arity = (2, 2)
    has_epilogue = True
    keeps_channels = True

    def infer(self, call: Call) -> tuple[Result, ...]:
        x, exponents = call.x
        check_exponents(call, x, exponents)
        if (x.magnitude << exponents.hi) >= 1 << 62:
            raise call.refuse(
                f"codes of {x.format} shifted left by up to {exponents.hi}",
                "expected less than 63 bits; narrow the input",
            )
        low, high = min(x.lo, x.lo << exponents.hi), max(x.hi, x.hi << exponents.hi)
        return (Result(x.shape, accumulator(low, high, x.format.fracs), low, high),)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        return x[0] << x[1]

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        result, top = call.exact[0], call.x[1].hi
        carrier = carrier_for(max(-result.lo, result.hi))
        index = body.cast(x[1], np.int64)
        if carrier.kind == "f":
            factors = body.op("Gather", body.const(np.ldexp(1.0, np.arange(top + 1)), carrier), index.value, axis=0)
            return body.binary("Mul", body.cast(x[0], carrier), Coded(factors, carrier))
        return body.binary("Mul", body.cast(x[0], carrier), look_up(body, np.int64(1) << np.arange(top + 1), index))

    def row_major(self, call: Call) -> bool:
        return len(call.x[0].sample_shape) > 1

    def native(self, call: Call) -> Native:
        n = call.x[0].sample_shape[-1]
        return Native({"rows": call.x[0].size // n, "features": n})

    def cost(self, call: Call) -> Cost:
        return Cost(0, call.x[0].size)

    def cases(self) -> list[Call]:
        made = []
        settings = [("fixed<8,4>", 4, ""), ("fixed<20,4>", 9, "fixed<8,4,RND,SAT>"), ("ufixed<6,2>", 3, "fixed<8,6>")]
        settings += [("fixed<40,9>", 20, "fixed<16,9,RND_CONV,WRAP>"), ("fixed<12,-3>", 0, "fixed<4,-3,TRN,SAT_ZERO>")]
        settings += [("fixed<30,9>", 31, ""), ("bipolar", 6, "fixed<6,6,RND_INF,SAT_SYM>")]
        for shape in ((None, 1), (None, 7), (None, 3, 5), (None, 2, 3, 4)):
            for x_fmt, top, requantize in settings:
                exponents = tensor("ufixed<5,5>", (*shape[:-1], 1), "e", 0, top)
                attrs = {"requantize": requantize}
                made.append(Call(self, f"{shape}_{x_fmt}", [tensor(x_fmt, shape), exponents], attrs))
        for requantize in ("", "fixed<8,[3,4,5],RND,SAT>"):
            exponents = tensor("ufixed<5,5>", (None, 1), "e", 0, 7)
            x = tensor("fixed<12,[4,6,5]>", (None, 3))
            made.append(Call(self, f"channels_{requantize}", [x, exponents], {"requantize": requantize}))
        return made
