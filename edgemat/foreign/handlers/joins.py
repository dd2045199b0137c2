"""Operators of several tensors: Concat (Add, Sub and Mul come through `elementwise.step`)."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from edgemat.foreign.settling import settled
from edgemat.foreign.signals import Gathered, Joined, Quantity, Signal
from edgemat.foreign.translator import Handler, Translator


def concat(tr: Translator, node: ir.Node) -> None:
    """Joins behind the batch axis, of tensors with one scale or with binary points."""
    found = [tr.quantity(node, i) for i in range(len(node.inputs))]
    if _differ(found):
        tr.set(node, Gathered(node, tuple(part for part in found if isinstance(part, (Signal, Joined)))))
        return
    given = [tr.signal(node, i) for i in range(len(node.inputs))]
    orders = {signal.perm for signal in given}
    shared = given[0].perm if len(orders) == 1 else None  # all are laid out alike: join them as they lie
    if shared is not None:
        given = [replace(signal, perm=None) for signal in given]
    signals = [settled(tr, node, signal) for signal in given]
    zeros = {signal.zero for signal in signals}
    factors = {float(signal.factor) for signal in signals}
    if len(zeros) > 1 or len(factors) > 1:
        raise tr.refuse(node, f"tensors with scales {sorted(factors)}", "quantise all of them with one scale")
    rank = len(tr.type(signals[0]).shape)
    axis = tr.integer(node, "axis", 1) % rank
    if axis == 0:
        raise tr.refuse(node, "a concatenation along the batch", "join samples outside of the network")
    if shared is not None:
        axis = shared[axis]
    value = tr.bench.add("Concat", [s.value for s in signals], {"axis": axis - 1}, tr.label(node))
    tr.set(node, Signal(value, signals[0].factor, perm=shared, zero=signals[0].zero))


def _differ(found: list[Quantity | None]) -> bool:
    """Whether parts have real scales of their own, so that a quantiser must meet each of them."""
    if not all(isinstance(part, Joined) or (isinstance(part, Signal) and part.zero is None) for part in found):
        return False
    factors = {tuple(part.factor.reshape(-1).tolist()) for part in found if isinstance(part, Signal)}
    return len(factors) > 1 or any(isinstance(part, Joined) for part in found)


HANDLERS: dict[tuple[str, str], Handler] = {("", "Concat"): concat}
