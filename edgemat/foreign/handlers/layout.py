"""Operators that move elements: Transpose, Reshape and its kin, Slice, Split, Gather, Pad, Resize."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from edgemat.foreign.settling import laid_out, settled
from edgemat.foreign.signals import Gathered, Joined, Known, Raw, Signal
from edgemat.foreign.translator import Handler, Translator
from edgemat.lower import standard


def passes_raw(handler: Handler) -> Handler:
    """What is not quantised yet goes through, a float input or a real sum: the node is repeated on its codes."""

    def taken(tr: Translator, node: ir.Node) -> None:
        quantity = tr.quantity(node, 0)
        if isinstance(quantity, Raw):
            tr.set(node, replace(quantity, path=(*quantity.path, node)))
        elif isinstance(quantity, (Joined, Gathered)):
            tr.set(node, quantity.then(node))
        else:
            handler(tr, node)

    return taken


def transpose(tr: Translator, node: ir.Node) -> None:
    """Permutations that keep the batch first; nothing moves until somebody asks."""
    signal = tr.signal(node)
    rank = len(tr.type(signal).shape)
    perm = tr.integers(node, "perm", tuple(reversed(range(rank))))
    if sorted(perm) != list(range(rank)) or perm[0] != 0:
        raise tr.refuse(node, f"perm {perm} of {rank} axes moves the batch", "keep axis 0 in its place")
    order = signal.order(rank)
    tr.set(node, replace(signal, perm=tuple(order[p] for p in perm)))


def reshape(tr: Translator, node: ir.Node) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze: the batch stays on axis 0."""
    signal = laid_out(tr, node, tr.signal(node))
    source = tr.type(signal)
    target = _target(tr, node, [1, *source.sample_shape])
    if int(np.prod(target, dtype=np.int64)) != source.size:
        raise tr.refuse(node, f"{source.shape} to {target} a sample", "keep the batch on axis 0")
    kept = target[:1] == source.sample_shape[:1]
    if not kept and (signal.chain.channels > 1 or signal.factor.size > 1):
        signal = laid_out(tr, node, settled(tr, node, signal, scalar=False))
        if signal.factor.size > 1:
            raise tr.refuse(node, "channels with real scales of their own lose their axis", "quantise before")
    made = tr.bench.add("Reshape", [signal.value], {"shape": target}, tr.label(node))
    tr.set(node, replace(signal, value=made))


