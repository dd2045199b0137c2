"""Relu: ``max(x, 0)``; the grid stays, the result is unsigned and as wide as the proved interval needs."""

from __future__ import annotations

import numpy as np

from edgemat.body import Body, Coded
from edgemat.formats import channel_accumulator
from edgemat.op import Call, Native, Op, Result
from edgemat.ops.cases import tensor


class Relu(Op):
    """Rectifier."""

    name = "Relu"
    stem = "relu"
    has_epilogue = True
    keeps_channels = True

    def infer(self, call: Call) -> tuple[Result, ...]:
        x = call.x[0]
        lo, hi = max(x.lo, 0), max(x.hi, 0)
        lows, highs = (np.maximum(end, 0) for end in x.channel_intervals())
        return (Result(x.shape, channel_accumulator(lows, highs, x.format.fracs), lo, hi),)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        return np.maximum(x[0], 0)

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        return body.maximum(x[0], body.number(0, x[0]))

    def native(self, call: Call) -> Native:
        return Native({"size": call.x[0].size})

    def cases(self) -> list[Call]:
        made = []
        for fmt in ("fixed<8,3>", "ufixed<8,3>", "fixed<1,1>", "fixed<20,9>", "fixed<40,9>"):
            for requantize in ("", "fixed<6,3>", "ufixed<4,3,RND_INF,WRAP>"):
                call = Call(self, f"{fmt}_{requantize}", [tensor(fmt, (None, 5, 3))], {"requantize": requantize})
                made.append(call)
        for fmt in ("fixed<10,[4,5,6]>", "fixed<[10,0,3],[4,5,-6]>", "bipolar"):
            made.append(Call(self, f"channels_{fmt}", [tensor(fmt, (None, 3, 2, 2))], {}))
        return made
