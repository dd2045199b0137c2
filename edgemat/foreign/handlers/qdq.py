"""QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from edgemat.foreign.handlers.qonnx import channel_axis
from edgemat.foreign.quantisers import onnx_quantiser
from edgemat.foreign.settling import settled
from edgemat.foreign.signals import Gathered, Joined, Known, Raw, Signal
from edgemat.foreign.translator import Handler, Translator
from edgemat.formats import Fixed


def quantize_linear(tr: Translator, node: ir.Node) -> None:
    """y = saturate(round_half_even(x / scale) + zero_point)."""
    scale, zero = tr.known(node, 1).array, tr.optional(node, 2)
    if zero is None and tr.integer(node, "output_dtype"):
        kind = _STORED.get(tr.integer(node, "output_dtype"))
        if kind is None:
            raise tr.refuse(node, "an output_dtype that is no integer of 8 or 16 bits", "quantise to int8 or uint8")
        zero = np.zeros((), kind)
    quantity = tr.quantity(node, 0)
    quantiser = onnx_quantiser(scale, zero)
    if isinstance(quantity, Known):
        axis = tr.integer(node, "axis", 1)
        spread = _along(tr, node, scale, quantity.array, axis)
        codes = quantiser.round(np.asarray(quantity.array, np.float32) / spread)
        stored = (codes + quantiser.zero_point).astype(np.uint8 if zero is None else zero.dtype)
        tr.set(node, Known(stored))
        return
    if not isinstance(quantity, (Raw, Signal, Joined, Gathered)):
        raise tr.refuse(node, "its input is nothing that can be quantised", "expected data or a constant")
    if scale.size > 1:
        shape = () if not isinstance(quantity, Signal) else tr.shape(quantity)
        axis = tr.integer(node, "axis", 1) % max(len(shape), 1)
        channel_axis(tr, node, quantity, scale.reshape([-1 if i == axis else 1 for i in range(len(shape))]))
    if zero is None or zero.dtype == np.uint8:
        quantiser = replace(quantiser, style=style(node.inputs[0]))
    made = tr.quantised(node, quantity, quantiser)
    tr.set(node, replace(made, zero=quantiser.zero_point))


_STORED = {2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16}
"""Integers of QuantizeLinear by their number in ONNX."""

STORED_TIES = ("Add", "Mul", "AveragePool")
"""Operators whose 8-bit kernels in onnxruntime round ``x / scale + zero_point``: a tie goes to the even stored integer.
QuantizeLinear by itself, and the kernels of Conv, Gemm and MatMul, round before they add the zero point."""


def style(value: ir.Value | None) -> str:
    """How a quantiser to uint8 rounds ties: as the kernel does that takes its operator over.

    onnxruntime replaces DequantizeLinear, operator, QuantizeLinear (and a ReLU before the last) by one kernel; for int8
    it does so on Arm only, and what the nodes say by themselves holds.
    """
    producer = None if value is None else value.producer()
    while producer is not None and producer.op_type in ("Relu", "Clip") and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    if producer is None or producer.op_type not in STORED_TIES:
        return "onnx"
    sources = [value.producer() for value in producer.inputs if value is not None]
    fused = all(source is not None and source.op_type == "DequantizeLinear" for source in sources)
    return "stored" if fused else "onnx"


def dequantize_linear(tr: Translator, node: ir.Node) -> None:
    """y = (x - zero_point) * scale."""
    scale, zero = tr.known(node, 1).array, tr.optional(node, 2)
    quantity = tr.quantity(node, 0)
    axis = tr.integer(node, "axis", 1)
    if tr.integer(node, "block_size"):
        raise tr.refuse(node, "scales by block", "quantise by tensor or by channel")
    if isinstance(quantity, Known):
        tr.set(node, dequantised_constant(tr, node, quantity.array, scale, zero, axis))
        return
    if not isinstance(quantity, Signal) or quantity.zero is None:
        raise tr.refuse(node, "its input is no stored integer", "expected the output of a QuantizeLinear")
    points = np.unique(np.zeros(1, np.int64) if zero is None else zero)
    if scale.size > 1 or points.size > 1:
        raise tr.refuse(node, "data with scales or zero points by channel", "quantise activations by tensor")
    if not np.isfinite(scale).all() or not (scale > 0).all():
        raise tr.refuse(node, f"the scale {scale.reshape(-1)[0]}", "expected a positive number")
    real = reinterpreted(tr, node, quantity, np.asarray(scale, np.float32).reshape(()), int(points[0]))
    tr.set(node, real)


def reinterpreted(tr: Translator, node: ir.Node, signal: Signal, scale: np.ndarray, zero: int) -> Signal:
    """Stored integers read with a scale and zero point, which may differ from what they were written with."""
    assert signal.zero is not None
    before = tr.type(signal).format
    real = np.ldexp(float(signal.factor), -before.fracs[0]) if signal.factor.size == 1 and not before.per_channel else 0
    if real == float(scale) and signal.zero == zero:
        return replace(signal, zero=None, point=zero)
    if before.per_channel or before.bipolar or signal.chain:
        raise tr.refuse(node, "integers read with another scale than they were written with", "use the same scale")
    moved = signal
    if signal.zero != zero:
        fmt = Fixed(34, 34).with_frac(before.fracs[0])
        constant = tr.bench.literal(np.array([signal.zero - zero]), fmt, f"{tr.label(node)}_zero")
        value = tr.bench.add("Add", [signal.value, constant], {}, tr.label(node))
        moved = settled(tr, node, replace(signal, value=value))
    return replace(moved, factor=np.asarray(np.ldexp(float(scale), before.fracs[0]), np.float32), zero=None, point=zero)


def dequantised_constant(
    tr: Translator, node: ir.Node, stored: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, axis: int
) -> Known:
    """Integers, scales and real values of stored weights.

    Raises:
        LoweringError: if they are no integers, or the scales do not match.
    """
    if stored.dtype.kind not in "iu":
        raise tr.refuse(node, f"a constant of type {stored.dtype}", "expected integers")
    if not np.isfinite(scale).all() or not (scale > 0).all():
        raise tr.refuse(node, "a scale that is no positive number", "calibrate the model again")
    spread = _along(tr, node, np.asarray(scale, np.float32), stored, axis)
    points = np.zeros(1, np.int64) if zero is None else np.asarray(zero, np.int64)
    codes = stored.astype(np.int64) - _along(tr, node, points, stored, axis)
    info = np.iinfo(stored.dtype)
    rails = (int(info.min) - int(points.max()), int(info.max) - int(points.min()))
    if stored.dtype.itemsize > 2:
        rails = (int(codes.min(initial=0)), int(codes.max(initial=0)))
    return Known((codes * spread).astype(np.float32), codes, np.array(np.broadcast_to(spread, codes.shape)), rails)


def _along(tr: Translator, node: ir.Node, values: np.ndarray, data: np.ndarray, axis: int) -> np.ndarray:
    if values.size == 1:
        return values.reshape(())
    axis = axis % max(data.ndim, 1)
    if data.ndim == 0 or values.ndim != 1 or values.size != data.shape[axis]:
        raise tr.refuse(node, f"{values.size} scales for data {data.shape}", f"expected one, or one for axis {axis}")
    return values.reshape([-1 if i == axis else 1 for i in range(data.ndim)])


HANDLERS: dict[tuple[str, str], Handler] = {
    ("", "QuantizeLinear"): quantize_linear,
    ("", "DequantizeLinear"): dequantize_linear,
    ("com.microsoft", "QuantizeLinear"): quantize_linear,
    ("com.microsoft", "DequantizeLinear"): dequantize_linear,
}
