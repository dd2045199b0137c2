"""Codes without anything pending: what an operator needs that has no quantiser before it.

A chain that no quantiser follows is written as integer operators where each of its steps is exact on the grid of the
codes (ReLU, clipping to codes, adding a number of the grid); a chain that ends in integers of its own (a floor, then a
clip: NEMO's and DORY's style) is a quantiser by arithmetic. Everything else is refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgemat.foreign.chains import Chain, Step
from edgemat.foreign.quantisers import Quantiser
from edgemat.foreign.requantisers import compiled, quantise
from edgemat.foreign.signals import Signal
from edgemat.formats import Fixed, accumulator

if TYPE_CHECKING:
    from edgemat.foreign.translator import Translator

ROUNDS = ("Floor", "Ceil", "Round")
KEEPS_INTEGERS = ("Clip", "Relu", "Identity", "Cast")
_INTEGER_TYPES = (2, 3, 4, 5, 6, 7, 12, 13)


def settled(tr: Translator, node: ir.Node, signal: Signal, scalar: bool = True) -> Signal:
    """The signal with nothing pending and the file's order of axes.

    Args:
        tr: The translator.
        node: Who asks, for messages.
        signal: The signal.
        scalar: Whether one real scale must hold for all channels.

    Raises:
        LoweringError: where something pending has no exact integer form.
    """
    if signal.chain:
        signal = _without_chain(tr, node, signal)
    if scalar and signal.factor.size > 1:
        if len(set(signal.factor.reshape(-1).tolist())) > 1:
            raise tr.refuse(
                node,
                "its input has a real scale for each channel",
                "quantise that tensor with one scale, or with powers of two by channel",
            )
        signal = replace(signal, factor=signal.factor.reshape(-1)[0])
    return laid_out(tr, node, signal)


def laid_out(tr: Translator, node: ir.Node, signal: Signal) -> Signal:
    """The signal in the file's order of axes: a Transpose where it differs."""
    rank = len(tr.type(signal).shape)
    order = signal.order(rank)
    if order == tuple(range(rank)):
        return replace(signal, perm=None)
    if signal.factor.size > 1 or signal.chain.channels > 1:
        raise tr.refuse(node, "axes are exchanged while scales differ by channel", "quantise before the transpose")
    made = tr.bench.add(
        "Transpose", [signal.value], {"perm": tuple(axis - 1 for axis in order[1:])}, f"{tr.label(node)}_layout"
    )
    return replace(signal, value=made, perm=None)


def _without_chain(tr: Translator, node: ir.Node, signal: Signal) -> Signal:
    steps, cut = signal.chain.steps, whole_prefix(signal.chain)
    current = replace(signal.through(Chain()), witness=None)
    if cut:
        current = _by_arithmetic(tr, node, signal.through(replace(signal.chain, steps=steps[:cut])))
    for step in steps[cut:]:
        current = _written(tr, node, current, step)
    return current


def whole_prefix(chain: Chain) -> int:
    """How many steps, from the first, end in integers because the last of them round: a Floor, a Cast, a division of
    integers, then what keeps integers."""
    whole = stored = run = False
    end = 0
    for index, step in enumerate(chain.steps):
        constants = [v for v in step.inputs if isinstance(v, np.ndarray)]
        limits = [*constants, *(np.asarray(step.attributes[k]) for k in ("min", "max") if k in step.attributes)]
        even = all(np.all((v == np.rint(v)) | np.isinf(v)) for v in limits)
        if step.op_type in ROUNDS:
            whole = run = True
        elif step.op_type == "Cast" and step.attributes["to"] in _INTEGER_TYPES:
            whole = run = stored = True
        elif step.op_type == "Cast":
            stored = False
        elif step.op_type in KEEPS_INTEGERS:
            whole, run = whole and even, run and even
        elif step.op_type == "Div":
            whole = run = whole and stored
        else:
            whole, run = whole and even and step.op_type in ("Mul", "Add", "Sub", "Neg"), False
        end = index + 1 if run else end
    return end


def _by_arithmetic(tr: Translator, node: ir.Node, signal: Signal) -> Signal:
    """A chain whose values are integers is a quantiser of scale 1; its rails are what it reaches."""
    widest = Quantiser(np.ones((), np.float32), 0, -(1 << 24), 1 << 24)
    function = compiled(tr.bench, signal, widest)
    if (function.sign() == 0).any():
        raise tr.refuse(node, "integers made by a function that is not monotone", "quantise with a quantiser node")
    ends = function(np.stack([function.lo, function.hi], axis=1))
    low, high = int(ends.min()), int(ends.max())
    if max(-low, high) >= 1 << 24:
        raise tr.refuse(node, f"integers from {low} to {high}, which float32 does not tell apart", "clip them first")
    made, how = quantise(tr.bench, signal, replace(widest, low=low, high=high), signal.chain.steps[-1].node)
    tr.note(node, f"{signal.chain.steps[-1].node}: {how}")
    return made


