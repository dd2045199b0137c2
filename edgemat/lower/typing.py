"""Types of a graph of edgemat nodes: from `onnx_ir` nodes to `Call`s and `Tensor`s.

The type of a value is kept in ``value.meta["edgemat"]``; `infer` computes all of them from the inputs down.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from edgemat.body import DOMAIN
from edgemat.codes import Codes
from edgemat.errors import FormatError, LoweringError, UnsupportedOpError
from edgemat.formats import Fixed
from edgemat.op import MAX_ELEMENTS, REAL, Call, Tensor
from edgemat.ops import BY_NAME

META = "edgemat"
CALL = "edgemat_call"
STORED = "edgemat_codes"
"""Where an initializer whose codes stay in a data file keeps its `Codes`."""
INFORMATIVE = ("x_formats", "y_formats", "y_ranges")
_CARRIERS = {"int8": (8, True), "uint8": (8, False), "int32": (32, True), "int64": (64, True)}


def type_of(value: ir.Value) -> Tensor | None:
    """The Tensor of a value, if it is known."""
    return value.meta.get(META)


def constant_codes(value: ir.Value) -> np.ndarray | Codes | None:
    """int64 codes of an initializer, or of a Literal node's output; None for variables.

    Codes in a data file stay there.
    """
    producer = value.producer()
    if producer is not None:
        if producer.domain == DOMAIN and producer.op_type == "Literal" and producer.inputs[0] is not None:
            return constant_codes(producer.inputs[0])
        return None
    if value.const_value is None:
        return None
    stored: Codes | None = value.meta.get(STORED)
    if stored is not None:
        return stored
    try:
        array = value.const_value.numpy()
    except Exception as error:
        raise LoweringError(f"initializer {value.name!r} cannot be read: {error}") from error
    if array.dtype.name not in _CARRIERS:
        raise LoweringError(
            f"initializer {value.name!r} has type {array.dtype.name}, expected codes in {', '.join(_CARRIERS)}"
        )
    return array.astype(np.int64)


def _constant_tensor(value: ir.Value, codes: np.ndarray | Codes) -> Tensor:
    if isinstance(codes, Codes):
        width, signed = _CARRIERS[codes.dtype.name]
        return Tensor(value.name or "", codes.shape, Fixed(width, width, signed), codes.survey.lo, codes.survey.hi)
    assert value.const_value is not None
    width, signed = _CARRIERS[value.const_value.numpy().dtype.name]
    if codes.size == 0:
        raise LoweringError(f"initializer {value.name!r} has shape {codes.shape}, expected at least one element")
    return Tensor(value.name or "", codes.shape, Fixed(width, width, signed), int(codes.min()), int(codes.max()))


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """Plain attributes of a node without the informative ones."""
    made: dict[str, Any] = {}
    for name, attr in node.attributes.items():
        if name in INFORMATIVE:
            continue
        if attr.type not in (ir.AttributeType.INT, ir.AttributeType.STRING, ir.AttributeType.INTS):
            raise LoweringError(f"node {node.name!r}: attribute {name!r} has type {attr.type.name}, which none has")
        made[name] = tuple(attr.value) if attr.type == ir.AttributeType.INTS else attr.value
    return made


def call_of(node: ir.Node) -> Call:
    """The typed Call of an edgemat node whose inputs are typed.

    Raises:
        UnsupportedOpError: for an operator that is not edgemat's.
        LoweringError: for untyped inputs or illegal attributes.
    """
    op = BY_NAME.get(node.op_type) if node.domain == DOMAIN else None
    if op is None:
        kind = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        raise UnsupportedOpError(
            f"node {node.name!r} is {kind}, expected one of edgemat's operators; `edgemat ops` lists them"
        )
    types: list[Tensor] = []
    constants: dict[int, np.ndarray | Codes] = {}
    for index, value in enumerate(node.inputs):
        if value is None:
            raise LoweringError(f"node {node.name!r} ({op.name}): input {index} is missing")
        codes = constant_codes(value)
        tensor = type_of(value)
        if codes is not None:
            constants[index] = codes
            if tensor is None:
                tensor = _constant_tensor(value, codes)
        if tensor is None:
            raise LoweringError(
                f"node {node.name!r} ({op.name}): input {value.name!r} is not computed before it; "
                "the graph has a cycle or an undefined value"
            )
        types.append(tensor)
    call = Call(op, node.name or "", types, attributes_of(node), constants, [v.name or "" for v in node.outputs])
    if len(node.outputs) != len(call.exact):
        raise LoweringError(
            f"node {node.name!r} ({op.name}) has {len(node.outputs)} outputs, expected {len(call.exact)}"
        )
    for tensor in call.x:
        if (tensor.format is REAL) != (op.name == "Quantize"):
            raise LoweringError(
                f"node {node.name!r} ({op.name}): input {tensor.name!r} carries "
                f"{'values' if tensor.format is REAL else 'codes'}, expected "
                f"{'codes; put a quantiser before it' if tensor.format is REAL else 'values'}"
            )
    return call


def type_node(node: ir.Node) -> Call:
    """Types the outputs of a node; returns its Call.

    Raises:
        EdgematError: if that fails; the message names the node.
    """
    try:
        call = call_of(node)
        types = call.y
    except FormatError as error:  # of an attribute or a sum, neither of which knows whose it is
        raise FormatError(f"node {node.name!r} ({node.op_type}): {error}") from None
    for value, tensor in zip(node.outputs, types, strict=True):
        value.meta[META] = tensor
    node.meta[CALL] = call
    return call


def infer(graph: ir.Graph) -> list[Call]:
    """Types every value of a graph of edgemat nodes, in order."""
    for value in graph.inputs:
        if type_of(value) is None:
            value.meta[META] = input_type(value)
    return [type_node(node) for node in graph]


def input_type(value: ir.Value) -> Tensor:
    """Type of a graph input with the batch on axis 0: float32 values, or any codes of a code type (a state's)."""
    carrier = _CARRIERS.get(value.dtype.name.lower()) if value.dtype is not None else None
    if value.dtype != ir.DataType.FLOAT and carrier is None:
        found = value.dtype.name if value.dtype is not None else "no type"
        raise LoweringError(
            f"graph input {value.name!r} has {found}, expected float32, or for a state {', '.join(_CARRIERS)}"
        )
    if value.shape is None or len(value.shape) < 1:
        raise LoweringError(f"graph input {value.name!r} has no shape, expected a batch axis and the sample's axes")
    dims: list[int | None] = [None]
    for dim in list(value.shape)[1:]:
        if not isinstance(dim, int) or not 0 < dim < MAX_ELEMENTS:
            raise LoweringError(f"graph input {value.name!r} has the axis {dim!s}, expected a positive fixed length")
        dims.append(dim)
    size = 1
    for extent in dims[1:]:
        size *= extent or 1
    if size >= MAX_ELEMENTS:
        raise LoweringError(
            f"graph input {value.name!r} has {size} elements a sample, expected fewer than {MAX_ELEMENTS}"
        )
    if carrier is None:
        return Tensor(value.name or "", tuple(dims), REAL, 0, 0)
    codes = Fixed(carrier[0], carrier[0], carrier[1])
    return Tensor(value.name or "", tuple(dims), codes, *codes.rails)
