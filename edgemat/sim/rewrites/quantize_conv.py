"""Conv and its epilogue as one integer kernel, onnxruntime's QLinearConv, on bytes with channels last.

Exact by the proof in `integer_kernel`; padding is the byte of the code 0. Used from 8 channels on, 16 where
pairs of products are unsafe: there the kernel is faster than the float one.
"""

from __future__ import annotations

import numpy as np

from edgemat.op import Call
from edgemat.ops.conv import Conv
from edgemat.sim.carriers import SINGLE, Carried, FusedBody, Packed, byte_offset
from edgemat.sim.rewrites.integer_kernel import halves, pairs_are_safe, plan_kernel

WORTHWHILE = 8
"""Channels, in and out, from which the integer kernel is faster; twice that where pairs of products are unsafe."""


def quantize_conv(body: FusedBody, call: Call, x: list[Carried]) -> Carried | None:
    """Rewrites a 2-D Conv, dense or depthwise, of bytes."""
    source, result, groups = x[0], call.y[0], call.attrs["groups"]
    assert isinstance(call.op, Conv)
    weight, bias = call.op.aligned(call)
    channels = source.tensor.shape[1] or 1
    if call.epilogue is None or weight.ndim != 4 or not source.can_pack or groups not in (1, channels):
        return None
    if groups > 1 and weight.shape[0] != channels:
        return None
    kernel = plan_kernel(call, np.zeros(weight.shape[0], np.int64) if bias is None else bias)
    if kernel is None or weight.min() < -128 or weight.max() > 127:
        return None
    offset = byte_offset(source.tensor)
    assert offset is not None
    safe = pairs_are_safe(weight, source.tensor.hi + offset)
    if min(channels, weight.shape[0]) < (WORTHWHILE if safe else 2 * WORTHWHILE):
        return None
    data = source.packed(channels_last=True).value
    kind, zero = (np.int8, 0) if safe or groups == 1 else (np.uint8, 128)
    if not safe and groups == 1:
        data, weight = body.op("Concat", data, data, axis=3), halves(weight)
    one = body.const(1.0, SINGLE)
    made = body.microsoft(
        "QLinearConv",
        data,
        one,
        body.const(offset, np.uint8),
        body.const(weight + zero, kind),
        body.const(np.broadcast_to(kernel.scale, weight.shape[:1]), SINGLE),
        body.const(zero, kind),
        one,
        body.const(kernel.zero_point, np.uint8),
        body.const(kernel.bias, np.int32),
        channels_last=1,
        kernel_shape=list(weight.shape[2:]),
        strides=list(call.attrs["strides"]),
        pads=list(call.attrs["pads"]),
        dilations=list(call.attrs["dilations"]),
        group=groups,
    )
    result_offset = byte_offset(result)
    assert result_offset is not None
    packed_result = Packed(kernel.clipped(body, made), result_offset, channels_last=True)
    return Carried(body, result, packed=lambda: packed_result)
