"""Turns a typed graph of edgemat nodes into the lowered file: functions, formats, value types, version."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgemat.body import DOMAIN, IR_VERSION, OPSET
from edgemat.lower.data_file import DataWriter, remove_others, unwritable
from edgemat.lower.states import pair_states
from edgemat.lower.typing import CALL, META, infer
from edgemat.op import REAL, Call, Tensor
from edgemat.ops.boundary import Dequantize

FORMAT_VERSION = "1"
VERSION_KEY = "edgemat_format_version"


def function_of(call: Call) -> ir.Function:
    """The model-local function of a call, its overload derived from its content."""
    names = [key for key, attr in call.op.attributes.items() if not attr.late or call.attrs[key] not in (None, "")]
    names += ["requantize"] if call.op.has_epilogue else []
    return call.op.body(call).function(call.op.name, (*names, "x_formats", "y_formats", "y_ranges"))


def described(tensor: Tensor) -> str:
    """A tensor's format as the informative attributes spell it."""
    return "float" if tensor.format is REAL else str(tensor.format)


def informative(call: Call) -> dict[str, list[str] | list[int]]:
    """The attributes that restate what readers recompute: formats in and out, proved ranges."""
    return {
        "x_formats": [described(t) for t in call.x],
        "y_formats": [described(t) for t in call.y],
        "y_ranges": [v for t in call.y for v in (max(t.lo, -(1 << 63)), min(t.hi, (1 << 63) - 1))],
    }


def finish(model: ir.Model) -> None:
    """Completes a model in place: informative attributes, functions, value types, versions.

    Raises:
        LoweringError: if its states are not read and written as they must be (`pair_states`).
    """
    from edgemat import __version__

    model.functions.clear()
    calls = infer(model.graph)
    pair_states(model.graph, calls)
    for call, node in zip(calls, list(model.graph), strict=True):
        function = function_of(call)
        model.functions.setdefault(function.identifier(), function)
        node.overload = function.overload
        for key, value in {**_stored(call), **informative(call)}.items():
            node.attributes[key] = ir.convenience.convert_attribute(key, value)
        for value in node.outputs:
            tensor: Tensor = value.meta[META]
            value.dtype = ir.DataType.from_numpy(_file_dtype(call, tensor))
            value.shape = ir.Shape(["batch" if d is None else d for d in tensor.shape])
        node.meta.pop(CALL, None)
    for value in model.graph.inputs:
        assert value.shape is not None
        value.shape = ir.Shape(["batch", *list(value.shape)[1:]])
    model.graph.opset_imports.clear()
    model.graph.opset_imports.update({"": OPSET, DOMAIN: 1})
    model.ir_version = IR_VERSION
    model.producer_name = "edgemat"
    model.producer_version = __version__
    model.metadata_props.clear()
    model.metadata_props[VERSION_KEY] = FORMAT_VERSION


def _file_dtype(call: Call, tensor: Tensor):  # type: ignore[no-untyped-def]
    return call.op.value_dtype(call) if isinstance(call.op, Dequantize) else tensor.dtype


def _stored(call: Call) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in call.attrs.items() if v is not None and v != ""}


def write(model: ir.Model, path: str | os.PathLike[str], data: DataWriter | None = None) -> None:
    """Writes the file atomically: under a temporary name first, then renamed.

    Args:
        model: A finished model.
        path: File to write.
        data: The data file that holds the model's large weights, or None where the model carries all of them.

    Raises:
        LoweringError: if it cannot be written; nothing is left behind then, and an earlier file stays.
    """
    target = Path(path)
    try:
        if data is not None:
            data.close(model)
        content = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            _replace(target, content)
            remove_others(target)
        else:
            with data.committed():
                _replace(target, content)
    except OSError as error:
        raise unwritable(target, error) from error


def _replace(target: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
