"""Conv, ConvTranspose, Gemm and MatMul with constant weights: exact integer accumulators."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgemat.errors import FormatError
from edgemat.foreign.chains import Step
from edgemat.foreign.padding import same_pads
from edgemat.foreign.settling import grid_of, settled
from edgemat.foreign.signals import Known, Signal
from edgemat.foreign.translator import Handler, Translator
from edgemat.formats import BIPOLAR, Fixed, accumulator

MAX_WEIGHT_BITS = 16


@dataclass(frozen=True)
class Weights:
    """Integer weights and what they mean.

    Attributes:
        codes: int64, in the file's layout.
        format: Their format, binary points by output channel where all scales are powers of two.
        factor: float32 real value of 1.0 in `format`: () or [O].
    """

    codes: np.ndarray
    format: Fixed
    factor: np.ndarray


def weights_of(tr: Translator, node: ir.Node, known: Known, axis: int) -> Weights:
    """Weights as integers: those of a quantiser, or float constants that lie on a short binary grid.

    Raises:
        LoweringError: for float weights, or scales that differ inside an output channel.
    """
    if known.array.size == 0:
        raise tr.refuse(node, f"weights of shape {known.array.shape}", "every axis needs at least one element")
    if known.codes is None or known.scale is None:
        if known.array.dtype.kind in "iu":
            codes = known.array.astype(np.int64)
            return Weights(codes, accumulator(int(codes.min()), int(codes.max()), (0,)), np.ones((), np.float32))
        found = grid_of(known.array, MAX_WEIGHT_BITS)
        if found is None:
            raise tr.refuse(
                node,
                f"float weights of more than {MAX_WEIGHT_BITS} bits without a quantiser",
                "quantise the model first: edgemat.float_model makes torch layers of it, edgemat.ptq quantises those",
            )
        return Weights(*found, np.ones((), np.float32))
    scales = np.moveaxis(np.broadcast_to(known.scale, known.codes.shape), axis, 0)
    rows = scales.reshape(scales.shape[0], -1)
    if (rows != rows[:, :1]).any():
        raise tr.refuse(node, "weight scales that differ inside an output channel", "use one for each output channel")
    return Weights(known.codes, *placed(known, rows[:, 0]))


def placed(known: Known, scale: np.ndarray) -> tuple[Fixed, np.ndarray]:
    """Format and factor of weights whose output channels have these float32 scales."""
    assert known.codes is not None
    low, high = known.rails
    low, high = min(low, int(known.codes.min())), max(high, int(known.codes.max()))
    scale = scale[:1] if (scale == scale[0]).all() else scale
    flat = scale.reshape(()) if scale.size == 1 else scale
    if (low, high) == (-1, 1) and known.codes.all():
        return BIPOLAR, np.asarray(flat, np.float32)
    fmt = accumulator(low, high, (0,))
    if low == -high:
        fmt = replace(fmt, overflow="SAT_SYM")
    mantissa, exponent = np.frexp(scale.astype(np.float64))
    if (mantissa != 0.5).any():
        return fmt, np.asarray(flat, np.float32)
    fracs = tuple(int(1 - e) for e in exponent)
    return fmt.with_frac(fracs[0] if len(fracs) == 1 else fracs), np.ones((), np.float32)


def conv(tr: Translator, node: ir.Node) -> None:
    """Conv, 1-D and 2-D, with groups and dilations."""
    x = settled(tr, node, tr.signal(node))
    weights = weights_of(tr, node, tr.known(node, 1), 0)
    attrs = window(tr, node, x, weights.codes.shape[2:])
    attrs["groups"] = tr.integer(node, "group", 1)
    written(tr, node, "Conv", x, weights, tr.quantity(node, 2), attrs)


def conv_transpose(tr: Translator, node: ir.Node) -> None:
    """ConvTranspose, 1-D and 2-D."""
    x = settled(tr, node, tr.signal(node))
    known = tr.known(node, 1)
    groups = tr.integer(node, "group", 1)
    weights = weights_of(tr, node, known, 1)
    if groups > 1 and (weights.factor.size > 1 or weights.format.per_channel):
        raise tr.refuse(node, "grouped weights with scales by channel", "use one scale for all of them")
    if tr.states(node, "output_shape"):
        raise tr.refuse(node, "a stated output_shape", "state pads and output_padding")
    if tr.text(node, "auto_pad", "NOTSET").startswith("SAME"):
        raise tr.refuse(node, f"auto_pad {tr.text(node, 'auto_pad')!r}", "give explicit pads")
    attrs = window(tr, node, x, weights.codes.shape[2:])
    rank = len(weights.codes.shape) - 2
    attrs["groups"] = groups
    attrs["output_padding"] = tr.integers(node, "output_padding", (0,) * rank)
    written(tr, node, "ConvTranspose", x, weights, tr.quantity(node, 2), attrs)


def window(tr: Translator, node: ir.Node, x: Signal, kernel: tuple[int, ...]) -> dict[str, Any]:
    """Strides, pads and dilations, automatic padding written out."""
    rank = len(kernel)
    shape = tr.type(x).sample_shape
    if len(shape) != rank + 1 or rank not in (1, 2):
        raise tr.refuse(node, f"a kernel {kernel} for data {shape}", "expected one or two spatial axes")
    strides = tr.integers(node, "strides", (1,) * rank)
    dilations = tr.integers(node, "dilations", (1,) * rank)
    pads = tr.integers(node, "pads", (0,) * 2 * rank)
    if len(strides) != rank or len(dilations) != rank or len(pads) != 2 * rank or min(*strides, *dilations) < 1:
        raise tr.refuse(node, f"strides {strides}, dilations {dilations}, pads {pads}", f"expected {rank} axes")
    auto = tr.text(node, "auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = same_pads(shape[1:], kernel, strides, dilations, auto == "SAME_UPPER")
    elif auto == "VALID":
        pads = (0,) * 2 * rank
    elif auto != "NOTSET":
        raise tr.refuse(node, f"auto_pad {auto!r}", "give explicit pads")
    return {"strides": strides, "pads": pads, "dilations": dilations}


def gemm(tr: Translator, node: ir.Node) -> None:
    """Gemm: a constant second matrix."""
    x = settled(tr, node, tr.signal(node))
    known = tr.known(node, 1)
    if tr.integer(node, "transA") or known.array.ndim != 2:
        raise tr.refuse(node, "a transposed first matrix", "expected data [N, I] times constant weights")
    if not tr.integer(node, "transB"):
        known = known.reshaped(np.transpose)
    alpha, beta = tr.real(node, "alpha", 1.0), tr.real(node, "beta", 1.0)
    if not alpha > 0:
        raise tr.refuse(node, f"alpha {alpha}", "expected a positive factor; multiply the weights by it")
    bias = tr.quantity(node, 2)
    if isinstance(bias, Known) and beta != 1:
        bias = Known(bias.array * np.float32(beta))
    weights = weights_of(tr, node, known, 0)
    if alpha != 1:
        weights = replace(weights, factor=(weights.factor * np.float32(alpha)).astype(np.float32))
    written(tr, node, "Linear", x, weights, bias, {})


def matmul(tr: Translator, node: ir.Node) -> None:
    """MatMul with constant weights, or of two tensors."""
    second = tr.quantity(node, 1)
    x = settled(tr, node, tr.signal(node))
    if isinstance(second, Signal):
        y = settled(tr, node, second)
        factor = np.asarray(x.factor * y.factor, np.float32)
        value = tr.bench.add("MatMul", [x.value, y.value], {}, tr.label(node))
        tr.set(node, Signal(value, factor, fused=tr.fuses(factor)))
        return
    known = tr.known(node, 1)
    if known.array.ndim != 2:
        raise tr.refuse(node, f"constant weights of shape {known.array.shape}", "expected a matrix [I, O]")
    written(tr, node, "Linear", x, weights_of(tr, node, known.reshaped(np.transpose), 0), None, {})


def written(
    tr: Translator, node: ir.Node, op: str, x: Signal, weights: Weights, bias: object, attrs: dict[str, Any]
) -> None:
    """Appends the operator; a bias off the accumulator's grid becomes part of the chain behind it."""
    if bias is not None and not isinstance(bias, Known):
        raise tr.refuse(node, "a bias that is computed at run time", "expected a constant")
    rank = len(tr.type(x).shape)
    last = op == "Linear" and rank > 2  # its output channels lie on the last axis
    factor = np.asarray(x.factor * weights.factor, np.float32)
    name = tr.label(node)
    outputs = weights.codes.shape[0] if op != "ConvTranspose" else weights.codes.shape[1] * attrs["groups"]
    inputs = [x.value, tr.bench.codes(weights.codes, weights.format, f"{name}_weights")]
    full = {**attrs, "w_format": str(weights.format)}
    stored = None if bias is None else bias_codes(tr, x, weights, bias, outputs, factor)
    if stored is not None:
        inputs.append(tr.bench.initializer(stored, np.dtype(np.int32), f"{name}_bias"))
        frac = np.asarray(tr.type(x).format.fracs[0] + np.asarray(weights.format.fracs))
        points = tuple(int(f) for f in frac)
        full["b_format"] = str(Fixed(32, 32).with_frac(points[0] if len(points) == 1 else points))
    value = tr.bench.add(op, inputs, full, name)
    perm = None
    if last and (factor.size > 1 or (bias is not None and stored is None)):
        value = tr.bench.add("Transpose", [value], {"perm": (rank - 2, *range(rank - 2))}, f"{name}_layout")
        perm = (0, *range(2, rank), 1)
    made = Signal(value, factor, perm=perm, fused=tr.fuses(factor))
    if bias is not None and stored is None:
        constant = np.asarray(bias.array, np.float32).reshape(-1)
        made = made.through(made.chain.then(Step(f"{name}_bias", "Add", {}, (None, constant)), tr.source.opset))
    tr.set(node, made)
    tr.note(node, f"weights {weights.format.width} bits" if not weights.format.bipolar else "weights -1 and +1")
    if made.fused and saturates(weights.codes):
        tr.note(node, "onnxruntime's kernels saturate here on x86 without VNNI, unless session.x64quantprecision is 1")