def _written(tr: Translator, node: ir.Node, signal: Signal, step: Step) -> Signal:
    """One step on codes, exactly."""
    bench, tensor = tr.bench, tr.type(signal)
    if step.op_type in ("Identity", "Cast"):
        return signal
    if step.op_type == "Relu":
        return replace(signal, value=bench.add("Relu", [signal.value], {}, step.node))
    if step.op_type == "Mul" and signal.exact and not tensor.format.per_channel:
        made = _multiplied(tr, signal, step)
        if made is not None:
            return made
    if step.op_type in ("Mul", "Div") and step.position == 0:
        k = step.constant(1)
        factor = signal.factor.astype(np.float64) * (k if step.op_type == "Mul" else 1.0 / k)
        if (factor > 0).all() and (factor.astype(np.float32) == factor).all():
            return replace(signal, factor=factor.astype(np.float32))
    if step.op_type in ("Add", "Sub") and step.position == 0 and tensor.format.width <= 24:
        k = step.constant(1) * (1 if step.op_type == "Add" else -1)
        made = _shifted_by(tr, signal, np.atleast_1d(k), step)
        if made is not None:
            return made
    if step.op_type == "Clip" and signal.factor.size == 1 and not tensor.format.per_channel:
        made = _clipped(tr, signal, step)
        if made is not None:
            return made
    raise tr.refuse(
        node,
        f"no quantiser stands between {step.node!r} ({step.op_type}) and this node, and {step.op_type} is not exact on "
        "the codes",
        "quantise its result",
    )


def _multiplied(tr: Translator, signal: Signal, step: Step) -> Signal | None:
    """The codes times constants of a short binary grid, else None."""
    found = grid_of(step.constant(1 - step.position))
    rank = len(tr.type(signal).shape)
    if found is None or not found[0].all() or found[1].width + tr.type(signal).format.width > 40:
        return None
    codes, fmt = found
    laid = codes.reshape((-1,) + (1,) * (rank - 2)) if codes.size > 1 else codes.reshape(())
    constant = tr.bench.literal(laid, fmt, f"{step.node}_constant")
    return replace(signal, value=tr.bench.add("Mul", [signal.value, constant], {}, step.node))


def _shifted_by(tr: Translator, signal: Signal, k: np.ndarray, step: Step) -> Signal | None:
    """Adds constants of the codes' grid, else None."""
    tensor = tr.type(signal)
    unit = np.ldexp(signal.factor.astype(np.float64).reshape(-1), -np.asarray(tensor.format.fracs, np.int64))
    codes = k / unit
    whole = np.rint(codes)
    if (whole * unit != k).any() or np.abs(whole).max() >= 1 << 31 or tensor.format.per_channel:
        return None
    fmt = accumulator(int(whole.min()), int(whole.max()), tensor.format.fracs)
    rank = len(tensor.shape)
    laid = whole.astype(np.int64).reshape((-1,) + (1,) * (rank - 2)) if whole.size > 1 else whole.astype(np.int64)
    constant = tr.bench.literal(laid, fmt, f"{step.node}_constant")
    return replace(signal, value=tr.bench.add("Add", [signal.value, constant], {}, step.node))


def _clipped(tr: Translator, signal: Signal, step: Step) -> Signal | None:
    """Clips to limits that are codes, else None."""
    tensor = tr.type(signal)
    unit = float(np.ldexp(float(signal.factor), -tensor.format.fracs[0]))
    limits = []
    for index, key, default in ((1, "min", tensor.lo), (2, "max", tensor.hi)):
        limit = float(step.attributes.get(key, step.constant(index)))
        code = default if np.isnan(limit) or np.isinf(limit) else limit / unit
        if code != np.rint(code):
            return None
        limits.append(int(code))
    attrs = {"low": limits[0], "high": limits[1]}
    return replace(signal, value=tr.bench.add("Clip", [signal.value], attrs, step.node))


def grid_of(array: np.ndarray, width: int = 16) -> tuple[np.ndarray, Fixed] | None:
    """Float constants as codes of the coarsest binary grid that holds them all, in at most `width` bits; else None."""
    values = np.asarray(array, np.float64)
    if not np.isfinite(values).all() or values.size == 0:
        return None
    if not values.any():
        return np.zeros(values.shape, np.int64), Fixed(1, 1)
    mantissa, exponent = np.frexp(values[values != 0])
    trailing = np.array([(int(m) & -int(m)).bit_length() - 1 for m in np.abs(np.ldexp(mantissa, 53)).astype(np.int64)])
    frac = int((53 - exponent - trailing).max())
    codes = np.ldexp(values, frac)
    if np.abs(codes).max() >= 1 << width:
        return None
    exact = codes.astype(np.int64)
    fmt = accumulator(int(exact.min()), int(exact.max()), (frac,))
    return (exact, fmt) if fmt.width <= width else None
