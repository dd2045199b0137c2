"""What waits for a quantiser as a whole: tensors of different scales that are joined, and nodes that move elements.

A quantiser acts on every element alone. So the parts of a concatenation are quantised one by one, and what moves
elements between a real sum and its quantiser moves codes instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from edgemat.foreign.quantisers import Quantiser
from edgemat.foreign.signals import Gathered, Joined, Known, Quantity, Raw, Signal

if TYPE_CHECKING:
    from edgemat.foreign.translator import Translator

MOVES = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather", "Pad", "Resize", "Upsample")
"""Operators of one output that move elements, or add zeros."""


def moved(tr: Translator, signal: Signal, nodes: tuple[ir.Node, ...]) -> Signal:
    """The codes behind nodes of `MOVES`, each taken now."""
    for node in nodes:
        signal = _repeated(tr, signal, node)
    return signal


def steps_and_moves(path: tuple[ir.Node, ...]) -> tuple[tuple[ir.Node, ...], tuple[ir.Node, ...]]:
    """The element-wise nodes of a path, and those that move elements; the two kinds may change places."""
    steps = tuple(node for node in path if node.op_type not in MOVES)
    return steps, tuple(node for node in path if node.op_type in MOVES)


def quantise_gathered(tr: Translator, node: ir.Node, gathered: Gathered, quantiser: Quantiser) -> Signal:
    """Quantises each part, then joins the codes.

    Raises:
        LoweringError: for scales by channel, which would have to be cut like the tensor.
    """
    if quantiser.scale.size > 1:
        raise tr.refuse(node, "scales by channel behind a concatenation", "use one scale")
    steps, moves = steps_and_moves(gathered.path)
    made = []
    for part in gathered.parts:
        quantity: Quantity = part
        for step in steps:
            quantity = _through(tr, quantity, step)
        assert isinstance(quantity, (Signal, Joined, Raw))
        made.append(tr.quantised(node, quantity, quantiser))
    inputs = [value for value in gathered.node.inputs if value is not None]
    with tr.assuming(dict(zip(inputs, made, strict=True))):
        tr.handle(gathered.node)
        joined = tr.values[gathered.node.outputs[0]]
    assert isinstance(joined, Signal)
    return moved(tr, joined, moves)


def _repeated(tr: Translator, signal: Signal, node: ir.Node) -> Signal:
    found = _through(tr, signal, node)
    assert isinstance(found, Signal)
    return found


def _through(tr: Translator, quantity: Quantity, node: ir.Node) -> Quantity:
    """The quantity behind one node, which reads it as its only variable."""
    value = next(v for v in node.inputs if v is not None and not isinstance(tr.values[v], Known))
    with tr.assuming({value: quantity}):
        tr.handle(node)
        return tr.values[node.outputs[0]]
