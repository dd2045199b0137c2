"""Pools: the maximum goes through any rising chain, the average is an exact sum and a division in the chain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgemat.foreign.chains import Step
from edgemat.foreign.constants import run
from edgemat.foreign.handlers.weighted import window
from edgemat.foreign.settling import laid_out, settled
from edgemat.foreign.signals import Signal
from edgemat.foreign.translator import Handler, Translator
from edgemat.foreign.witness import averages
from edgemat.formats import Fixed, accumulator
from edgemat.op import Tensor


def max_pool(tr: Translator, node: ir.Node) -> None:
    """MaxPool of one output."""
    if len(node.outputs) > 1 and node.outputs[1].name and node.outputs[1].uses():
        raise tr.refuse(node, "the indices of the maxima", "use the values only")
    signal = tr.signal(node)
    rising = (signal.chain.sign(signal.chain.channels) == 1).all()
    signal = laid_out(tr, node, signal) if rising else settled(tr, node, signal, scalar=False)
    kernel = tr.integers(node, "kernel_shape")
    attrs = window(tr, node, signal, kernel)
    attrs |= {"kernel_shape": kernel, "ceil_mode": tr.integer(node, "ceil_mode", 0)}
    tr.set(node, replace(signal, value=tr.bench.add("MaxPool", [signal.value], attrs, tr.label(node))))


def global_max_pool(tr: Translator, node: ir.Node) -> None:
    """The maximum of a whole map."""
    signal = settled(tr, node, tr.signal(node), scalar=False)
    kernel = tr.type(signal).sample_shape[1:]
    attrs = {"kernel_shape": kernel, "strides": (1,) * len(kernel), "pads": (0,) * 2 * len(kernel)}
    tr.set(node, replace(signal, value=tr.bench.add("MaxPool", [signal.value], attrs, tr.label(node))))


def average_pool(tr: Translator, node: ir.Node) -> None:
    """AveragePool: a depthwise sum, then a division by the count."""
    signal = settled(tr, node, tr.signal(node), scalar=False)
    kernel = tr.integers(node, "kernel_shape")
    attrs = window(tr, node, signal, kernel)
    if tr.integer(node, "ceil_mode"):
        raise tr.refuse(node, "windows that reach beyond the padding (ceil_mode)", "pad before")
    padded = any(attrs["pads"]) and not tr.integer(node, "count_include_pad")
    made = _summed(tr, node, signal, kernel, attrs, divided=not padded)
    if padded:
        tr.set(node, _divided_by_place(tr, node, made, tr.type(signal), kernel, attrs))


def _divided_by_place(
    tr: Translator, node: ir.Node, total: Signal, source: Tensor, kernel: tuple[int, ...], attrs: dict[str, Any]
) -> Signal:
    """Sums by the elements each window holds, padding left out: ``sum * (common / count)``, then one division."""
    ends = (ir.Value(name="x"), ir.Value(name="y"))
    given = [ir.AttrInt64s(key, list(attrs[key])) for key in ("pads", "strides", "dilations")]
    conv = ir.Node("", "Conv", ends[:1] * 2, given, outputs=ends[1:], name=tr.label(node))
    one = np.ones((1, 1, *source.sample_shape[1:]), np.float32)
    counts = run(tr, conv, [one, np.ones((1, 1, *kernel), np.float32)])[0].astype(np.int64)[0]
    common = int(np.lcm.reduce(np.unique(counts))) if counts.min() > 0 else 1 << 31
    shares = common // np.maximum(counts, 1)
    if common * int(np.prod(kernel)) >= 1 << 16:
        raise tr.refuse(node, "windows of many sizes, padding left out", "count the padding, or pad before")
    name = tr.label(node)
    literal = tr.bench.literal(shares, accumulator(0, int(shares.max()), (0,)), f"{name}_shares")
    value = tr.bench.add("Mul", [total.value, literal], {}, f"{name}_scaled")
    step = Step(name, "Div", {}, (None, np.asarray(float(common), np.float32)))
    return replace(total, value=value, chain=total.chain.then(step, tr.source.opset))


def global_average_pool(tr: Translator, node: ir.Node) -> None:
    """The average of a whole map."""
    signal = settled(tr, node, tr.signal(node), scalar=False)
    kernel = tr.type(signal).sample_shape[1:]
    _summed(tr, node, signal, kernel, {"strides": (1,) * len(kernel)})


def reduce_mean(tr: Translator, node: ir.Node) -> None:
    """ReduceMean and ReduceSum over any axes behind the batch."""
    signal = tr.signal(node)
    rank = len(tr.type(signal).shape)
    chosen = sorted(int(a) % rank for a in tr.axes(node)) or list(range(1, rank))
    if 0 in chosen or len(set(chosen)) < len(chosen):
        raise tr.refuse(node, f"a reduction over axes {chosen} of {rank}", "reduce axes behind the batch, once each")
    keep = bool(tr.integer(node, "keepdims", 1))
    divided = node.op_type == "ReduceMean"
    order = signal.order(rank)
    if sorted(order[a] for a in chosen) != list(range(2, rank)) or rank not in (3, 4):
        _reduced_by_row(tr, node, settled(tr, node, signal), chosen, keep, divided)
        return
    plain = replace(settled(tr, node, replace(signal, perm=None), scalar=False), perm=None)
    kernel = tr.type(plain).sample_shape[1:]
    made = _summed(tr, node, plain, kernel, {"strides": (1,) * len(kernel)}, divided)
    if keep:
        tr.set(node, replace(made, perm=None if order == tuple(range(rank)) else order))
        return
    channels = tr.type(made).sample_shape[0]
    value = tr.bench.add("Reshape", [made.value], {"shape": (channels,)}, f"{tr.label(node)}_flat")
    tr.set(node, replace(made, value=value))


def _reduced_by_row(
    tr: Translator, node: ir.Node, signal: Signal, chosen: list[int], keep: bool, divided: bool
) -> None:
    """The kept axes become channels, the reduced ones one spatial axis."""
    shape, name = tr.type(signal).sample_shape, tr.label(node)
    kept = [axis for axis in range(1, len(shape) + 1) if axis not in chosen]
    rows = tuple(int(np.prod([shape[a - 1] for a in axes], dtype=np.int64)) for axes in (kept, chosen))
    moved = tr.bench.add("Transpose", [signal.value], {"perm": tuple(a - 1 for a in kept + chosen)}, f"{name}_layout")
    flat = tr.bench.add("Reshape", [moved], {"shape": rows}, f"{name}_rows")
    made = _summed(tr, node, replace(signal, value=flat), rows[1:], {"strides": (1,)}, divided)
    target = tuple(1 if a in chosen else shape[a - 1] for a in range(1, len(shape) + 1) if keep or a in kept)
    value = tr.bench.add("Reshape", [made.value], {"shape": target or (1,)}, f"{name}_shape")
    if not target:
        raise tr.refuse(node, "a reduction to one number a sample without an axis", "state keepdims")
    tr.set(node, replace(made, value=value))


def _summed(
    tr: Translator,
    node: ir.Node,
    signal: Signal,
    kernel: tuple[int, ...],
    attrs: dict[str, object],
    divided: bool = True,
) -> Signal:
    tensor = tr.type(signal)
    channels, name = tensor.sample_shape[0], tr.label(node)
    fmt = Fixed(1, 1, signed=False)
    ones = tr.bench.codes(np.ones((channels, 1, *kernel), np.int64), fmt, f"{name}_ones")
    free = {"pads": (0,) * 2 * len(kernel), "dilations": (1,) * len(kernel)}
    full = {**free, **attrs, "groups": channels, "w_format": str(fmt)}
    total = tr.bench.add("Conv", [signal.value, ones], full, f"{name}_sum")
    chain = signal.chain
    if divided:
        count = np.asarray(float(np.prod(kernel)), np.float32)
        chain = chain.then(Step(name, "Div", {}, (None, count)), tr.source.opset)
    witness = averages(tensor, signal, int(np.prod(kernel))) if divided else None
    made = replace(signal, value=total, chain=chain, fused=False, witness=witness)
    tr.set(node, made)
    return made


HANDLERS: dict[tuple[str, str], Handler] = {
    ("", "MaxPool"): max_pool,
    ("", "GlobalMaxPool"): global_max_pool,
    ("", "AveragePool"): average_pool,
    ("", "GlobalAveragePool"): global_average_pool,
    ("", "ReduceMean"): reduce_mean,
    ("", "ReduceSum"): reduce_mean,
}
