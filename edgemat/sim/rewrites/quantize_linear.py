"""Linear and its epilogue as one integer kernel, onnxruntime's ``com.microsoft.QGemm``, on bytes.

Exact by the proof in `integer_kernel`.
"""

from __future__ import annotations

import numpy as np

from edgemat.body import Coded
from edgemat.op import Call
from edgemat.sim.carriers import SINGLE, Carried, FusedBody, Packed, byte_offset
from edgemat.sim.rewrites.integer_kernel import halves, pairs_are_safe, plan_kernel

WORTHWHILE = 32
"""Output features from which packing a float carrier pays for itself."""


def quantize_linear(body: FusedBody, call: Call, x: list[Carried]) -> Carried | None:
    """Rewrites a rank-2 Linear of bytes."""
    source, result = x[0], call.y[0]
    if len(source.tensor.shape) != 2 or not source.can_pack:
        return None
    arrays = call.op.native(call).arrays
    weight = arrays["weight"]
    if not source.is_packed and weight.shape[0] < WORTHWHILE:
        return None
    kernel = plan_kernel(call, arrays.get("bias", np.zeros(weight.shape[0], np.int64)))
    if kernel is None or weight.min() < -128 or weight.max() > 127:
        return None
    packed = source.packed()
    data = packed.value
    if not pairs_are_safe(weight, source.tensor.hi + packed.offset):
        data, weight = body.op("Concat", data, data, axis=1), halves(weight)
    one = body.const(1.0, SINGLE)
    inputs = [
        data,
        one,
        body.const(packed.offset, np.uint8),
        body.const(weight.T, np.int8),
        body.const(kernel.scale, SINGLE),
        body.const(np.zeros(kernel.scale.size), np.int8),
        body.const(kernel.bias, np.int32),
    ]
    if call.epilogue is None:
        value = Coded(body.microsoft("QGemm", *inputs), SINGLE)
        return Carried(body, result, coded=lambda: value)
    made = body.microsoft("QGemm", *inputs, one, body.const(kernel.zero_point, np.uint8))
    offset = byte_offset(result)
    assert offset is not None
    packed_result = Packed(kernel.clipped(body, made), offset)
    return Carried(body, result, packed=lambda: packed_result)
