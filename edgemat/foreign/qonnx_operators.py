"""Each operator of a lowered file as standard ONNX on real values, with Quant where it narrows.

A writer of `FORMS` gets the graph, the call and the names of its operands, and returns the name of its result before
overflow: what rounding adds is in it already, in the bias where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from edgemat import formats
from edgemat.errors import FormatError
from edgemat.foreign.qonnx_graph import DOMAIN, EXACT, QonnxGraph
from edgemat.foreign.qonnx_narrowing import NAMES, Plan, lay, plan, quantise, refusal, scales
from edgemat.foreign.qonnx_pooling import average_pool, max_pool
from edgemat.formats import Fixed
from edgemat.op import Call
from edgemat.ops.table import FUNCTIONS

Form = Callable[[QonnxGraph, Call, Sequence[str]], str]


def codes_of(call: Call, index: int) -> np.ndarray:
    """int64 codes of a constant input."""
    codes = call.constant(index)
    assert codes is not None
    return codes


def weights(graph: QonnxGraph, codes: np.ndarray, fmt: Fixed, lsb: np.ndarray, name: str) -> str:
    """Constant codes as real values behind a Quant of their format.

    Args:
        graph: Where they go.
        codes: int64, in the order in which the graph uses them.
        fmt: Their format.
        lsb: Its LSBs, broadcasting against `codes`.
        name: Name of the initializer.
    """
    stored = graph.initializer((codes * lsb).astype(np.float32), name)
    if fmt.bipolar:
        return graph.bipolar_quant(stored, codes.shape, f"{name}_quant")
    bits = max(fmt.width, 2) if fmt.signed else fmt.width
    narrow = fmt.signed and fmt.overflow == "SAT_SYM" and fmt.width > 1
    return graph.quant(stored, codes.shape, lsb, bits, fmt.signed, narrow, "ROUND", f"{name}_quant")


def by_axis(values: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """One value as a scalar, several along `axis` of `rank`."""
    if values.size == 1:
        return values.reshape(())
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def planned(call: Call) -> Plan | None:
    """How the call's epilogue rounds its sums, or None where it has none."""
    if call.epilogue is None:
        return None
    result = call.exact[0]
    return plan(call, call.epilogue, result.lo, result.hi, call.bounds.magnitude)


def narrowed(graph: QonnxGraph, call: Call, x: str, done: Plan | None) -> str:
    """The fused Requantize, whose offsets are in x already."""
    if done is None or call.epilogue is None:
        return x
    result = call.exact[0]
    return quantise(graph, x, result.shape, result.lo, call.epilogue.format, done.mode, call.name)


def biased(call: Call, index: int, done: Plan | None) -> np.ndarray | None:
    """The bias as reals [C] with what rounding adds, or None where both are 0 everywhere and the call has no bias."""
    offsets = np.zeros(1) if done is None else done.offsets
    if len(call.x) <= index:
        count = int(call.exact[0].shape[-1 if call.op.name == "Linear" else 1] or 1)
        return np.broadcast_to(offsets, (count,)) if offsets.any() else None
    fracs = np.asarray(call.exact[0].format.fracs)
    if call.op.name == "Linear":  # its sums may have been aligned to one grid, its bias is on that of its channel
        fracs = np.asarray(call.format_attr("w_format").fracs) + call.x[0].format.finest
    return codes_of(call, index) * np.ldexp(1.0, -fracs) + offsets


def plain(form: Form) -> Form:
    """A writer of the exact result, followed by what rounding adds and by the epilogue."""

    def write(graph: QonnxGraph, call: Call, x: Sequence[str]) -> str:
        done = planned(call)
        value = form(graph, call, x)
        if done is not None and done.offsets.any():
            shape = call.exact[0].shape
            addend = graph.constant(lay(done.offsets, len(shape)), f"{call.name}_offset")
            value = graph.node("Add", [value, addend], shape, f"{call.name}_offset")
        return narrowed(graph, call, value, done)

    return write


