"""Conv and its epilogue as Conv, Floor and Clip in float32.

Exact by the proof in `epilogue`: padding adds the code 0, which the partial bound contains.
"""

from __future__ import annotations

import numpy as np

from edgemat.body import Coded
from edgemat.op import Call
from edgemat.ops.conv import Conv
from edgemat.sim.carriers import SINGLE, SINGLE_LIMIT, Carried, FusedBody
from edgemat.sim.rewrites.epilogue import fold


def fold_conv(body: FusedBody, call: Call, x: list[Carried]) -> Carried | None:
    """Rewrites a Conv whose every partial sum fits float32."""
    folded = fold(call, call.bounds.magnitude)
    if folded is None or x[0].tensor.magnitude >= SINGLE_LIMIT:
        return None
    assert isinstance(call.op, Conv)
    w, b = call.op.aligned(call)
    weight = w * folded.scale.reshape((-1,) + (1,) * (w.ndim - 1))
    bias = (np.zeros(w.shape[0]) if b is None else b.astype(np.float64)) * folded.scale + folded.constant
    value = body.op(
        "Conv",
        body.cast(x[0].coded(), SINGLE).value,
        body.const(weight, np.float32),
        body.const(bias, np.float32),
        strides=list(call.attrs["strides"]),
        pads=list(call.attrs["pads"]),
        dilations=list(call.attrs["dilations"]),
        group=call.attrs["groups"],
    )
    return folded.carried(body, call, Coded(value, SINGLE))
