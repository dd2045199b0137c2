"""QONNX's channels-last operators (``qonnx.custom_op.channels_last``): Conv, MaxPool and BatchNormalization of N...C.

Each is the standard operator between two transposes, which cost nothing where the neighbours are channels-last too: a
`Signal` carries its order of axes along. Convolution weights are [O, ..., I].
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from edgemat.foreign.handlers import elementwise, pooling, weighted
from edgemat.foreign.signals import Joined, Known, Raw, Signal
from edgemat.foreign.translator import Handler, Translator


def to_channels_first(rank: int) -> tuple[int, ...]:
    """Where each axis of the NC... tensor comes from in the N...C one."""
    return (0, rank - 1, *range(1, rank - 1))


def to_channels_last(rank: int) -> tuple[int, ...]:
    """Where each axis of the N...C tensor comes from in the NC... one."""
    return (0, *range(2, rank), 1)


def permuted(signal: Signal, rank: int, perm: tuple[int, ...]) -> Signal:
    """The signal with its axes in another order; nothing moves."""
    order = signal.order(rank)
    return replace(signal, perm=tuple(order[axis] for axis in perm))


def between_transposes(handler: Handler, weights: bool = False) -> Handler:
    """The channels-last form of a channels-first handler.

    Args:
        handler: Takes the node as if its data were channels-first.
        weights: Whether the second input is transposed too.
    """

    def taken(tr: Translator, node: ir.Node) -> None:
        data = node.inputs[0] if node.inputs else None
        quantity = None if data is None else tr.values[data]
        if data is None or isinstance(quantity, (Raw, Joined)):
            tr.signal(node)
            raise tr.refuse(node, "a sum without a quantiser", "quantise it first")
        signal = tr.signal(node)
        rank = len(tr.type(signal).shape)
        if rank not in (3, 4):
            raise tr.refuse(node, f"data of rank {rank}", "expected [N, W, C] or [N, H, W, C]")
        second = node.inputs[1] if weights and len(node.inputs) > 1 else None
        kept = {value: tr.values[value] for value in (data, second) if value is not None}
        tr.values[data] = permuted(signal, rank, to_channels_first(rank))
        try:
            if second is not None:
                known = tr.known(node, 1)
                if known.array.ndim != rank:
                    raise tr.refuse(node, f"weights of shape {known.array.shape}", f"expected rank {rank}")
                tr.values[second] = _moved(known, to_channels_first(rank))
            handler(tr, node)
        finally:
            tr.values.update(kept)
        made = tr.values[node.outputs[0]]
        assert isinstance(made, Signal)
        tr.set(node, permuted(made, rank, to_channels_last(rank)))

    return taken


def _moved(known: Known, perm: tuple[int, ...]) -> Known:
    return known.reshaped(lambda array: array.transpose(perm))


HANDLERS: dict[tuple[str, str], Handler] = {
    ("qonnx.custom_op.channels_last", "Conv"): between_transposes(weighted.conv, weights=True),
    ("qonnx.custom_op.channels_last", "MaxPool"): between_transposes(pooling.max_pool),
    ("qonnx.custom_op.channels_last", "BatchNormalization"): between_transposes(elementwise.step),
}
