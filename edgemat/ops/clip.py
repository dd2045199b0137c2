"""Clip (ReLU6, hardtanh): exact clamping; where a limit lies between codes, the grid is refined until it does not."""

from __future__ import annotations

import numpy as np

from edgemat.body import Body, Coded
from edgemat.formats import accumulator
from edgemat.op import Attr, Bounds, Call, Native, Op, Result, carrier_for
from edgemat.ops.cases import tensor


class Clip(Op):
    """``min(max(x << align, low), high)`` on codes; the grid gets `align` more fractional bits."""

    name = "Clip"
    stem = "clip"
    attributes = {"low": Attr(int), "high": Attr(int), "align": Attr(int, 0)}
    has_epilogue = True

    def infer(self, call: Call) -> tuple[Result, ...]:
        x, low, high, align = call.x[0], call.attrs["low"], call.attrs["high"], call.attrs["align"]
        if low > high or not 0 <= align <= 32:
            raise call.refuse(f"limits {low} to {high} with align {align}", "expected low <= high, 0 <= align <= 32")
        lo = min(max(x.lo << align, low), high)
        hi = max(min(x.hi << align, high), low)
        return (Result(x.shape, accumulator(lo, hi, (x.format.fracs[0] + align,)), lo, hi),)

    def bounds(self, call: Call) -> Bounds:
        x, align, result = call.x[0], call.attrs["align"], call.exact[0]
        limits = [x.lo << align, x.hi << align, call.attrs["low"], call.attrs["high"], 0]
        return Bounds((result.lo, result.hi), (min(limits), max(limits)))

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        return np.clip(x[0] << call.attrs["align"], call.attrs["low"], call.attrs["high"])

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        value = body.cast(x[0], carrier_for(call.bounds.magnitude))
        value = body.scale(value, 1 << call.attrs["align"])
        return body.clip(value, call.attrs["low"], call.attrs["high"])

    def native(self, call: Call) -> Native:
        return Native({"size": call.x[0].size, **{k: int(call.attrs[k]) for k in ("low", "high", "align")}})

    def cases(self) -> list[Call]:
        made = []
        for low, high, align in ((0, 96, 0), (-16, 16, 0), (0, 0, 0), (0, 3, 2), (-500, 500, 0)):
            for requantize in ("", "ufixed<6,3>"):
                attrs = {"low": low, "high": high, "align": align, "requantize": requantize}
                made.append(Call(self, f"{low}_{high}_{align}_{requantize}", [tensor("fixed<8,4>", (None, 9))], attrs))
        return made
