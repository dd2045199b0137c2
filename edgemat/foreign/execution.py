"""A foreign file run as its own tools run it, with any of its tensors looked at.

Files of standard operators go to onnxruntime as a whole: with its optimisations, whose integer kernels are what users
of QDQ files run, or without, node by node in float32 as the file says. The two differ: onnxruntime rounds float biases
and folds scales into weights when it optimises. Files with quantisers of QONNX run node by node: standard operators
under onnxruntime, the others by the `qonnx` package where it is installed, else by this module.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from edgemat.errors import EdgematError, LoweringError
from edgemat.foreign.quantisers import LAYOUTS, ROUNDING_NAMES, ROUNDINGS, Quantiser, qonnx_quantiser
from edgemat.foreign.runtime import open_session
from edgemat.foreign.source import Source

STANDARD = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
GENERAL = "qonnx.custom_op.general"
ALIASES = {"onnx.brevitas": GENERAL, "finn.custom_op.general": GENERAL, "qonnx.custom_op.brevitas": GENERAL}
"""Domains under which exporters of all ages wrote the operators of `GENERAL`."""
FREE_BATCH = 32
"""Samples of one run of a file that leaves its batch open."""
MAX_BATCH = 1 << 12
IR_VERSION = 10

Arrays = dict[str, np.ndarray]


class Execution:
    """A foreign file, ready to run.

    Attributes:
        executor: Who computes what, for reports.
        batch: Samples of one run.
        whole: Whether onnxruntime runs the file as a whole.

    Args:
        source: The file.
        taps: Names of tensors to look at beside the outputs.
        executor: "qonnx" or "edgemat" chooses who computes QONNX's operators; None takes qonnx where it is installed.
        optimised: Whether onnxruntime may fuse the nodes of a file of standard operators.

    Raises:
        LoweringError: if onnxruntime cannot open the file.
        EdgematError: if the executor is not installed.
    """

    def __init__(
        self, source: Source, taps: Sequence[str] = (), executor: str | None = None, optimised: bool = True
    ) -> None:
        self.label = source.label
        self._ports = [value for value in source.proto.graph.input if value.name not in _constants(source)]
        self.outputs = [value.name for value in source.proto.graph.output]
        self.batch = _batch(self._ports)
        if self.batch > MAX_BATCH:
            raise LoweringError(f"{self.label} has a batch of {self.batch}, expected at most {MAX_BATCH}")
        foreign = {node.domain for node in source.proto.graph.node} - set(STANDARD)
        self.whole = not foreign
        self._run: Callable[[Arrays], Arrays]
        if foreign:
            nodes = NodeByNode(source, [*self.outputs, *taps], executor)
            self._run, self.executor = nodes, f"onnxruntime, QONNX operators by {nodes.by}"
        else:
            self._run, self.executor = _whole(source, [*self.outputs, *taps], optimised), "onnxruntime"

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in the file's order."""
        return [value.name for value in self._ports]

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """Outputs and taps of samples; their first axis counts samples.

        Raises:
            LoweringError: if onnxruntime cannot run the file on these arrays.
        """
        typed = {v.name: _typed(np.asarray(feeds[v.name]), v) for v in self._ports}
        total = len(next(iter(typed.values()))) if typed else 1
        parts: list[Arrays] = []
        for start in range(0, total, self.batch):
            part = {name: array[start : start + self.batch] for name, array in typed.items()}
            held = min(self.batch, total - start)
            if held < self.batch and self.batch != FREE_BATCH:
                part = {k: np.concatenate([v, v[-1:].repeat(self.batch - held, 0)]) for k, v in part.items()}
            try:
                found = self._run(part)
            except EdgematError:
                raise
            except Exception as error:
                first = (str(error).splitlines() or [""])[0][:300]
                raise LoweringError(
                    f"{self.label} cannot be run: {first}; check shapes and types of the inputs"
                ) from error
            parts.append({name: array[:held] if array.ndim else array for name, array in found.items()})
        return {name: np.concatenate([np.atleast_1d(part[name]) for part in parts]) for name in parts[0]}


