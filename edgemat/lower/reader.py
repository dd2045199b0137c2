"""Reads a lowered file: everything in it is recomputed and compared before anyone acts on it.

A file may come from a stranger. Formats, ranges and function bodies follow from the attributes and the weights; where
the file says something else it is refused.
"""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import onnx_ir as ir

from edgemat.body import DOMAIN, IR_VERSION, OPSET
from edgemat.errors import EdgematError, LoweringError
from edgemat.lower.data_file import attach
from edgemat.lower.graph import Graph, view
from edgemat.lower.typing import CALL, INFORMATIVE, META, infer
from edgemat.lower.writer import FORMAT_VERSION, VERSION_KEY, function_of, informative
from edgemat.op import MAX_ELEMENTS, REAL, Call

MAX_FILE_BYTES = 1 << 31
MAX_MESSAGE = 1000
"""Characters of a refusal: what a stranger's file states is quoted in it, and may be megabytes."""


def read(path: str | os.PathLike[str]) -> Graph:
    """Reads and checks a lowered file.

    Args:
        path: File written by `edgemat.to_onnx`.

    Returns:
        The typed graph.

    Raises:
        LoweringError: if the file is missing, damaged, of another version, or says anything that does not follow from
            its attributes and weights.
    """
    path = Path(path)
    try:
        if path.stat().st_size >= MAX_FILE_BYTES:
            raise LoweringError(f"{path} has {path.stat().st_size} bytes, expected fewer than {MAX_FILE_BYTES}")
        data = path.read_bytes()
    except OSError as error:
        raise LoweringError(f"{path} cannot be read: {error.strerror or error}") from error
    return read_bytes(data, str(path), path)


def read_bytes(data: bytes, label: str = "the model", path: Path | None = None) -> Graph:
    """Reads and checks a serialised lowered model; a data file is looked for beside `path` alone."""
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:
        raise LoweringError(f"{label} is not an ONNX file or is damaged: {error}") from error
    try:
        _check_proto(proto, label, path is not None)
        functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
        model = ir.serde.deserialize_model(proto)
        if path is not None:
            attach(model, path, model.graph.initializers.values())
        calls = _typed(model)
        _check_statements(model, calls, functions, len(proto.functions))
        graph = view(model, calls)
    except EdgematError as error:
        text = str(error)
        if len(text) <= MAX_MESSAGE:
            raise
        half = MAX_MESSAGE // 2 - 3
        raise type(error)(f"{text[:half]} ... {text[-half:]}") from None
    except (
        RecursionError,
        MemoryError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        OverflowError,
        AttributeError,
    ) as e:
        raise LoweringError(f"{label} is not a lowered edgemat file: {type(e).__name__}: {e}") from e
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("onnx", "onnx_ir", "google"):
            raise LoweringError(f"{label} is not a lowered edgemat file: {error}") from error
        raise
    return graph