def saturates(codes: np.ndarray) -> bool:
    """Whether two products of such weights with unsigned bytes can leave 16 bits, where kernels add them in pairs."""
    rows = np.abs(codes.reshape(len(codes), -1))
    if rows.shape[1] < 2 or (codes.ndim > 2 and codes.shape[1] == 1):  # depthwise kernels add one by one
        return False
    largest = np.partition(rows, -2, axis=1)[:, -2:].sum(axis=1)
    return bool(codes.min() < 0 and (largest * 255 > 32767).any())


def bias_codes(
    tr: Translator, x: Signal, weights: Weights, bias: Known, outputs: int, factor: np.ndarray
) -> np.ndarray | None:
    """int64 [O] codes of a bias on the accumulator's grid, or None where it does not lie there."""
    array = np.asarray(bias.array, np.float64).reshape(-1)
    if array.size not in (1, outputs) or not np.isfinite(array).all():
        raise FormatError(f"a bias of {array.size} numbers for {outputs} outputs, or one that is no number")
    fracs = tr.type(x).format.fracs[0] + np.broadcast_to(np.asarray(weights.format.fracs), (outputs,))
    unit = np.ldexp(np.broadcast_to(factor.astype(np.float64).reshape(-1), (outputs,)), -fracs)
    codes = np.rint(array / unit)
    if bias.codes is not None and bias.scale is not None:
        scale = np.broadcast_to(np.asarray(bias.scale, np.float64).reshape(-1), array.shape)
        same = np.abs(scale / unit - 1) < 1e-5  # both are float32 products of the same two scales
        if same.all():
            codes = np.broadcast_to(bias.codes.reshape(-1), (outputs,)).astype(np.float64)
            return _held(codes)
    return _held(np.broadcast_to(codes, (outputs,))) if (codes * unit == array).all() else None


