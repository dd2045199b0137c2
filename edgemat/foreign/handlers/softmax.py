"""Softmax inside a network, on codes; at its end it is left to the reader."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgemat import formats
from edgemat.foreign.constants import run
from edgemat.foreign.settling import settled
from edgemat.foreign.signals import Signal
from edgemat.foreign.translator import Handler, Translator
from edgemat.foreign.witness import Witness, real, rows
from edgemat.formats import Fixed
from edgemat.op import Tensor
from edgemat.ops.table import MAX_INPUT_BITS

EXPONENTIALS = Fixed(24, 1, signed=False)
QUOTIENT = Fixed(23, 1, signed=False, rounding="RND_CONV")


def softmax(tr: Translator, node: ir.Node) -> None:
    """Softmax of codes: a table of exponentials, their exact sum, the quotient in 22 fractional bits.

    A Softmax or LogSoftmax that ends the network is left to the reader: it keeps the order of the classes.

    Raises:
        LoweringError: for data of more than 12 bits, and for a LogSoftmax inside the network.
    """
    value = node.outputs[0]
    signal = tr.signal(node)
    if value.is_graph_output() and not value.uses():
        tr.set(node, signal)
        tr.report.notes.append(
            f"Output {value.name!r} is what {tr.label(node)!r} ({node.op_type}) takes: the classes keep their order."
        )
        return
    if node.op_type != "Softmax":
        raise tr.refuse(node, "a LogSoftmax inside the network", "end the network in it")
    signal = settled(tr, node, signal)
    tensor = tr.type(signal)
    rank, fmt = len(tensor.shape), tensor.format
    axis = tr.integer(node, "axis", -1 if tr.source.opset >= 13 else 1) % rank
    if axis == 0 or (tr.source.opset < 13 and axis != rank - 1):
        raise tr.refuse(node, f"axis {axis} of {rank} in operator set {tr.source.opset}", "normalise the last axis")
    if fmt.width > MAX_INPUT_BITS or fmt.bipolar or fmt.per_channel or signal.zero is not None:
        raise tr.refuse(node, f"a softmax of {fmt}", f"quantise its input to at most {MAX_INPUT_BITS} bits")
    table = exponentials(tensor, signal)
    stored = tr.bench.codes(table, EXPONENTIALS, f"{tr.label(node)}_exponentials")
    attrs = {"axis": axis - 1, "table_format": str(EXPONENTIALS), "y_format": str(QUOTIENT)}
    made = tr.bench.add("Softmax", [signal.value, stored], attrs, tr.label(node))
    witness = _sampled(tr, node, tensor, signal, table, tensor.sample_shape[axis - 1])
    tr.set(node, Signal(made, np.ones((), np.float32), witness=witness))
    tr.note(node, f"exponentials in a table of {table.size}")


def exponentials(tensor: Tensor, signal: Signal) -> np.ndarray:
    """Codes of ``exp(-d * scale)`` for every distance d of two codes, int64 [2**width]."""
    unit = math.ldexp(float(signal.factor), -tensor.format.fracs[0])
    values = [math.exp(-distance * unit) for distance in range(1 << tensor.format.width)]
    return formats.quantize(np.array(values, np.float64), EXPONENTIALS)


def _sampled(tr: Translator, source: ir.Node, tensor: Tensor, signal: Signal, table: np.ndarray, size: int) -> Witness:
    """Sampled rows, by the file's operator and by the integers."""
    codes = rows(tensor, size)
    ends = (ir.Value(name="x"), ir.Value(name="y"))
    node = ir.Node("", "Softmax", ends[:1], [ir.AttrInt64("axis", 1)], outputs=ends[1:], name=tr.label(source))
    theirs = run(tr, node, [real(tensor, signal, codes)])[0]
    e = table[codes.max(axis=1, keepdims=True) - codes]
    ours = formats.round_div(e << QUOTIENT.fracs[0], e.sum(axis=1, keepdims=True), QUOTIENT.rounding)
    return Witness(ours.reshape(-1), theirs.reshape(-1), "codes of sampled rows", sums=False)


HANDLERS: dict[tuple[str, str], Handler] = {("", "Softmax"): softmax, ("", "LogSoftmax"): softmax}
