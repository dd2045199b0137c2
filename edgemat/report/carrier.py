"""In which types an ONNX function body computes: read off the body itself, not off the dossier that wrote it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgemat.op import Call

_INTEGER_KERNELS = {"MatMulInteger", "ConvInteger"}
_MOVES = {"Constant", "Cast", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Identity", "Shape", "Concat", "Slice"}
_FLAGS = {"Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "And", "Or", "Not"}
_REACH = {"float32": 24, "float64": 53, "int32": 31, "int64": 63}
"""Bits of magnitude in which every integer is exact, by carrier."""


def carriers(call: Call, function: ir.Function) -> tuple[str, ...]:
    """Types of the arithmetic in a call's function body, in the order of first use; empty where codes only move.

    Integer kernels are named with their operands, for example ``MatMulInteger(u8 x s8)``.
    """
    types: dict[ir.Value, np.dtype] = {
        value: tensor.dtype for value, tensor in zip(function.inputs, call.x, strict=True)
    }
    found: list[str] = []
    for node in function:
        sources = [types[v] for v in node.inputs if v is not None]
        if node.op_type == "Constant":
            made = np.dtype(node.attributes["value"].value.numpy().dtype)
        elif node.op_type == "Cast":
            made = np.dtype(ir.DataType(node.attributes["to"].value).numpy())
        elif node.op_type in _INTEGER_KERNELS:
            made = np.dtype(np.int32)
        elif node.op_type in _FLAGS:
            made = np.dtype(bool)
        elif node.op_type == "ArgMax":
            made = np.dtype(np.int64)
        elif node.op_type == "Where":
            made = sources[1]
        else:
            made = sources[0] if sources else np.dtype(np.int64)
        for value in node.outputs:
            types[value] = made
        if node.op_type in _MOVES or made == np.dtype(bool):
            continue
        label = made.name
        if node.op_type in _INTEGER_KERNELS:
            label = f"{node.op_type}({' x '.join(_short(kind) for kind in sources[:2])})"
        if label not in found:
            found.append(label)
    return tuple(found)


def reach_bits(names: tuple[str, ...]) -> int:
    """Bits of magnitude the widest of the named carriers holds exactly; 63 where nothing is computed."""
    return max((_REACH.get(name, 31) for name in names), default=63)


def _short(kind: np.dtype) -> str:
    return f"{'u' if kind.kind == 'u' else 's'}{kind.itemsize * 8}"
