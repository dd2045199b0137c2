"""MaxPool and AveragePool of a lowered file in standard ONNX, with Quant where an average is rounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgemat.foreign.qonnx_graph import QonnxGraph
from edgemat.foreign.qonnx_narrowing import (
    RECTIFIED,
    Plan,
    check_overflow,
    plan,
    quantise,
    refusal,
    rounded_interval,
    scales,
)
from edgemat.op import Call, Epilogue
from edgemat.ops.pooling import AveragePool


def max_pool(graph: QonnxGraph, call: Call, x: Sequence[str]) -> str:
    """MaxPool."""
    keys = ("kernel_shape", "strides", "pads")
    attributes: dict[str, Any] = {key: list(call.attrs[key]) for key in keys}
    if set(call.attrs["dilations"]) - {1}:
        attributes["dilations"] = list(call.attrs["dilations"])
    shape = call.exact[0].shape
    return graph.node("MaxPool", x, shape, call.name, **attributes, ceil_mode=call.attrs["ceil_mode"])


def average_pool(graph: QonnxGraph, call: Call, x: Sequence[str]) -> str:
    """AveragePool, what rounding adds, and a Quant.

    An average over a power of two is a sum with its binary point moved. Over any other count it is rounded to float32,
    and the addend has to outweigh that, too: with D = count << shift, the average is a multiple of 1/D LSBs of the
    result, so its distance from a threshold that it is not on is at least 1/(2 D). An addend of at most half of that
    decides the ties by its sign and moves nothing else across. Ties that the mode itself has to decide are refused.
    """
    op, epilogue, result = call.op, call.epilogue, call.exact[0]
    assert isinstance(op, AveragePool) and epilogue is not None
    target, (shift,), source = epilogue.format, epilogue.shift, call.x[0]
    axes = op.counts(call)
    counts = np.multiply.outer(axes[0], axes[-1]) if len(axes) > 1 else axes[0]
    largest = int(counts.max())
    value = _averaged(graph, call, x[0])
    if target.bipolar:
        done = Plan("ROUND", np.zeros(1))
    elif (counts == largest).all() and largest & (largest - 1) == 0:
        moved = Epilogue((shift + largest.bit_length() - 1,), target)
        done = plan(call, moved, result.lo, result.hi, call.bounds.magnitude)
    else:
        done = _rational(call, epilogue, bool((counts & 1).all()), largest)
    shape = result.shape
    if done.offsets.any():
        addend = graph.constant(done.offsets.reshape(()), f"{call.name}_offset")
        value = graph.node("Add", [value, addend], shape, f"{call.name}_offset")
    return quantise(graph, value, shape, min(source.lo, 0), target, done.mode, call.name)


def _rational(call: Call, epilogue: Epilogue, odd: bool, largest: int) -> Plan:
    """How averages of at most `largest` elements, counts that are all `odd` or not, are rounded."""
    target, (shift,), source = epilogue.format, epilogue.shift, call.x[0]
    lo, hi = min(source.lo, 0), max(source.hi, 0)
    check_overflow(call, target, *rounded_interval(lo, hi, (shift,), target.rounding))
    rectified = source.lo >= 0 or not target.signed
    rounding = RECTIFIED.get(target.rounding, target.rounding) if rectified else target.rounding
    if odd and shift <= 0 and rounding in ("RND_CONV", "RND_INF", "RND_ZERO"):
        rounding = "RND"  # there are no ties
    if rounding not in ("RND", "RND_MIN_INF", "TRN"):
        raise refusal(
            call,
            f"averages of {largest} elements are rounded by {target.rounding}, and float32 cannot tell their ties from "
            "their neighbours",
            "train it with RND, RND_MIN_INF or TRN, or pool a number of elements that is a power of two",
        )
    divisor = largest << max(shift, 0)
    addend = 2.0 ** -(4 * divisor - 1).bit_length()
    reach = max(-lo, hi) * 2.0**-shift + 2
    if reach >= 2.0**22 * addend:
        raise refusal(
            call,
            f"averages of up to {reach:.0f} LSBs in steps of 1/{divisor}, which float32 does not keep apart",
            "narrow the average's format or its window",
        )
    units = {"RND": addend, "RND_MIN_INF": -addend, "TRN": addend - 0.5}[rounding]
    return Plan("ROUND", units * scales(target))


def _averaged(graph: QonnxGraph, call: Call, x: str) -> str:
    """The pooling node."""
    attrs, shape = call.attrs, call.exact[0].shape
    if attrs["kernel_shape"] == call.x[0].sample_shape[1:] and not any(attrs["pads"]):
        return graph.node("GlobalAveragePool", [x], shape, call.name)
    hanging = call.op.full_pads(call) != attrs["pads"]  # type: ignore[attr-defined]
    if hanging and attrs["count_include_pad"]:
        raise refusal(
            call,
            "ceil_mode lets windows hang over a padding that counts, which readers of ONNX count differently",
            "use ceil_mode=False or count_include_pad=False",
        )
    keys = ("kernel_shape", "strides", "pads")
    geometry: dict[str, Any] = {key: list(attrs[key]) for key in keys}
    geometry |= {"ceil_mode": int(hanging), "count_include_pad": attrs["count_include_pad"]}
    return graph.node("AveragePool", [x], shape, call.name, **geometry)
