"""The end of an import: what the file's outputs become."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgemat.errors import LoweringError
from edgemat.foreign.affine import affine_of
from edgemat.foreign.settling import settled
from edgemat.foreign.signals import Gathered, Joined, Refused, Signal
from edgemat.formats import Fixed

if TYPE_CHECKING:
    from edgemat.foreign.translator import Translator

OUTPUT_BITS = 24


def close(tr: Translator, value: ir.Value) -> None:
    """Closes a graph output with a Dequantize.

    Codes that have binary points or one real scale come out as they are. Where real operators, or a scale for each
    channel, stand between the codes and the output, the output is rounded to `OUTPUT_BITS` bits; the report says so.

    Raises:
        LoweringError: if the output is a constant, the input itself, or has no integer form.
    """
    name, quantity = value.name or "output", tr.values.get(value)
    if isinstance(quantity, Refused):
        return
    if isinstance(quantity, (Joined, Gathered)):
        raise LoweringError(f"output {name!r} joins tensors of different real scales; quantise it")
    if not isinstance(quantity, Signal):
        raise LoweringError(f"output {name!r} does not depend on quantised data; quantise the network's input")
    node = value.producer() or ir.Node("", "Output", [], name=name)
    if quantity.zero is not None:
        _closed(tr, _stored(tr, settled(tr, node, quantity), name), value, "")
        return
    try:
        plain = settled(tr, node, quantity)
    except LoweringError:
        last = quantity.chain.steps[-1] if quantity.chain else None
        if last is not None and last.op_type == "Sigmoid":
            steps = quantity.chain.steps[:-1]
            tr.report.notes.append(f"Output {name!r} is what {last.node!r} (Sigmoid) takes: a larger one stays larger.")
            quantity = quantity.through(replace(quantity.chain, steps=steps))
        plain = _plain(tr, node, quantity, name)
    if float(plain.factor) != 1 and len(set(tr.type(plain).format.fracs)) > 1:
        plain = _plain(tr, node, plain, name)
    if float(plain.factor) == 1:
        _closed(tr, plain.value, value, "")
        return
    # A real scale stands beside plain integers: the binary point goes into it.
    unit = np.ldexp(float(plain.factor), -tr.type(plain).format.fracs[0])
    _closed(tr, _stored(tr, replace(plain, zero=0), name), value, float(np.float32(unit)).hex())


def _stored(tr: Translator, signal: Signal, name: str) -> ir.Value:
    """The stored integers ``code + zero``, whatever a code is worth."""
    bench, tensor, zero = tr.bench, tr.type(signal), signal.zero or 0
    fracs = np.asarray(tensor.format.fracs, np.int64)
    if not zero and not fracs.any():
        return signal.value
    if not fracs.any():
        return bench.add(
            "Add", [signal.value, bench.literal(np.array([zero]), Fixed(34, 34), name)], {}, f"{name}_stored"
        )
    channels = int(tensor.shape[1] or 1) if len(tensor.shape) > 1 else 1
    points = tuple(int(-f) for f in fracs)
    one = Fixed(2, 2).with_frac(points if len(points) > 1 else points[0])
    inputs = [
        signal.value,
        bench.codes(np.ones(channels, np.int64), one, f"{name}_one"),
        bench.codes(np.full(channels, zero, np.int64), Fixed(32, 32), f"{name}_zero"),
    ]
    return bench.add("Affine", inputs, {"w_format": str(one), "b_format": str(Fixed(32, 32))}, f"{name}_stored")


def _plain(tr: Translator, node: ir.Node, signal: Signal, name: str) -> Signal:
    try:
        return settled(tr, node, signal)
    except LoweringError:
        return _rounded(tr, node, signal, name)


def _closed(tr: Translator, made: ir.Value, value: ir.Value, scale: str) -> None:
    tr.bench.alias(value, made)
    tr.bench.output(value, value.name or "output", {"scale": scale} if scale else {})


def _rounded(tr: Translator, node: ir.Node, signal: Signal, name: str) -> Signal:
    """The output as a fixed-point number: an affine function of the sums, rounded."""
    found = affine_of(tr, signal)
    if found is None:
        raise tr.refuse(node, "an output that real operators make of the codes", "quantise the output")
    made, error = found.written(tr, name, OUTPUT_BITS)
    tr.report.notes.append(
        f"Output {name!r} is rounded to {tr.bench.type(made.value).format}, at most {error:.3g} off."
    )
    return settled(tr, node, made)