def _check_proto(proto: onnx.ModelProto, label: str, beside: bool) -> None:
    """Version, opsets, plain initializers: what must hold before anything is built from the file."""
    found = {p.key: p.value for p in proto.metadata_props}.get(VERSION_KEY)
    if found is None:
        raise LoweringError(
            f"{label} is not a lowered edgemat file (it has no {VERSION_KEY}); write one with edgemat.to_onnx"
        )
    if found != FORMAT_VERSION:
        raise LoweringError(
            f"{label} has format version {found[:20]!r}, this edgemat reads {FORMAT_VERSION}; "
            "use the edgemat that wrote it"
        )
    opsets = {o.domain: o.version for o in proto.opset_import}
    if opsets != {"": OPSET, DOMAIN: 1} or proto.ir_version != IR_VERSION or len(opsets) != len(proto.opset_import):
        raise LoweringError(
            f"{label} uses IR {proto.ir_version} and opsets {opsets}, expected IR {IR_VERSION} and "
            f"{{'': {OPSET}, '{DOMAIN}': 1}}"
        )
    if proto.graph.sparse_initializer or proto.training_info:
        raise LoweringError(f"{label} has sparse initializers or training information, which lowered files have not")
    for tensor in proto.graph.initializer:
        outside = tensor.data_location == onnx.TensorProto.EXTERNAL or bool(tensor.external_data)
        known = {entry.key for entry in tensor.external_data} == {"location", "offset", "length"}
        if outside and not (beside and known and len(tensor.external_data) == 3):
            raise LoweringError(
                f"initializer {tensor.name!r} keeps its data outside the file, expected them in the model or, by "
                "location, offset and length, in a data file beside it; open the model by its path"
            )
        elements = 1
        for dim in tensor.dims:
            elements *= max(int(dim), 0)
        if elements >= MAX_ELEMENTS or elements == 0:
            raise LoweringError(
                f"initializer {tensor.name!r} has shape {list(tensor.dims)}, expected 1 to {MAX_ELEMENTS - 1} elements"
            )
    names = [t.name for t in proto.graph.initializer] + [v.name for v in proto.graph.input]
    names += [name for node in proto.graph.node for name in node.output]
    repeated = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) != len(names) else []
    if repeated or "" in names:
        raise LoweringError(f"{label} defines the value {(repeated or [''])[0]!r} more than once or without a name")


def _typed(model: ir.Model) -> list[Call]:
    inputs = set(model.graph.inputs)
    known: set[ir.Value] = inputs | set(model.graph.initializers.values())
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value not in known:
                raise LoweringError(
                    f"node {node.name!r} reads {value.name!r} before it is computed: the graph has a cycle or a hole"
                )
        known.update(node.outputs)
    calls = infer(model.graph)
    for value in model.graph.outputs:
        tensor = value.meta.get(META)
        producer = value.producer()
        if tensor is None or producer is None or producer.op_type not in ("Dequantize", "NextState"):
            raise LoweringError(f"graph output {value.name!r} is not written by a Dequantize or a NextState")
    if not any(value.producer().op_type == "Dequantize" for value in model.graph.outputs):  # type: ignore[union-attr]
        raise LoweringError("the graph has no output")
    readers: dict[str, int] = {}
    for call in calls:
        if call.op.name == "Quantize":
            readers[call.inputs[0]] = readers.get(call.inputs[0], 0) + 1
    for value in model.graph.inputs:
        if value.meta[META].format is not REAL:
            continue  # a state: pair_states looks at it
        if readers.get(value.name or "", 0) != 1:
            raise LoweringError(
                f"graph input {value.name!r} has {readers.get(value.name or '', 0)} quantisers, expected one"
            )
    return calls


def _check_statements(
    model: ir.Model, calls: list[Call], functions: dict[tuple[str, str, str], onnx.FunctionProto], count: int
) -> None:
    """Informative attributes and function bodies must be what the attributes imply."""
    used: set[tuple[str, str, str]] = set()
    made: dict[tuple[str, str, str], onnx.FunctionProto] = {}
    for call, node in zip(calls, model.graph, strict=True):
        stated = informative(call)
        for key in INFORMATIVE:
            attr = node.attributes.get(key)
            if attr is None or list(attr.value) != stated[key]:
                found = None if attr is None else list(attr.value)
                raise LoweringError(f"node {call.name!r}: {key} is {found}, but the graph implies {stated[key]}")
        function = function_of(call)
        identifier = function.identifier()
        if node.overload != function.overload or identifier not in functions:
            raise LoweringError(
                f"node {call.name!r} ({call.op.name}) calls overload {node.overload!r}, but its attributes imply "
                f"{function.overload!r}; the file was changed after it was written"
            )
        if identifier not in used:
            made[identifier] = ir.serde.serialize_function(function)
            if made[identifier] != functions[identifier]:
                raise LoweringError(
                    f"function {call.op.name}:{function.overload} has a body that differs from what node "
                    f"{call.name!r}'s attributes imply; the file was changed after it was written"
                )
            used.add(identifier)
        node.meta.pop(CALL, None)
    if used != set(functions) or count != len(functions):
        raise LoweringError("the file holds functions that no node calls; the file was changed after it was written")
