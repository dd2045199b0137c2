"""Constant folding: a node whose inputs are all constants is run once, by onnxruntime or by its quantiser's rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from edgemat.errors import LoweringError
from edgemat.foreign.runtime import open_session
from edgemat.foreign.signals import Known

if TYPE_CHECKING:
    from edgemat.foreign.translator import Translator

LAYOUT = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Slice", "Expand")
"""Operators that move elements and change none: integers and scales behind a constant move along."""
MAX_ELEMENTS = 1 << 26


def fold(tr: Translator, node: ir.Node) -> list[Known] | None:
    """The outputs of a node of constants, or None where a handler makes them (quantisers of weights).

    Raises:
        LoweringError: if onnxruntime refuses the node, or its result is too large.
    """
    if node.domain not in ("", "ai.onnx") or node.op_type in ("DequantizeLinear", "QuantizeLinear"):
        return None
    known = [None if v is None else tr.values[v] for v in node.inputs]
    for value in known:
        if isinstance(value, Known) and value.array.size >= MAX_ELEMENTS:
            raise tr.refuse(node, f"a constant of {value.array.size} elements", "fold the constants of the file first")
    _bound(tr, node, known)
    arrays = run(tr, node, [None if v is None else v.array for v in known])  # type: ignore[union-attr]
    first = known[0] if known else None
    if node.op_type in LAYOUT and isinstance(first, Known) and first.codes is not None and first.scale is not None:
        rest = [None if v is None else v.array for v in known[1:]]  # type: ignore[union-attr]
        codes = run(tr, node, [first.codes, *rest])[0]
        scale = run(tr, node, [np.broadcast_to(first.scale, first.codes.shape), *rest])[0]
        return [Known(arrays[0], codes, scale, first.rails)]
    return [Known(array) for array in arrays]


def _bound(tr: Translator, node: ir.Node, known: Sequence[object]) -> None:
    """Refuses nodes that would make much out of little."""
    if node.op_type not in ("Expand", "Tile", "ConstantOfShape", "Range", "Resize", "Pad", "OneHot", "Upsample"):
        return
    sizes = [v.array for v in known if isinstance(v, Known) and v.array.dtype.kind in "iuf" and v.array.size < 64]
    total = 1.0
    for array in sizes:
        total *= float(np.prod(np.maximum(np.abs(array.astype(np.float64)), 1.0)))
    largest = max([1, *(v.array.size for v in known if isinstance(v, Known))])
    if not total * largest < 1 << 32:
        raise tr.refuse(node, "a constant made very large", "fold the constants of the file first")


def run(tr: Translator, node: ir.Node, arrays: list[np.ndarray | None]) -> list[np.ndarray]:
    """Runs one node of the file on arrays."""
    names = [f"i{i}" if array is not None else "" for i, array in enumerate(arrays)]
    while names and not names[-1]:
        names.pop()
    outputs = [f"o{i}" if value.name else "" for i, value in enumerate(node.outputs)]
    proto = ir.serde.serialize_node(node)
    del proto.input[:], proto.output[:]
    proto.input.extend(names)
    proto.output.extend(outputs)
    proto.name = "n"
    constants = [
        numpy_helper.from_array(np.asarray(array, order="C"), name)
        for name, array in zip(names, arrays, strict=False)
        if array is not None and name
    ]
    results = [onnx.ValueInfoProto(name=name) for name in outputs if name]
    graph = helper.make_graph([proto], "fold", [], results, constants)
    model = helper.make_model(graph, opset_imports=[onnx.OperatorSetIdProto(version=tr.source.opset)], ir_version=8)
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
        for value, known in zip(model.graph.output, inferred.graph.output, strict=True):
            value.CopyFrom(known)
            elements = math.prod(max(dim.dim_value, 1) for dim in known.type.tensor_type.shape.dim)
            if elements >= MAX_ELEMENTS:
                raise LoweringError(
                    f"node {tr.label(node)!r} ({node.op_type}) makes a constant of {elements} elements, expected fewer "
                    f"than {MAX_ELEMENTS}; fold the constants of the file first"
                )
        found = open_session(model.SerializeToString()).run(None, {})
    except LoweringError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise LoweringError(f"node {tr.label(node)!r} ({node.op_type}) of constants cannot be run: {first}") from error
    return [np.asarray(array) for array in found]
