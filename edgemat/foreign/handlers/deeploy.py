"""QuantLab's and Deeploy's RequantShift (domains ``""`` and ``PACTOps``): a requantisation stated in integers.

``y = clip(floor((x * mul + add + div / 2) / div))``, `div` a power of two, `mul` and `add` integers by tensor or by
channel; n levels from -n/2 (signed) or from 0. So do the kernels of https://github.com/pulp-platform/Deeploy
(TargetLibraries/Generic/src/RequantShift_s8.c, with rounding), as long as their 32-bit sum does not overflow; here it
cannot.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgemat.foreign.quantisers import Quantiser
from edgemat.foreign.requantisers import clipped
from edgemat.foreign.settling import settled
from edgemat.foreign.signals import Signal
from edgemat.foreign.translator import Handler, Translator
from edgemat.formats import Fixed

ONE = np.ones((), np.float32)
MAX_SHIFT = 31


def requant_shift(tr: Translator, node: ir.Node) -> None:
    """RequantShift: x, mul, add; attributes div, n_levels or n_levels_out, signed.

    Raises:
        LoweringError: for a `div` that is no power of two, fractions, or data that is no integer.
    """
    x = settled(tr, node, tr.signal(node))
    tensor = tr.type(x)
    if not x.exact or tensor.format.fracs != (0,) or tensor.format.bipolar:
        raise tr.refuse(node, f"data in {tensor.format} at a scale of {x.factor}", "expected plain integers")
    div, levels, signed = (
        number(tr, node, "div"),
        number(tr, node, "n_levels_out", "n_levels"),
        number(tr, node, "signed"),
    )
    shift = div.bit_length() - 1
    if div < 1 or div != 1 << shift or shift > MAX_SHIFT:
        raise tr.refuse(node, f"a division by {div}", f"expected a power of two up to {1 << MAX_SHIFT}")
    if not 2 <= levels <= 1 << 24 or signed not in (0, 1):
        raise tr.refuse(node, f"{levels} levels, signed {signed}", "expected 2 to 2**24 levels, signed 0 or 1")
    low = -(levels // 2) if signed else 0
    quantiser = Quantiser(ONE, 0, low, low + levels - 1)
    channels = int(tensor.shape[1] or 1) if len(tensor.shape) > 1 else 1
    mul, add = (by_channel(tr, node, index, len(tensor.shape), channels) for index in (1, 2))
    name = tr.label(node)
    width = max(max(abs(int(v)).bit_length() for v in mul.tolist()) + 1, 2)
    w_format, b_format = Fixed(width, width).with_frac(shift), Fixed(32, 32).with_frac(shift)
    inputs = [x.value, tr.bench.codes(mul, w_format, f"{name}_mul"), tr.bench.codes(add, b_format, f"{name}_add")]
    attrs = {"w_format": str(w_format), "b_format": str(b_format)}
    scaled = tr.bench.add("Affine", inputs, attrs, f"{name}_scale")
    target = Fixed.parse(str(quantiser.format).replace("RND_CONV", "RND"))
    value = clipped(tr.bench, tr.bench.requantised(scaled, target, name), quantiser, name)
    tr.set(node, Signal(value, ONE))
    tr.note(node, f"the file's multiplier of {width} bits, shift {shift}")


def number(tr: Translator, node: ir.Node, *keys: str) -> int:
    """An integer attribute under the first of these names that the node has, written as a number or as a tensor."""
    for key in keys:
        attr = node.attributes.get(key)
        if attr is None:
            continue
        value = attr.value.numpy() if attr.type == ir.AttributeType.TENSOR else attr.value
        array = np.asarray(value)
        if array.size == 1 and array.dtype.kind in "iuf" and array.reshape(()) == np.rint(array.reshape(())):
            return int(array.reshape(()))
        raise tr.refuse(node, f"attribute {key!r} is {str(value)[:40]!r}", "expected one integer")
    raise tr.refuse(node, f"no attribute {keys[0]!r}", "expected one integer")


def by_channel(tr: Translator, node: ir.Node, index: int, rank: int, channels: int) -> np.ndarray:
    """A constant of integers as int64 [C]."""
    array = np.asarray(tr.known(node, index).array)
    padded = (1,) * (rank - array.ndim) + array.shape
    wide = [axis for axis, size in enumerate(padded) if size > 1]
    if array.size not in (1, channels) or len(padded) != rank or wide not in ([], [1]):
        raise tr.refuse(node, f"a constant of shape {array.shape} for {channels} channels", "expected one by channel")
    if array.dtype.kind not in "iuf" or not np.isfinite(array).all() or (array != np.rint(array)).any():
        raise tr.refuse(node, f"input {index} has fractions", "expected integers")
    if np.abs(array.astype(np.float64)).max() >= 1 << 31:
        raise tr.refuse(node, f"input {index} has integers of more than 32 bits", "expected 32 bits")
    return np.broadcast_to(array.reshape(-1).astype(np.int64), (channels,)).copy()


HANDLERS: dict[tuple[str, str], Handler] = {(domain, "RequantShift"): requant_shift for domain in ("", "PACTOps")}