class NodeByNode:
    """A graph run node by node.

    Attributes:
        by: Who computes QONNX's operators.
    """

    def __init__(self, source: Source, wanted: Sequence[str], executor: str | None) -> None:
        self.by, self._compute = quantiser_operators(executor)
        model = ir.serde.deserialize_model(source.proto)
        model.graph.sort()
        try:
            self._nodes = [ir.serde.serialize_node(node) for node in model.graph]
        except ir.serde.SerdeError as error:
            raise LoweringError(f"{source.label} cannot be run: a node's attributes are damaged") from error
        self._constants = _constants(source)
        self._wanted = list(wanted)
        self._versions = {entry.domain: entry.version for entry in source.proto.opset_import}
        self._opset = source.opset
        self._sessions: dict[int, Any] = {}
        last: dict[str, int] = {}
        for index, node in enumerate(self._nodes):
            last.update(dict.fromkeys((*node.input, *node.output), index))
        self._last = {name: index for name, index in last.items() if name not in self._wanted}

    def __call__(self, feeds: Arrays) -> Arrays:
        """Wanted tensors by name."""
        values = {"": np.zeros(0), **self._constants, **feeds}
        for index, node in enumerate(self._nodes):
            arrays = {name: values[name] for name in node.input if name}
            if node.domain in STANDARD:
                found = self._standard(index, node, arrays)
            else:
                found = [np.asarray(self._compute(node, arrays, self._versions.get(node.domain)), np.float32)]
            values.update(zip([name for name in node.output if name], found, strict=False))
            for name in {*node.input, *node.output}:
                if self._last.get(name) == index and name not in self._constants:
                    del values[name]
        return {name: np.asarray(values[name]) for name in self._wanted}

    def _standard(self, index: int, node: onnx.NodeProto, arrays: Arrays) -> list[np.ndarray]:
        session = self._sessions.get(index)
        if session is None:
            session = self._sessions[index] = _one_node(node, arrays, self._opset)
        return list(session.run(None, arrays))


def _one_node(node: onnx.NodeProto, arrays: Arrays, opset: int) -> Any:
    types = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in arrays.items()}
    ins = [helper.make_tensor_value_info(name, types[name], [None] * arrays[name].ndim) for name in arrays]
    outs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    graph = helper.make_graph([node], "node", ins, outs)
    opsets = [onnx.OperatorSetIdProto(version=opset)]
    if node.domain:
        opsets.append(onnx.OperatorSetIdProto(domain=node.domain, version=1))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    inferred = onnx.shape_inference.infer_shapes(model)
    for value, known in zip(model.graph.output, inferred.graph.output, strict=True):
        value.CopyFrom(known)
    return open_session(model.SerializeToString())


def _whole(source: Source, wanted: Sequence[str], optimised: bool) -> Callable[[Arrays], Arrays]:
    model = onnx.ModelProto()
    model.CopyFrom(source.proto)
    stated = {value.name for value in model.graph.output}
    try:
        known = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    except Exception:
        known = {}
    for name in dict.fromkeys(wanted):
        if name not in stated:
            model.graph.output.append(known.get(name, onnx.ValueInfoProto(name=name)))
    try:
        session = open_session(model.SerializeToString(), optimised)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:300]
        raise LoweringError(f"onnxruntime cannot open {source.label}: {first}") from error

    def run(feeds: Arrays) -> Arrays:
        names = list(dict.fromkeys(wanted))
        return dict(zip(names, session.run(names, feeds), strict=True))

    return run


def _constants(source: Source) -> Arrays:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in source.proto.graph.initializer}


def _batch(ports: Sequence[onnx.ValueInfoProto]) -> int:
    for value in ports:
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].HasField("dim_value") and dims[0].dim_value > 0:
            return int(dims[0].dim_value)
    return FREE_BATCH


def _typed(array: np.ndarray, value: onnx.ValueInfoProto) -> np.ndarray:
    kind = value.type.tensor_type.elem_type
    dtype = helper.tensor_dtype_to_np_dtype(kind) if kind != TensorProto.UNDEFINED else np.dtype(np.float32)
    if dtype.kind not in "iub":
        return np.ascontiguousarray(array, dtype)
    with np.errstate(invalid="ignore"):
        made = np.ascontiguousarray(array, dtype)
    if (made != array).any():
        raise LoweringError(f"input {value.name!r} takes {dtype} numbers, was given others; round and clip them first")
    return made


# -- the operators of QONNX -----------------------------------------------------------------------------------------
def quantiser_operators(
    executor: str | None,
) -> tuple[str, Callable[[onnx.NodeProto, Arrays, int | None], np.ndarray]]:
    """Who computes QONNX's operators, and a function of node, inputs and operator set version.

    Raises:
        EdgematError: if the executor asked for is unknown or not installed.
    """
    if executor not in (None, "qonnx", "edgemat"):
        raise EdgematError(f"executor is {executor!r}, expected 'qonnx' or 'edgemat'")
    if executor != "edgemat":
        try:
            return f"qonnx {importlib.metadata.version('qonnx')}", _by_qonnx
        except importlib.metadata.PackageNotFoundError:
            if executor == "qonnx":
                raise EdgematError("qonnx is not installed; pip install qonnx, or let edgemat compute") from None
    return "edgemat (qonnx is not installed)" if executor is None else "edgemat", _by_edgemat