def linear(graph: QonnxGraph, call: Call, x: Sequence[str]) -> str:
    """MatMul with weights [I, O], and an Add."""
    done, fmt, shape = planned(call), call.format_attr("w_format"), call.exact[0].shape
    w = weights(graph, codes_of(call, 1).T, fmt, by_axis(scales(fmt), 2, 1), f"{call.name}_weight")
    value = graph.node("MatMul", [x[0], w], shape, call.name)
    bias = biased(call, 2, done)
    if bias is not None:
        value = graph.node("Add", [value, graph.constant(bias, f"{call.name}_bias")], shape, f"{call.name}_add")
    return narrowed(graph, call, value, done)


def convolution(graph: QonnxGraph, call: Call, x: Sequence[str]) -> str:
    """Conv or ConvTranspose with bias."""
    done, fmt, attrs = planned(call), call.format_attr("w_format"), call.attrs
    codes, lsb = codes_of(call, 1), scales(fmt)
    extra: dict[str, Any] = {}
    if call.op.name == "ConvTranspose":
        extra["output_padding"] = list(attrs["output_padding"])
        if lsb.size > 1:  # weights [I, O/g, ...]: the rows of a group have that group's output channels
            rows = np.repeat(lsb.reshape(attrs["groups"], -1), codes.shape[0] // attrs["groups"], axis=0)
            lsb = rows.reshape(*rows.shape, *(1,) * (codes.ndim - 2))
    else:
        lsb = by_axis(lsb, codes.ndim, 0)
    operands = [x[0], weights(graph, codes, fmt, lsb, f"{call.name}_weight")]
    bias = biased(call, 2, done)
    if bias is not None:
        operands.append(graph.constant(bias, f"{call.name}_bias"))
    value = graph.node(
        call.op.name,
        operands,
        call.exact[0].shape,
        call.name,
        kernel_shape=list(codes.shape[2:]),
        strides=list(attrs["strides"]),
        pads=list(attrs["pads"]),
        dilations=list(attrs["dilations"]),
        group=attrs["groups"],
        **extra,
    )
    return narrowed(graph, call, value, done)


def affine(graph: QonnxGraph, call: Call, x: Sequence[str]) -> str:
    """Mul and Add of one constant for each channel."""
    done, fmt, shape = planned(call), call.format_attr("w_format"), call.exact[0].shape
    rank = len(shape)
    codes = lay(codes_of(call, 1), rank)
    a = weights(graph, codes, fmt, lay(scales(fmt), rank), f"{call.name}_scale")
    value = graph.node("Mul", [x[0], a], shape, call.name)
    bias = biased(call, 2, done)
    assert bias is not None
    addend = graph.constant(lay(bias, rank), f"{call.name}_bias")
    return narrowed(graph, call, graph.node("Add", [value, addend], shape, f"{call.name}_add"), done)


@plain
def standard(graph: QonnxGraph, call: Call, x: Sequence[str]) -> str:
    """Relu, Add, Sub, Mul and MatMul are those of ONNX."""
    return graph.node(call.op.name, x, call.exact[0].shape, call.name)


@plain
def same(graph: QonnxGraph, call: Call, x: Sequence[str]) -> str:
    """Requantize is its epilogue alone."""
    return x[0]


@plain
def clip(graph: QonnxGraph, call: Call, x: Sequence[str]) -> str:
    """Clip between two real numbers."""
    lsb = np.ldexp(1.0, -call.exact[0].format.fracs[0])
    low, high = (np.array(call.attrs[key] * lsb, np.float32) for key in ("low", "high"))
    for code in (call.attrs["low"], call.attrs["high"]):
        if abs(code) >= EXACT:
            raise refusal(call, f"a limit of {code} LSBs", f"float32 holds integers below {EXACT}")
    limits = [graph.initializer(low, f"{call.name}_low"), graph.initializer(high, f"{call.name}_high")]
    return graph.node("Clip", [x[0], *limits], call.exact[0].shape, call.name)


@plain
def prelu(graph: QonnxGraph, call: Call, x: Sequence[str]) -> str:
    """PRelu with a slope, or one for each channel."""
    fmt, codes = call.format_attr("slope_format"), codes_of(call, 1)
    codes = codes if codes.size == 1 else codes.reshape((-1,) + (1,) * (len(call.x[0].shape) - 2))
    slope = weights(graph, codes, fmt, scales(fmt).reshape(()), f"{call.name}_slope")
    return graph.node("PRelu", [x[0], slope], call.exact[0].shape, call.name)


def concat(graph: QonnxGraph, call: Call, x: Sequence[str]) -> str:
    """Concat."""
    return graph.node("Concat", x, call.exact[0].shape, call.name, axis=call.attrs["axis"] + 1)


def transpose(graph: QonnxGraph, call: Call, x: Sequence[str]) -> str:
    """Transpose behind the batch."""
    perm = [0, *(p + 1 for p in call.attrs["perm"])]
    return graph.node("Transpose", x, call.exact[0].shape, call.name, perm=perm)


def reshape(graph: QonnxGraph, call: Call, x: Sequence[str]) -> str:
    """Flatten to one axis, else Reshape."""
    target = call.attrs["shape"]
    if len(target) == 1:
        return graph.node("Flatten", x, call.exact[0].shape, call.name, axis=1)
    shape = graph.initializer(np.array([-1, *target], np.int64), f"{call.name}_shape")
    return graph.node("Reshape", [x[0], shape], call.exact[0].shape, call.name)


def slicing(graph: QonnxGraph, call: Call, x: Sequence[str]) -> str:
    """Slice of the axes that are not taken whole."""
    parts = zip(*(call.attrs[k] for k in ("starts", "sizes", "steps")), strict=True)
    rows = []
    for axis, (start, size, step) in enumerate(parts, 1):
        stop = start + size * step
        if (start, size, step) != (0, call.x[0].sample_shape[axis - 1], 1):
            rows.append((start, stop if stop >= 0 else -(1 << 62), axis, step))
    if not rows:
        return graph.node("Identity", x, call.exact[0].shape, call.name)
    columns = zip(("starts", "ends", "axes", "steps"), zip(*rows, strict=True), strict=True)
    limits = [graph.initializer(np.array(column, np.int64), f"{call.name}_{key}") for key, column in columns]
    return graph.node("Slice", [x[0], *limits], call.exact[0].shape, call.name)


def pad(graph: QonnxGraph, call: Call, x: Sequence[str]) -> str:
    """Pad with a real value."""
    pads = np.array([0, *call.attrs["before"], 0, *call.attrs["after"]], np.int64)
    value = np.array(call.attrs["value"] * scales(call.x[0].format)[0], np.float32)
    operands = [x[0], graph.initializer(pads, f"{call.name}_pads"), graph.initializer(value, f"{call.name}_value")]
    return graph.node("Pad", operands, call.exact[0].shape, call.name)


def upsample(graph: QonnxGraph, call: Call, x: Sequence[str]) -> str:
    """Resize by whole factors."""
    factors = graph.initializer(np.array([1, 1, *call.attrs["scales"]], np.float32), f"{call.name}_scales")
    modes: dict[str, Any] = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return graph.node("Resize", [x[0], "", factors], call.exact[0].shape, call.name, **modes)


def arg_max(graph: QonnxGraph, call: Call, x: Sequence[str]) -> str:
    """ArgMax, and a Cast to real values."""
    attrs, shape = call.attrs, call.exact[0].shape
    extra = {"axis": attrs["axis"] + 1, "keepdims": attrs["keepdims"], "select_last_index": attrs["last"]}
    index = graph.node("ArgMax", x, shape, call.name, TensorProto.INT64, **extra)
    return graph.node("Cast", [index], shape, f"{call.name}_float", to=TensorProto.FLOAT)


_STANDARD: dict[str, tuple[str, dict[str, Any]]] = {
    "sigmoid": ("Sigmoid", {}),
    "tanh": ("Tanh", {}),
    "exp": ("Exp", {}),
    "reciprocal": ("Reciprocal", {}),
    "softplus": ("Softplus", {}),
    "elu": ("Elu", {}),
    "hardsigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
}
_SLACK = 2.0**-21
"""How far, relative to max(|f|, 1/2), float32 implementations of those functions are allowed to be off; onnxruntime's
are off by at most 1.4e-7 (sigmoid), 2.6e-7 (tanh) and half of this (all others)."""


def table(graph: QonnxGraph, call: Call, x: Sequence[str]) -> str:
    """A standard function and a Quant, where those give the table's code for every code that can occur."""
    function, source, target = call.attrs["function"], call.x[0], call.exact[0].format
    if function not in _STANDARD:
        raise refusal(
            call,
            f"a table of {function}, expected one of {', '.join(_STANDARD)}",
            "use one of those activations, or export to hls or mcu, which read tables",
        )
    codes = np.arange(source.lo, source.hi + 1)
    wanted = codes_of(call, 1)[codes - source.format.min_code]
    real = np.array([FUNCTIONS[function](code * 2.0 ** -source.format.fracs[0]) for code in codes.tolist()])
    slack = _SLACK * np.maximum(np.abs(real), 0.5)
    try:
        ends = [formats.quantize(real - slack, target), formats.quantize(real + slack, target)]
        differs = (ends[0] != wanted) | (ends[1] != wanted) | ~np.isfinite(real)
    except FormatError:  # infinite under WRAP
        differs = np.ones(len(codes), bool)
    if differs.any() or target.overflow in ("WRAP", "SAT_ZERO"):
        first = codes[differs.argmax()] * 2.0 ** -source.format.fracs[0]
        raise refusal(
            call,
            f"{int(differs.sum())} of {len(codes)} entries of its table are not what float32 {function} and a Quant to "
            f"{target} give for certain, the first at {first:g}",
            "choose an output format whose thresholds lie elsewhere (one bit more or less, RND instead of TRN)",
        )
    op_type, attributes = _STANDARD[function]
    shape = call.exact[0].shape
    value = graph.node(op_type, x, shape, call.name, **attributes)
    mode = NAMES[target.rounding] if target.rounding.startswith("TRN") else "ROUND"
    return quantise(graph, value, shape, 0, target, mode, call.name)


def thresholds(graph: QonnxGraph, call: Call, x: Sequence[str]) -> str:
    """MultiThreshold, which counts as Thresholds does."""
    source, target, codes = call.x[0], call.exact[0].format, codes_of(call, 1)
    start, step = call.attrs["start"], call.attrs["step"]
    reach = abs(start) + abs(step) * codes.shape[1]
    if reach >= EXACT:
        raise refusal(call, f"counts reach {reach} LSBs", f"float32 holds integers below {EXACT}; use fewer thresholds")
    reals = np.clip(codes, source.lo, source.hi + 1) * scales(source.format)
    stored = graph.initializer(reals.astype(np.float32), f"{call.name}_thresholds")
    lsb = float(scales(target)[0])
    kind = "BIPOLAR" if target.bipolar else f"{'INT' if target.signed else 'UINT'}{target.width}"
    layout = {2: "NC", 3: "NCW", 4: "NCHW"}[len(source.shape)]
    attributes: dict[str, Any] = {"out_dtype": kind, "out_scale": step * lsb, "out_bias": start * lsb}
    attributes["data_layout"] = layout
    return graph.node("MultiThreshold", [x[0], stored], call.exact[0].shape, call.name, domain=DOMAIN, **attributes)


FORMS: dict[str, Form] = {
    "Requantize": same,
    "Linear": linear,
    "Conv": convolution,
    "ConvTranspose": convolution,
    "Affine": affine,
    "Relu": standard,
    "Clip": clip,
    "PRelu": prelu,
    "Table": table,
    "Thresholds": thresholds,
    "Add": standard,
    "Sub": standard,
    "Mul": standard,
    "MatMul": standard,
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "Concat": concat,
    "Slice": slicing,
    "Pad": pad,
    "Reshape": reshape,
    "Transpose": transpose,
    "Upsample": upsample,
    "ArgMax": arg_max,
}
"""The writer of each operator that has an exact form."""
