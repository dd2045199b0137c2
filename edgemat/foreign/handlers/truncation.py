"""QONNX's Trunc: the lower bits of integers are dropped, behind a sum or an average of quantised tensors.

As the code of qonnx has it, in float32:

    q = round_half_even(x / scale + zero_point)
    y = round(clip(q / 2**k)) - zero_point / 2**k

In its first form (5 inputs) k is the difference of the bit widths, nothing is clipped, the whole zero point is taken
off and the result is ``y * scale``; in its second (6 inputs) ``2**k`` is the output scale by the input scale, and the
result is ``y * output_scale``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgemat.foreign.handlers.qonnx import DOMAINS
from edgemat.foreign.quantisers import ROUNDING_NAMES, Quantiser
from edgemat.foreign.requantisers import compiled, quantise
from edgemat.foreign.signals import Signal
from edgemat.foreign.translator import Handler, Translator
from edgemat.formats import Fixed

REACH = 1 << 24


@dataclass(frozen=True)
class Truncation:
    """What a Trunc states.

    Attributes:
        scale: Real value of an integer before it, float32.
        zero: Zero point before it.
        drop: k: bits that are dropped.
        result: Real value of an integer behind it, float32.
        rails: Smallest and largest integer behind it, zero point included; None: whatever comes.
        rounding: In the words of `edgemat.rounding`.
    """

    scale: np.float32
    zero: int
    drop: int
    result: np.float32
    rails: tuple[int, int] | None
    rounding: str


def stated(tr: Translator, node: ir.Node) -> Truncation:
    """The node's inputs and attributes, in either form.

    Raises:
        LoweringError: for scales by channel, fractions, or bits that are added instead of dropped.
    """
    values = [tr.known(node, index).array for index in range(1, len(node.inputs))]
    if len(values) not in (4, 5) or any(value.size != 1 for value in values):
        raise tr.refuse(node, f"{len(values)} constants, or constants by channel", "expected 4 or 5 numbers")
    numbers = [np.float32(value.reshape(())) for value in values]
    scale, zero = numbers[0], numbers[1]
    name = tr.text(node, "rounding_mode", "FLOOR").upper()
    bits, width = (numbers[2], numbers[3]) if len(numbers) == 4 else (numbers[2], numbers[4])
    whole = all(float(v).is_integer() for v in (zero, bits, width))
    if name not in ROUNDING_NAMES or not scale > 0 or not whole or not 1 <= width <= 32 or not 1 <= bits <= 48:
        raise tr.refuse(node, f"{name[:20]}, scale {scale}, widths {bits} and {width}", "expected integers and a scale")
    rounding, rails = ROUNDING_NAMES[name], None
    if len(numbers) == 4:
        drop, result = int(bits) - int(width), scale
    else:
        if not numbers[3] > 0:
            raise tr.refuse(node, f"the output scale {numbers[3]}", "expected a positive number")
        drop, result = int(np.round(np.log2(numbers[3] / scale))), numbers[3]
        signed, narrow = bool(tr.integer(node, "signed", 1)), bool(tr.integer(node, "narrow", 0))
        full = int(width)
        low = -(1 << (full - 1)) + narrow if signed else 0
        rails = (low, (1 << (full - 1)) - 1 if signed else (1 << full) - 1 - narrow)
    if not 0 <= drop <= 24 or int(zero) % (1 << drop):
        raise tr.refuse(node, f"{drop} bits to drop at a zero point of {zero}", "expected a whole zero point behind it")
    return Truncation(scale, int(zero), drop, result, rails, rounding)


def trunc(tr: Translator, node: ir.Node) -> None:
    """Trunc, both forms."""
    found = stated(tr, node)
    signal = integers(tr, node, tr.signal(node), found)
    lo, hi = tr.type(signal).lo, tr.type(signal).hi
    zero = found.zero >> found.drop
    low, high = (lo >> found.drop) - 1, (hi >> found.drop) + 1
    if found.rails is not None:
        low, high = found.rails[0] - zero, found.rails[1] - zero
    unit = np.float32(2.0**found.drop)
    quantiser = Quantiser(np.asarray(unit), zero, low, high, found.rounding, "qonnx")
    made, how = quantise(tr.bench, signal, quantiser, tr.label(node))
    tr.note(node, f"{found.drop} bits dropped, {how}")
    if found.rails is None and found.zero:
        fmt = Fixed(34, 34).with_frac(-found.drop)
        rest = tr.bench.literal(np.array([zero - found.zero]), fmt, f"{tr.label(node)}_zero")
        made = replace(made, value=tr.bench.add("Add", [made.value, rest], {}, f"{tr.label(node)}_shift"))
    tr.set(node, rescaled(tr, node, made, float(found.result) / float(unit)))


def integers(tr: Translator, node: ir.Node, signal: Signal, found: Truncation) -> Signal:
    """``round(x / scale + zero) - zero`` as plain integers."""
    tensor = tr.type(signal)
    unit = np.ldexp(signal.factor.astype(np.float64).reshape(-1), -np.asarray(tensor.format.fracs, np.int64))
    if not signal.chain and (unit == float(found.scale)).all() and not tensor.format.per_channel:
        return plain(tr, node, signal)
    wide = Quantiser(np.asarray(found.scale), found.zero, -REACH - found.zero, REACH - found.zero, "RND_CONV", "qonnx")
    function = compiled(tr.bench, signal, wide)
    if (function.sign() == 0).any():
        raise tr.refuse(node, "data that is not monotone in its codes", "quantise it first")
    ends = function(np.stack([function.lo, function.hi], axis=1))
    low, high = int(ends.min()), int(ends.max())
    if max(-low, high) >= REACH - abs(found.zero):
        raise tr.refuse(node, f"integers from {low} to {high}, which float32 does not tell apart", "scale them down")
    made, _ = quantise(tr.bench, signal, replace(wide, low=low, high=high), f"{tr.label(node)}_whole")
    return plain(tr, node, made)


def plain(tr: Translator, node: ir.Node, signal: Signal) -> Signal:
    """The codes as integers, whatever they stood for."""
    return moved(tr, node, replace(signal, factor=np.ones((), np.float32)), tr.type(signal).format.fracs[0])


def rescaled(tr: Translator, node: ir.Node, signal: Signal, scale: float) -> Signal:
    """The codes times a number: their binary point moves, or they become plain integers with a real scale beside."""
    mantissa, exponent = np.frexp(scale)
    if mantissa == 0.5:
        return moved(tr, node, signal, int(exponent) - 1)
    factor = np.ldexp(scale, -tr.type(signal).format.fracs[0])
    return replace(plain(tr, node, signal), factor=np.asarray(factor, np.float32))


def moved(tr: Translator, node: ir.Node, signal: Signal, places: int) -> Signal:
    """The codes with their binary point so many places further right."""
    if places == 0:
        return signal
    literal = tr.bench.literal(np.asarray(1), Fixed(2, 2).with_frac(-places), f"{tr.label(node)}_point")
    return replace(signal, value=tr.bench.add("Mul", [signal.value, literal], {}, f"{tr.label(node)}_moved"))


HANDLERS: dict[tuple[str, str], Handler] = {(domain, "Trunc"): trunc for domain in DOMAINS}
