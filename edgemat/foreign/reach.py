"""What each channel of a tensor can reach: less than the whole tensor's interval, which is that of its widest channel.

For a sum ``y[o] = sum_k w[o, k] * x[k] + b[o]`` with every x in lo .. hi the ends are those of the terms, added up.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgemat.foreign.workbench import Workbench
from edgemat.lower.typing import call_of
from edgemat.op import Call


def channel_reach(bench: Workbench, value: ir.Value) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest code of each channel of axis 1: int64 arrays of one entry, or one per channel."""
    tensor, producer = bench.type(value), value.producer()
    lows, highs = tensor.channel_intervals()
    if producer is None or tensor.format.widths is not None:
        return lows, highs
    if producer.op_type == "MaxPool" and producer.inputs[0] is not None and not any(producer.attributes["pads"].value):
        return channel_reach(bench, producer.inputs[0])
    if producer.op_type not in ("Conv", "Linear"):
        return lows, highs
    call = call_of(producer)
    plain = not call.x[0].format.per_channel and not call.attrs.get("requantize")
    if not plain or (call.op.name == "Linear" and len(call.x[0].shape) != 2):
        return lows, highs
    low, high = sum_reach(call)
    return np.maximum(low, tensor.lo), np.minimum(high, tensor.hi)


def sum_reach(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the sums of a Conv or Linear with one input format, by output channel (float64 is exact up to 2**53)."""
    weights, bias, x = call.constant(1), call.constant(2), call.x[0]
    assert weights is not None
    flat = weights.reshape(len(weights), -1).astype(np.float64)
    padded = call.op.name == "Conv" and any(call.attrs["pads"])
    lo, hi = (min(x.lo, 0), max(x.hi, 0)) if padded else (x.lo, x.hi)
    positive, negative = np.maximum(flat, 0).sum(axis=1), np.minimum(flat, 0).sum(axis=1)
    offset = np.zeros(len(flat)) if bias is None else bias.astype(np.float64)
    low, high = positive * lo + negative * hi + offset, positive * hi + negative * lo + offset
    limit = float(1 << 53)
    if max(np.abs(low).max(), np.abs(high).max()) >= limit:
        return np.array([x.lo * 0 - (1 << 62)]), np.array([1 << 62])
    return low.astype(np.int64), high.astype(np.int64)
