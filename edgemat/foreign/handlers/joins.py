"""Operators of several tensors: Concat (Add, Sub and Mul come through `elementwise.step`)."""

from __future__ import annotations

import onnx_ir as ir

from edgemat.foreign.settling import settled
from edgemat.foreign.signals import Signal
from edgemat.foreign.translator import Handler, Translator


def concat(tr: Translator, node: ir.Node) -> None:
    """Joins behind the batch axis, of tensors with one scale or with binary points."""
    signals = [settled(tr, node, tr.signal(node, i)) for i in range(len(node.inputs))]
    zeros = {signal.zero for signal in signals}
    factors = {float(signal.factor) for signal in signals}
    if len(zeros) > 1 or len(factors) > 1:
        raise tr.refuse(node, f"tensors with scales {sorted(factors)}", "quantise all of them with one scale")
    rank = len(tr.type(signals[0]).shape)
    axis = tr.integer(node, "axis", 1) % rank
    if axis == 0:
        raise tr.refuse(node, "a concatenation along the batch", "join samples outside of the network")
    value = tr.bench.add("Concat", [s.value for s in signals], {"axis": axis - 1}, tr.label(node))
    tr.set(node, Signal(value, signals[0].factor, zero=signals[0].zero))


HANDLERS: dict[tuple[str, str], Handler] = {("", "Concat"): concat}
