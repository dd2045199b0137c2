"""Upsample: nearest-neighbour repetition by whole factors."""

from __future__ import annotations

import numpy as np

from edgemat.body import Body, Coded
from edgemat.op import Attr, Call, Native, Op, Result
from edgemat.ops.cases import tensor
from edgemat.ops.conv import plane


class Upsample(Op):
    """``y[..., i] = x[..., i // scale]`` on the spatial axes."""

    name = "Upsample"
    stem = "upsample"
    attributes = {"scales": Attr(tuple)}
    keeps_channels = True

    def infer(self, call: Call) -> tuple[Result, ...]:
        x, scales = call.x[0], call.attrs["scales"]
        if len(x.shape) != len(scales) + 2 or len(scales) not in (1, 2) or min(scales) < 1:
            raise call.refuse(f"scales {scales} for input {x.shape}", "expected one positive factor per spatial axis")
        spatial = (n * s for n, s in zip(x.sample_shape[1:], scales, strict=True))
        return (Result((*x.shape[:2], *spatial), x.format, x.lo, x.hi),)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        out = x[0]
        for axis, scale in enumerate(call.attrs["scales"]):
            out = out.repeat(scale, axis=axis + 2)
        return out

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        value, (channels, *spatial) = x[0].value, call.x[0].sample_shape
        scales = call.attrs["scales"]
        inner: list[int] = []
        tile: list[int] = []
        for extent, scale in zip(spatial, scales, strict=True):
            inner += [extent, 1]
            tile += [1, scale]
        value = body.op("Reshape", value, body.const([-1, channels, *inner], np.int64))
        value = body.op("Tile", value, body.const([1, 1, *tile], np.int64))
        final = [-1, channels, *(n * s for n, s in zip(spatial, scales, strict=True))]
        return Coded(body.op("Reshape", value, body.const(final, np.int64)), x[0].dtype)

    def native(self, call: Call) -> Native:
        shape = call.x[0].sample_shape
        in_h, in_w = plane(shape[1:], 1)
        scale_h, scale_w = plane(call.attrs["scales"], 1)
        return Native({"in_h": in_h, "in_w": in_w, "in_c": shape[0], "scale_h": scale_h, "scale_w": scale_w})

    def cases(self) -> list[Call]:
        made = [
            Call(self, f"{shape}_{scales}", [tensor("fixed<8,3>", (None, *shape))], {"scales": scales})
            for shape, scales in (((3, 2, 4), (2, 2)), ((1, 3, 3), (3, 1)), ((2, 5), (4,)))
        ]
        for fmt in ("fixed<[8,0,3],[3,1,4]>", "bipolar"):
            made.append(Call(self, f"channels_{fmt}", [tensor(fmt, (None, 3, 2, 4))], {"scales": (2, 1)}))
        return made
