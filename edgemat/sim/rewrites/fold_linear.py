"""Linear and its epilogue as Gemm (MatMul and Add beyond rank 2), Floor and Clip in float32.

Exact by the proof in `epilogue`: codes and weights are integers, the sum's partial bound holds in any order.
"""

from __future__ import annotations

import numpy as np

from edgemat.body import Coded
from edgemat.op import Call
from edgemat.ops.linear import Linear
from edgemat.sim.carriers import SINGLE, SINGLE_LIMIT, Carried, FusedBody
from edgemat.sim.rewrites.epilogue import fold


def fold_linear(body: FusedBody, call: Call, x: list[Carried]) -> Carried | None:
    """Rewrites a Linear whose every partial sum fits float32."""
    folded = fold(call, call.bounds.magnitude)
    if folded is None or x[0].tensor.magnitude >= SINGLE_LIMIT:
        return None
    assert isinstance(call.op, Linear)
    w, b = call.op.aligned(call)
    rank = len(x[0].tensor.shape)
    if rank > 2 and folded.scale.size > 1:
        return None
    bias = (np.zeros(len(w)) if b is None else b.astype(np.float64)) * folded.scale + folded.constant
    data = body.cast(x[0].coded(), SINGLE)
    factors, added = body.const(w.T * folded.scale, np.float32), body.const(bias, np.float32)
    if rank == 2:
        value = body.op("Gemm", data.value, factors, added)
    else:
        value = body.op("Add", body.op("MatMul", data.value, factors), added)
    return folded.carried(body, call, Coded(value, SINGLE))
