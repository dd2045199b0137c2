"""TokenExponent: the power of two by which a row of codes is divided so that it fits a stated width.

Along the last axis, with A the largest absolute code and L its bit length (the position of its leading one; 0 for 0)::

    e = max(0, L - (width - 1))

so that ``A < 2**(e + width - 1)``: one leading-zero count a row, no division. A row of zeros, and any row that fits as
it is, has e = 0. Used with `TokenQuantize` and `TokenRescale` (docs/normalization.md).
"""

from __future__ import annotations

import numpy as np

from edgemat.body import Body, Coded
from edgemat.formats import accumulator
from edgemat.op import Attr, Call, Cost, Native, Op, Result
from edgemat.ops.cases import tensor

MAX_WIDTH = 32


class TokenExponent(Op):
    """Input x [N, ..., n]; the result [N, ..., 1] holds one exponent for each row, fractional bits 0."""

    name = "TokenExponent"
    stem = "token_exponent"
    attributes = {"width": Attr(int)}

    def infer(self, call: Call) -> tuple[Result, ...]:
        x, width = call.x[0], call.attrs["width"]
        if not 2 <= width <= MAX_WIDTH:
            raise call.refuse(f"width {width}", f"expected 2 to {MAX_WIDTH} bits, sign included")
        if not x.batched or not x.sample_shape:
            raise call.refuse(f"an input of shape {x.shape}", "expected a batch and at least one axis of codes")
        if x.magnitude >= 1 << 53:
            raise call.refuse(f"codes of {x.format}", "expected less than 54 bits; requantise the input")
        top = self.largest(call)
        return (Result((*x.shape[:-1], 1), accumulator(0, top, (0,)), 0, top),)

    def largest(self, call: Call) -> int:
        """The largest exponent a row can have."""
        return max(0, call.x[0].magnitude.bit_length() - call.attrs["width"] + 1)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        reach = np.abs(x[0]).max(axis=-1, keepdims=True)
        steps = np.int64(1) << (np.arange(self.largest(call)) + call.attrs["width"] - 1)
        return (reach[..., None] >= steps).sum(axis=-1, dtype=np.int64)

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        carrier = np.float32 if call.x[0].magnitude < 1 << 24 else np.float64
        axes = body.const([len(call.x[0].shape) - 1], np.int64)
        size = body.unary("Abs", body.cast(x[0], carrier))
        reach = Coded(body.op("ReduceMax", size.value, axes, keepdims=1), size.dtype)
        if not self.largest(call):
            return body.scale(reach, 0)
        steps = np.ldexp(1.0, np.arange(self.largest(call)) + call.attrs["width"] - 1)
        flags = body.cast(
            Coded(body.op("GreaterOrEqual", reach.value, body.number(steps, reach).value), np.dtype(bool)), np.float32
        )
        return Coded(body.op("ReduceSum", flags.value, axes, keepdims=1), flags.dtype)

    def row_major(self, call: Call) -> bool:
        return len(call.x[0].sample_shape) > 1

    def native(self, call: Call) -> Native:
        n = call.x[0].sample_shape[-1]
        return Native({"rows": call.x[0].size // n, "features": n, "width": call.attrs["width"]})

    def cost(self, call: Call) -> Cost:
        return Cost(0, call.x[0].size)

    def cases(self) -> list[Call]:
        made = []
        for shape in ((None, 1), (None, 7), (None, 3, 5), (None, 2, 3, 4)):
            for x_fmt in ("fixed<8,4>", "fixed<16,4>", "ufixed<12,2>", "fixed<33,9>", "fixed<2,1>", "bipolar"):
                for width in (2, 4, 8):
                    made.append(Call(self, f"{shape}_{x_fmt}_{width}", [tensor(x_fmt, shape)], {"width": width}))
        return made