def _target(tr: Translator, node: ir.Node, shape: list[int]) -> tuple[int, ...]:
    """The sample's shape behind the node, for a batch of one."""
    size, rank = int(np.prod(shape)), len(shape)
    if node.op_type == "Flatten":
        axis = tr.integer(node, "axis", 1)
        if axis % max(rank, 1) != 1:
            raise tr.refuse(node, f"flattening from axis {axis}", "flatten behind the batch (axis 1)")
        return (size,)
    if node.op_type == "Reshape":
        stated = tr.integers(node, "shape") if len(node.inputs) < 2 else tr.known(node, 1).array.reshape(-1).tolist()
        dims = [int(d) for d in stated]
        zero_copies = not tr.integer(node, "allowzero")
        dims = [shape[i] if d == 0 and zero_copies and i < rank else d for i, d in enumerate(dims)]
        if len(dims) < 2:
            raise tr.refuse(node, f"a reshape to {dims}", "keep the batch on axis 0 and at least one axis behind it")
        rest = dims[1:]
        if rest.count(-1) == 1:
            known = int(np.prod([d for d in rest if d != -1], dtype=np.int64))
            rest = [size // max(known, 1) if d == -1 else d for d in rest]
        return tuple(rest)
    axes = tr.axes(node)
    if node.op_type == "Squeeze":
        chosen = [int(a) % rank for a in axes]
        chosen = chosen or [i for i, d in enumerate(shape) if d == 1 and i > 0]
        if 0 in chosen or any(shape[i] != 1 for i in chosen):
            raise tr.refuse(node, f"squeezing axes {chosen} of {shape}", "squeeze axes of size 1 behind the batch")
        return tuple(d for i, d in enumerate(shape) if i > 0 and i not in chosen)
    chosen = [int(a) for a in axes]
    full = rank + len(chosen)
    places = sorted(a % full for a in chosen)
    if not places or 0 in places:
        raise tr.refuse(node, f"new axes {chosen}", "add axes behind the batch")
    for place in places:
        shape = [*shape[:place], 1, *shape[place:]]
    return tuple(shape[1:])


def shape(tr: Translator, node: ir.Node) -> None:
    """The shape of a tensor, for a batch of one: what reshapes are computed from."""
    quantity = tr.quantity(node, 0)
    if isinstance(quantity, Raw):
        if quantity.path:
            raise tr.refuse(node, "the shape of a float tensor behind other nodes", "fold the constants of the file")
        dims = [1, *list(quantity.source.shape or ())[1:]]
    else:
        dims = [1 if d is None else d for d in tr.shape(tr.signal(node))]
    start, end = tr.integer(node, "start"), tr.integer(node, "end", len(dims))
    tr.set(node, Known(np.asarray(dims, np.int64)[start:end]))


def delegated(tr: Translator, node: ir.Node) -> None:
    """Slice, Split, Gather, ArgMax: as in files from torch, on codes."""
    signal = settled(tr, node, tr.signal(node), scalar=False)
    if signal.factor.size > 1:
        signal = settled(tr, node, signal)
    source = node.inputs[0]
    assert source is not None
    tr.bench.alias(source, signal.value)
    known = {v: tr.values[v] for v in node.inputs if v is not None}
    tr.bench.constants = {v: found.array for v, found in known.items() if isinstance(found, Known)}
    standard.HANDLERS[node.op_type](tr.bench, node)
    for value in node.outputs:
        if node.op_type == "ArgMax":
            tr.values[value] = Signal(tr.bench.mapped(value), np.ones((), np.float32))
        elif tr.bench.has(value):
            tr.values[value] = replace(signal, value=tr.bench.mapped(value))


def pad(tr: Translator, node: ir.Node) -> None:
    """Padding with the real number 0, or with a stored integer; pads as an input, or as an attribute before operator
    set 11."""
    signal = settled(tr, node, tr.signal(node), scalar=False)
    mode = tr.text(node, "mode", "constant")
    value = tr.optional(node, 2) if len(node.inputs) > 2 else None
    filled = tr.real(node, "value", 0.0) if value is None else float(np.asarray(value).reshape(-1)[0])
    code = filled - (signal.zero or 0)
    if mode != "constant" or (
        filled != 0 if signal.zero is None else not tr.type(signal).lo <= code <= tr.type(signal).hi
    ):
        raise tr.refuse(node, f"{mode} padding with {filled}", "pad with the real number 0")
    rank = len(tr.type(signal).shape)
    given = tr.known(node, 1).array.reshape(-1).tolist() if len(node.inputs) > 1 else tr.integers(node, "pads")
    chosen = tr.optional(node, 3) if len(node.inputs) > 3 else None
    axes = list(range(rank)) if chosen is None else [int(a) % rank for a in chosen.reshape(-1).tolist()]
    if len(given) != 2 * len(axes) or any(int(p) < 0 for p in given):
        raise tr.refuse(node, f"pads {given}", f"expected {2 * len(axes)} numbers, none negative")
    before, after = [0] * rank, [0] * rank
    for place, axis in enumerate(axes):
        before[axis], after[axis] = int(given[place]), int(given[place + len(axes)])
    if before[0] or after[0]:
        raise tr.refuse(node, "padding of the batch", "pad samples")
    if any(before) or any(after):
        attrs = {"before": tuple(before[1:]), "after": tuple(after[1:]), "value": int(code)}
        signal = replace(signal, value=tr.bench.add("Pad", [signal.value], attrs, tr.label(node)))
    tr.set(node, signal)


def resize(tr: Translator, node: ir.Node) -> None:
    """Nearest Resize and Upsample by whole factors, where they repeat elements; whatever is pending stays so."""
    signal = tr.signal(node)
    mode, shape = tr.text(node, "mode", "nearest"), tr.shape(signal)
    if mode != "nearest":
        raise tr.refuse(node, f"mode {mode!r}", "only nearest is exact")
    if tr.states(node, "axes"):
        raise tr.refuse(node, "chosen axes", "state a scale for each axis")
    legacy = len(node.inputs) == 2
    scales = tr.optional(node, 1 if legacy else 2)
    sizes = tr.optional(node, 3) if len(node.inputs) > 3 else None
    if tr.states(node, "scales"):
        scales = np.asarray(node.attributes["scales"].value)
    if sizes is not None and sizes.size == len(shape):
        wanted = [float(size) / (known or 1) for size, known in zip(sizes.tolist(), shape, strict=True)]
        wanted[0] = 1.0
    else:
        wanted = [] if scales is None else [float(s) for s in scales.reshape(-1).tolist()]
    if len(wanted) != len(shape) or wanted[0] != 1 or any(s < 1 or s != int(s) for s in wanted):
        raise tr.refuse(node, f"scales {wanted} of {shape}", "enlarge by whole factors behind the batch")
    factors = [int(s) for s in wanted]
    for size, factor in zip(shape[1:], factors[1:], strict=True):
        if (
            not legacy
            and (_picked(tr, node, int(size or 1), factor) != np.arange(int(size or 1) * factor) // factor).any()
        ):
            raise tr.refuse(node, f"factor {factor} that does not repeat elements", "use asymmetric and floor")
    order = signal.order(len(shape))
    built = [factors[order.index(axis)] for axis in range(len(shape))]
    if built[1] != 1:
        signal, built = laid_out(tr, node, signal), factors
    if built[1] != 1 or len(built) < 3:
        raise tr.refuse(node, f"scales {factors} of {shape}", "enlarge spatial axes only")
    made = tr.bench.add("Upsample", [signal.value], {"scales": tuple(built[2:])}, tr.label(node))
    tr.set(node, replace(signal, value=made))


def _picked(tr: Translator, node: ir.Node, size: int, factor: int) -> np.ndarray:
    """Which element each place behind a nearest Resize takes, by ONNX's formulas."""
    place = np.arange(size * factor).astype(np.float64)
    coordinates = tr.text(node, "coordinate_transformation_mode", "half_pixel")
    x: np.ndarray
    if coordinates == "asymmetric":
        x = place / factor
    elif coordinates in ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric"):
        x = (place + 0.5) / factor - 0.5 if size * factor > 1 else place * 0.0
    elif coordinates == "tf_half_pixel_for_nn":
        x = (place + 0.5) / factor
    elif coordinates == "align_corners":
        x = place * ((size - 1) / max(size * factor - 1, 1))
    else:
        raise tr.refuse(node, f"coordinates by {coordinates!r}", "use asymmetric and floor")
    nearest = tr.text(node, "nearest_mode", "round_prefer_floor")
    rounds: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "floor": np.floor,
        "ceil": np.ceil,
        "round_prefer_floor": lambda v: np.ceil(v - 0.5),
        "round_prefer_ceil": lambda v: np.floor(v + 0.5),
    }
    if nearest not in rounds:
        raise tr.refuse(node, f"rounding by {nearest!r}", "use asymmetric and floor")
    return np.clip(rounds[nearest](x), 0, size - 1).astype(np.int64)


HANDLERS: dict[tuple[str, str], Handler] = {
    ("", "Shape"): shape,
    ("", "Transpose"): passes_raw(transpose),
    **{("", op): passes_raw(reshape) for op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze")},
    **{("", op): delegated for op in ("Split", "ArgMax")},
    **{("", op): passes_raw(delegated) for op in ("Slice", "Gather")},
    ("", "Pad"): passes_raw(pad),
    ("", "Resize"): passes_raw(resize),
    ("", "Upsample"): passes_raw(resize),
}
