"""ArgMax: index of the largest code along a sample axis, the first (or last) of equal ones."""

from __future__ import annotations

import math

import numpy as np

from edgemat.body import Body, Coded
from edgemat.formats import accumulator
from edgemat.op import Attr, Call, Native, Op, Result
from edgemat.ops.cases import tensor


class ArgMax(Op):
    """The result's codes are indices: fractional bits 0."""

    name = "ArgMax"
    stem = "arg_max"
    attributes = {"axis": Attr(int), "keepdims": Attr(int, 0), "last": Attr(int, 0)}

    def infer(self, call: Call) -> tuple[Result, ...]:
        x, axis = call.x[0], call.attrs["axis"]
        if call.attrs["keepdims"] not in (0, 1) or call.attrs["last"] not in (0, 1):
            raise call.refuse(f"keepdims {call.attrs['keepdims']}, last {call.attrs['last']}", "expected 0 or 1")
        if not 0 <= axis < len(x.sample_shape) or not x.batched:
            raise call.refuse(f"axis {axis} of {x.shape}", "reduce an axis behind the batch")
        kept = (1,) if call.attrs["keepdims"] else ()
        shape = (None, *x.sample_shape[:axis], *kept, *x.sample_shape[axis + 1 :])
        hi = x.sample_shape[axis] - 1
        return (Result(shape, accumulator(0, hi, (0,)), 0, hi),)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        axis = call.attrs["axis"] + 1
        if call.attrs["last"]:
            index = x[0].shape[axis] - 1 - np.flip(x[0], axis).argmax(axis=axis)
        else:
            index = x[0].argmax(axis=axis)
        return np.expand_dims(index, axis) if call.attrs["keepdims"] else index

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        if call.x[0].magnitude >= 1 << 53:
            raise call.refuse("codes of more than 53 bits", "requantise before the arg max")
        carrier = np.float32 if call.x[0].magnitude < 1 << 24 else np.float64
        out = body.op(
            "ArgMax",
            body.cast(x[0], carrier).value,
            axis=call.attrs["axis"] + 1,
            keepdims=call.attrs["keepdims"],
            select_last_index=call.attrs["last"],
        )
        return Coded(out, np.dtype(np.int64))

    def native(self, call: Call) -> Native:
        shape, position = call.x[0].sample_shape, call.attrs["axis"]
        return Native(
            {
                "outer": math.prod(shape[:position]),
                "axis_size": shape[position],
                "inner": math.prod(shape[position + 1 :]),
                "last": call.attrs["last"],
            }
        )

    def row_major(self, call: Call) -> bool:
        # Dropping an axis changes which axis is the channel: the order of what remains is kept only in ONNX order.
        return len(call.x[0].sample_shape) > 1

    def cases(self) -> list[Call]:
        made = []
        for shape, axis in (((10,), 0), ((1,), 0), ((5, 4), 0), ((3, 4, 5), 2)):
            for last in (0, 1):
                for fmt in ("fixed<4,3>", "fixed<20,3>", "fixed<40,3>"):
                    attrs = {"axis": axis, "last": last, "keepdims": last}
                    made.append(Call(self, f"{shape}_{axis}_{last}_{fmt}", [tensor(fmt, (None, *shape))], attrs))
        return made