def with_bias(tr: Translator, node: ir.Node, signal: Signal, constant: np.ndarray) -> Signal | None:
    """The sums of a layer without a bias, computed with one; None where there is no such layer or the constant does not
    lie on the grid of its sums."""
    producer = signal.value.producer()
    rank = len(tr.type(signal).shape)
    last = producer is not None and producer.op_type == "Linear" and rank > 2
    if producer is None or producer.op_type not in ("Conv", "Linear") or len(producer.inputs) != 2 or last:
        return None
    tensor = tr.type(signal)
    outputs = int(tensor.shape[1] or 1)
    unit = np.ldexp(signal.factor.astype(np.float64).reshape(-1), -np.asarray(tensor.format.fracs, np.int64))
    values = np.asarray(constant, np.float64).reshape(-1)
    if values.size not in (1, outputs) or not np.isfinite(values).all():
        return None
    codes = np.rint(values / unit)
    held = _held(np.broadcast_to(codes, (outputs,))) if (codes * unit == values).all() else None
    if held is None:
        return None
    attrs = {key: attr.value for key, attr in producer.attributes.items()}
    points = tensor.format.fracs
    attrs["b_format"] = str(Fixed(32, 32).with_frac(points[0] if len(points) == 1 else points))
    attrs = {key: tuple(v) if isinstance(v, (list, tuple)) else v for key, v in attrs.items()}
    bias = tr.bench.initializer(held, np.dtype(np.int32), f"{tr.label(node)}_bias")
    inputs = [v for v in producer.inputs if v is not None]
    value = tr.bench.add(producer.op_type, [*inputs, bias], attrs, tr.label(node))
    return replace(signal, value=value)


def _held(codes: np.ndarray) -> np.ndarray | None:
    return codes.astype(np.int64) if np.abs(codes).max() < 1 << 31 else None


HANDLERS: dict[tuple[str, str], Handler] = {
    ("", "Conv"): conv,
    ("", "ConvTranspose"): conv_transpose,
    ("", "Gemm"): gemm,
    ("", "MatMul"): matmul,
}