def _by_qonnx(node: onnx.NodeProto, arrays: Arrays, version: int | None) -> np.ndarray:
    import warnings

    registry: Any = importlib.import_module("qonnx.custom_op.registry")

    renamed = onnx.NodeProto()
    renamed.CopyFrom(node)
    renamed.domain = ALIASES.get(node.domain, node.domain)
    context: dict[str, Any] = dict(arrays)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            operator = registry.getCustomOp(renamed, version)
        except KeyError as error:
            raise LoweringError(f"qonnx does not know {node.op_type} of {node.domain}: {error}") from error
        operator.execute_node(context, None)
    return np.asarray(context[node.output[0]])


def _by_edgemat(node: onnx.NodeProto, arrays: Arrays, version: int | None) -> np.ndarray:
    given = [arrays[name] for name in node.input if name]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    compute = _OWN.get(node.op_type)
    if compute is None or ALIASES.get(node.domain, node.domain) != GENERAL:
        raise LoweringError(
            f"node {node.name!r} is {node.domain}::{node.op_type}, which edgemat does not execute; pip install qonnx"
        )
    with np.errstate(all="ignore"):
        return compute(attributes, *given)


def _quant(attributes: dict[str, Any], x: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: np.ndarray) -> Any:
    """Quant, IntQuant: clip, then round, in float32."""
    mode = attributes.get("rounding_mode", b"ROUND").decode()
    signed, narrow = bool(attributes.get("signed", 1)), bool(attributes.get("narrow", 0))
    quantiser = qonnx_quantiser(np.ones((), np.float32), zero, bits, signed, narrow, mode)
    return quantiser.round(x / np.asarray(scale, np.float32)).astype(np.float32) * np.asarray(scale, np.float32)


def _bipolar(attributes: dict[str, Any], x: np.ndarray, scale: np.ndarray) -> Any:
    sign = Quantiser(np.ones((), np.float32), 0, -1, 1, bipolar=True).round(x)
    return sign.astype(np.float32) * np.asarray(scale, np.float32)


def _thresholds(attributes: dict[str, Any], x: np.ndarray, thresholds: np.ndarray) -> Any:
    """FINN's MultiThreshold: how many thresholds [C, T] a number reaches, by channel."""
    layout = attributes.get("data_layout", b"").decode() or LAYOUTS.get(x.ndim, "NC")
    channels_last = layout.endswith("C") and x.ndim > 2
    moved = np.moveaxis(x, -1, 1) if channels_last else x
    laid = thresholds.reshape(thresholds.shape[0], *(1,) * (moved.ndim - 2), -1)
    count = (moved[..., None] >= laid).sum(axis=-1).astype(np.float32)
    y = count * np.float32(attributes.get("out_scale", 1.0)) + np.float32(attributes.get("out_bias", 0.0))
    return np.moveaxis(y, 1, -1) if channels_last else y


def _trunc(attributes: dict[str, Any], x: np.ndarray, scale: np.ndarray, zero: np.ndarray, *widths: np.ndarray) -> Any:
    """Trunc: the upper bits of a code. Version 1 states bits in and out, version 2 bits in, scale and bits out."""
    rounding = ROUNDINGS[ROUNDING_NAMES[attributes.get("rounding_mode", b"FLOOR").decode().upper()]]
    scale = np.asarray(scale, np.float32)
    y = np.round(x / scale + zero)
    if len(widths) == 2:
        shift = 2.0 ** (np.float32(widths[0]) - np.float32(widths[1]))
        return (rounding(y / shift) - zero) * scale
    _, wider, bits = widths
    shift = 2.0 ** np.round(np.log2(np.asarray(wider, np.float32) / scale))
    signed, narrow = int(attributes.get("signed", 1)), int(attributes.get("narrow", 0))
    whole = 2.0 ** (float(bits) - signed)
    low, high = (-whole + narrow, whole - 1) if signed else (0.0, whole - 1 - narrow)
    return (rounding(np.clip(y / shift, low, high)) - zero / shift) * np.asarray(wider, np.float32)


_OWN: dict[str, Callable[..., Any]] = {
    "Trunc": _trunc,
    "Quant": _quant,
    "IntQuant": _quant,
    "BipolarQuant": _bipolar,
    "MultiThreshold": _thresholds,
}
