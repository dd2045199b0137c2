"""Element-wise operators of one variable: steps of a chain, compiled where a quantiser ends it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from edgemat.foreign.chains import CURVES, MONOTONE
from edgemat.foreign.handlers.weighted import with_bias
from edgemat.foreign.joins import joined
from edgemat.foreign.settling import laid_out
from edgemat.foreign.signals import Gathered, Joined, Known, Raw, Signal
from edgemat.foreign.translator import Handler, Translator


def step(tr: Translator, node: ir.Node) -> None:
    """Any element-wise operator whose other inputs are constants."""
    variable = [i for i, v in enumerate(node.inputs) if v is not None and not isinstance(tr.values[v], Known)]
    if len(variable) != 1:
        joined(tr, node)
        return
    quantity = tr.quantity(node, variable[0])
    if isinstance(quantity, (Joined, Gathered)):
        tr.set(node, quantity.then(node))
        return
    if isinstance(quantity, Raw) and node.op_type in ("Relu", "Identity"):
        tr.set(node, replace(quantity, path=(*quantity.path, node)))
        return
    signal = tr.signal(node, variable[0])
    if signal.zero is not None:
        tr.set(node, _clipped_integers(tr, node, signal, variable[0]))
        return
    shape = tr.shape(signal)
    inputs: list[np.ndarray | str | None] = []
    axes: set[int] = set()
    for index, value in enumerate(node.inputs):
        known = None if value is None else tr.values[value]
        if index == variable[0]:
            inputs.append(None)
        elif isinstance(known, Known):
            flat, axis = _by_channel(tr, node, known.array, shape)
            axes |= {axis} if axis is not None else set()
            inputs.append(flat)
        else:
            inputs.append("")
    if axes:
        signal = channels_first(tr, node, signal, axes)
    if node.op_type == "Add" and not signal.chain:
        biased = with_bias(tr, node, signal, next(v for v in inputs if isinstance(v, np.ndarray)))
        if biased is not None:
            tr.set(node, biased)
            return
    tr.step(node, signal, tuple(inputs))


def _clipped_integers(tr: Translator, node: ir.Node, signal: Signal, variable: int) -> Signal:
    """Clip of stored integers: how Brevitas' QCDQ files state fewer than 8 bits.

    Raises:
        LoweringError: for other arithmetic on stored integers.
    """
    fracs = set(tr.type(signal).format.fracs)
    if node.op_type != "Clip" or variable or signal.chain or len(fracs) > 1 or signal.zero is None:
        raise tr.refuse(node, "arithmetic on stored integers", "dequantise them first")
    tensor = tr.type(signal)
    limits = []
    for index, key, default in ((1, "min", tensor.lo), (2, "max", tensor.hi)):
        given = tr.optional(node, index) if len(node.inputs) > index else None
        stated = None if given is None else float(np.asarray(given).reshape(-1)[0])
        stated = tr.real(node, key, np.nan) if stated is None and tr.states(node, key) else stated
        if stated is not None and stated != int(stated):
            raise tr.refuse(node, f"the limit {stated} for integers", "expected an integer")
        limits.append(default if stated is None else int(stated) - signal.zero)
    if limits[0] > limits[1]:
        raise tr.refuse(node, f"limits {limits}", "expected min below max")
    if limits[0] <= tensor.lo and tensor.hi <= limits[1]:
        return signal
    made = tr.bench.add("Clip", [signal.value], {"low": limits[0], "high": limits[1]}, tr.label(node))
    return replace(signal, value=made)


def _by_channel(
    tr: Translator, node: ir.Node, array: np.ndarray, shape: tuple[int | None, ...]
) -> tuple[np.ndarray, int | None]:
    """A constant as a scalar or one number for each entry of an axis of the file's tensor."""
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise tr.refuse(node, "a constant that is NaN", "train again, or load the right checkpoint")
    if array.size == 0:
        raise tr.refuse(node, "an empty constant", "expected numbers")
    if node.op_type in ("BatchNormalization",):
        return array.reshape(-1), 1 if array.size > 1 else None
    flat = array.reshape(-1)
    if (flat == flat[0]).all():
        return flat[:1].reshape(()), None
    padded = (1,) * (len(shape) - array.ndim) + array.shape
    wide = [axis for axis, size in enumerate(padded) if size > 1]
    if array.ndim > len(shape) or len(wide) != 1 or wide[0] == 0 or padded[wide[0]] != shape[wide[0]]:
        raise tr.refuse(
            node,
            f"a constant of shape {array.shape} for data {tuple('N' if d is None else d for d in shape)}",
            "expected one number, or one for each entry of one axis behind the batch",
        )
    return flat, wide[0]


def channels_first(tr: Translator, node: ir.Node, signal: Signal, axes: set[int]) -> Signal:
    """The signal with the axis along which constants differ as axis 1 of the built tensor."""
    order = signal.order(len(tr.type(signal).shape))
    if len(axes) > 1:
        raise tr.refuse(node, "constants that differ along two axes", "use one axis")
    axis = next(iter(axes))
    if order[axis] == 1:
        return signal
    plain = laid_out(tr, node, signal)
    if plain.chain.channels > 1 or plain.factor.size > 1 or tr.type(plain).format.per_channel:
        raise tr.refuse(node, "constants along two different axes", "quantise in between")
    rank = len(order)
    moved = [axis, *(i for i in range(1, rank) if i != axis)]
    made = tr.bench.add("Transpose", [plain.value], {"perm": tuple(i - 1 for i in moved)}, f"{tr.label(node)}_layout")
    back = [0] * rank
    for place, source in enumerate([0, *moved]):
        back[source] = place
    return replace(plain, value=made, perm=tuple(back))


def identity(tr: Translator, node: ir.Node) -> None:
    """Identity and Dropout at inference."""
    quantity = tr.quantity(node, 0)
    assert quantity is not None
    if isinstance(quantity, Raw):
        quantity = replace(quantity, path=(*quantity.path, node))
    tr.set(node, quantity)


def cast(tr: Translator, node: ir.Node) -> None:
    """Casts of codes: between float types nothing happens; to integers, the fraction goes (a step of the chain)."""
    quantity = tr.quantity(node, 0)
    if isinstance(quantity, Signal) and quantity.zero is None:
        tr.step(node, quantity, (None,))
    else:
        identity(tr, node)


def cast_like(tr: Translator, node: ir.Node) -> None:
    """CastLike between real numbers: nothing happens to data, and a constant becomes float32.

    Raises:
        LoweringError: where either of them is an integer type.
    """
    first, second = (tr.quantity(node, index) for index in range(2))
    for quantity in (first, second):
        known_integers = isinstance(quantity, Known) and quantity.array.dtype.kind != "f"
        if known_integers or (isinstance(quantity, Signal) and quantity.zero is not None):
            raise tr.refuse(node, "a cast from or to integers", "cast with Cast")
    if isinstance(first, Known):
        tr.set(node, replace(first, array=first.array.astype(np.float32)))
    else:
        identity(tr, node)


_STEPS = [op for op in (*MONOTONE, *CURVES) if op not in ("Identity", "Cast")]

HANDLERS: dict[tuple[str, str], Handler] = {
    **{("", op): step for op in _STEPS},
    ("", "Identity"): identity,
    ("", "Dropout"): identity,
    ("", "Cast"): cast,
    ("", "CastLike"): cast_like,
}
