"""State and NextState: a tensor that one step of a recurrent network hands to the next.

A step reads what the step before it wrote, in a declared format; the first step reads code 0 everywhere. The two nodes
hold no arithmetic. In the file a state is a graph input and a graph output, so a caller keeps it: it feeds zeros, then
what came out. What comes from outside may be any integer of the code type, while every proof behind the state counts on
the declared format: codes outside of it saturate at its rails (of their channel, where channels have widths of their
own), whatever the format's overflow mode.

`lower/states.py` pairs the two: one State and one NextState of the same name, format and shape.
"""

from __future__ import annotations

import numpy as np

from edgemat.body import Body, Coded
from edgemat.formats import channel_array
from edgemat.op import REAL, Attr, Call, Op, Result, code_dtype


class State(Op):
    """The codes that `NextState` took in the step before, 0 in the first step; from outside they saturate."""

    name = "State"
    stem = "state"
    attributes = {"y_format": Attr(str)}
    keeps_channels = True

    def infer(self, call: Call) -> tuple[Result, ...]:
        fmt, x = call.format_attr("y_format"), call.x[0]
        if fmt.bipolar:
            raise call.refuse(
                "a state of the format bipolar", "expected one with the code 0, which a state begins with"
            )
        if x.dtype != code_dtype(fmt) or not x.batched:
            raise call.refuse(
                f"a state of {fmt} in a graph input of {x.dtype} and shape {x.shape}",
                f"expected {code_dtype(fmt)} with the batch on axis 0",
            )
        return (Result(x.shape, fmt, *fmt.rails),)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        low, high = (channel_array(rail, x[0].ndim) for rail in call.format_attr("y_format").channel_rails())
        return np.clip(np.asarray(x[0], dtype=np.int64), low, high)

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        fmt = call.format_attr("y_format")
        limits = np.iinfo(x[0].dtype)
        if fmt.widths is not None:
            lows, highs = (channel_array(rail, len(call.x[0].shape)) for rail in fmt.channel_rails())
            wide = body.cast(x[0], np.int32) if x[0].dtype.itemsize == 1 else x[0]
            return body.minimum(body.maximum(wide, body.number(lows, wide)), body.number(highs, wide))
        if fmt.rails == (limits.min, limits.max):
            return x[0]
        return body.clip(x[0], *fmt.rails)


class NextState(Op):
    """The codes that the state named `state` will hold in the next step: a graph output."""

    name = "NextState"
    stem = "next_state"
    attributes = {"state": Attr(str)}
    keeps_channels = True

    def infer(self, call: Call) -> tuple[Result, ...]:
        x = call.x[0]
        if x.format is REAL or not x.batched:
            raise call.refuse(f"an operand of shape {x.shape}", "expected codes with the batch on axis 0")
        return (Result(x.shape, x.format, x.lo, x.hi),)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        return np.asarray(x[0], dtype=np.int64)

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        return x[0]
