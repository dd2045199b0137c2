"""Reads a foreign ONNX file from a stranger: sizes bounded, local functions inlined, no subgraphs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from edgemat.errors import EdgematError, LoweringError
from edgemat.lower.writer import VERSION_KEY

MAX_FILE_BYTES = 1 << 30
MAX_NODES = 100_000


@dataclass(frozen=True)
class Source:
    """A foreign file as it was read.

    Attributes:
        graph: Its graph, nodes in topological order.
        opset: Version of the standard operators.
        label: What to call the file in messages.
        proto: The model as onnx has it (for running it).
    """

    graph: ir.Graph
    opset: int
    label: str
    proto: onnx.ModelProto


def is_lowered(proto: onnx.ModelProto) -> bool:
    """Whether a model is a lowered edgemat file already."""
    return any(entry.key == VERSION_KEY for entry in proto.metadata_props)


def load(path: str | os.PathLike[str]) -> Source:
    """Reads a foreign file.

    Raises:
        LoweringError: if it is missing, damaged, too large, or no graph of nodes.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size >= MAX_FILE_BYTES:
            raise LoweringError(f"{path} has {size} bytes, expected fewer than {MAX_FILE_BYTES}")
        data = path.read_bytes()
    except OSError as error:
        raise LoweringError(f"{path} cannot be read: {error.strerror or error}") from error
    return parse(data, str(path))


def parse(data: bytes, label: str = "the model") -> Source:
    """Reads a serialised foreign model; weights in files beside it are not looked for."""
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:
        raise LoweringError(f"{label} is not an ONNX file or is damaged: {error}") from error
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise LoweringError(f"{label} is not an ONNX file: it has no graph")
    if is_lowered(proto):
        raise LoweringError(f"{label} is a lowered edgemat file already; export, simulate or verify it as it is")
    return source_of(proto, label)


def source_of(proto: onnx.ModelProto, label: str) -> Source:
    """A parsed model as a `Source`."""
    try:
        if proto.functions:
            from onnx import inliner

            proto = inliner.inline_local_functions(proto)
        _check(proto, label)
        model = ir.serde.deserialize_model(proto)
        model.graph.sort()
    except EdgematError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:300]
        raise LoweringError(f"{label} is not a well-formed ONNX model: {type(error).__name__}: {first}") from error
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    opset = opsets.get("", opsets.get("ai.onnx", 0))
    if not 7 <= opset <= 26:
        raise LoweringError(
            f"{label} uses operator set {opset}, expected 7 to 26; convert it with onnx.version_converter"
        )
    return Source(model.graph, opset, label, proto)


def _check(proto: onnx.ModelProto, label: str) -> None:
    graph = proto.graph
    _check_texts(graph, label)
    if len(graph.node) > MAX_NODES:
        raise LoweringError(f"{label} has {len(graph.node)} nodes, expected at most {MAX_NODES}")
    if graph.sparse_initializer:
        raise LoweringError(f"{label} has sparse initializers; store them densely")
    names: set[str] = set()
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise LoweringError(
                f"initializer {tensor.name!r} keeps its data outside the file; save it with "
                "onnx.save(model, path, save_as_external_data=False)"
            )
        elements = 1
        for dim in tensor.dims:
            elements *= max(int(dim), 0)
        if elements and tensor.data_type != onnx.TensorProto.STRING and not _holds_data(tensor):
            raise LoweringError(f"initializer {tensor.name!r} is damaged: it holds none of its {elements} numbers")
        if elements >= 1 << 28:
            raise LoweringError(f"initializer {tensor.name!r} has {elements} elements, expected fewer than {1 << 28}")
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
                raise LoweringError(
                    f"node {node.name!r} ({node.op_type}) holds a graph of its own (a loop or a branch), which has no "
                    "fixed schedule; unroll it or export the model without it"
                )
        for name in node.output:
            if name and name in names:
                raise LoweringError(f"{label} defines the value {name!r} more than once")
            names.add(name)
    names |= {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        for name in node.input:
            if name and name not in names:
                raise LoweringError(
                    f"node {node.name!r} ({node.op_type}) reads {name[:80]!r}, which nothing computes; repair the file"
                )
    for value in graph.output:
        if value.name not in names:
            raise LoweringError(f"nothing computes the output {value.name[:80]!r}; repair the file")


def _check_texts(graph: onnx.GraphProto, label: str) -> None:
    """Refuses names that are no UTF-8: protobuf hands them on as bytes."""
    texts: list[object] = [graph.name]
    for value in (*graph.input, *graph.output, *graph.initializer):
        texts.append(value.name)
    for node in graph.node:
        texts += [node.name, node.op_type, node.domain, *node.input, *node.output]
        texts += [attribute.name for attribute in node.attribute]
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise LoweringError(f"{label} holds the name {wrong[0]!r}, which is not UTF-8; the file is damaged")


def _holds_data(tensor: onnx.TensorProto) -> bool:
    """Whether an initializer carries any numbers."""
    fields = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
    return bool(tensor.raw_data) or any(len(field) for field in fields)
