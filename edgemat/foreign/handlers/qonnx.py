"""QONNX's quantisers (Brevitas, QKeras, HAWQ): domains ``qonnx.custom_op.general``, ``finn.custom_op.general``,
``onnx.brevitas``."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgemat.foreign.quantisers import Quantiser, qonnx_quantiser
from edgemat.foreign.signals import Gathered, Joined, Known, Raw, Signal
from edgemat.foreign.translator import Handler, Translator

DOMAINS = ("qonnx.custom_op.general", "finn.custom_op.general", "onnx.brevitas", "qonnx.custom_op.brevitas")


def quant(tr: Translator, node: ir.Node) -> None:
    """Quant (IntQuant): x, scale, zero point, bit width; attributes signed, narrow, rounding_mode."""
    scale, zero, bits = (tr.known(node, index).array for index in (1, 2, 3))
    signed, narrow = bool(tr.integer(node, "signed", 1)), bool(tr.integer(node, "narrow", 0))
    rounding = tr.text(node, "rounding_mode", "ROUND")
    _finish(tr, node, lambda array: qonnx_quantiser(array, zero, bits, signed, narrow, rounding), scale)


def bipolar_quant(tr: Translator, node: ir.Node) -> None:
    """BipolarQuant: x >= 0 gives +scale, else -scale."""
    scale = tr.known(node, 1).array
    _finish(tr, node, lambda array: Quantiser(_flat(array), 0, -1, 1, "ROUND", "qonnx", True), scale)


def _flat(scale: np.ndarray) -> np.ndarray:
    array = np.asarray(scale, np.float32)
    return array.reshape(()) if array.size == 1 else array.reshape(-1)


def _finish(tr: Translator, node: ir.Node, make, scale: np.ndarray) -> None:  # type: ignore[no-untyped-def]
    quantity = tr.quantity(node, 0)
    if isinstance(quantity, Known):
        tr.set(node, quantised_constant(tr, node, quantity, make(scale), scale))
        return
    if isinstance(quantity, (Raw, Signal, Joined, Gathered)):
        channel_axis(tr, node, quantity, scale)
        tr.set(node, tr.quantised(node, quantity, make(scale)))
        return
    raise tr.refuse(node, "its input is nothing that can be quantised", "expected data or a constant")


def channel_axis(tr: Translator, node: ir.Node, quantity: object, scale: np.ndarray) -> None:
    """Refuses scales that differ along anything but axis 1 of the built tensor."""
    if scale.size == 1:
        return
    if not isinstance(quantity, Signal):
        raise tr.refuse(node, f"scales of shape {scale.shape}", "use one scale")
    shape = tr.shape(quantity)
    padded = (1,) * (len(shape) - scale.ndim) + scale.shape
    axes = [axis for axis, size in enumerate(padded) if size > 1]
    if len(padded) != len(shape) or len(axes) != 1 or quantity.order(len(shape))[axes[0]] != 1:
        raise tr.refuse(
            node, f"scales of shape {scale.shape} for data {shape}", "use one scale, or one for each channel"
        )


def quantised_constant(tr: Translator, node: ir.Node, known: Known, quantiser: Quantiser, scale: np.ndarray) -> Known:
    """The integers a quantiser makes of a constant, scale by scale."""
    array = np.asarray(known.array, np.float32)
    if np.isnan(array).any():
        raise tr.refuse(node, "its constant holds NaN", "train again, or load the right checkpoint")
    scales = np.asarray(scale, np.float32)
    try:
        spread = np.broadcast_to(scales.reshape(()) if scales.size == 1 else scales, array.shape)
    except ValueError:
        raise tr.refuse(node, f"scales of shape {scales.shape} for {array.shape}", "expected one by channel") from None
    codes = quantiser.round(array / spread)
    return Known((codes * spread).astype(np.float32), codes, spread, (quantiser.low, quantiser.high))


HANDLERS: dict[tuple[str, str], Handler] = {
    (domain, op): handler
    for domain in DOMAINS
    for op, handler in (("Quant", quant), ("IntQuant", quant), ("BipolarQuant", bipolar_quant))
}
