"""Small edits every pass needs: a new edgemat node, and sending all readers of one value to another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from edgemat.body import DOMAIN
from edgemat.lower.typing import type_node


def make_node(
    op_type: str, inputs: Sequence[ir.Value], attrs: dict[str, Any], name: str, output: str | None = None
) -> ir.Node:
    """An edgemat node with one output named after it (or `output`)."""
    made = [ir.convenience.convert_attribute(k, list(v) if isinstance(v, tuple) else v) for k, v in attrs.items()]
    return ir.Node(DOMAIN, op_type, list(inputs), made, outputs=[ir.Value(name=output or f"{name}_out")], name=name)


def is_op(node: ir.Node | None, op_type: str) -> bool:
    """Whether a node is the named edgemat operator."""
    return node is not None and node.domain == DOMAIN and node.op_type == op_type


def replace_value(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """All readers of `old`, graph outputs included, read `new`; `new` takes over the name of a graph output."""
    for user, index in list(old.uses()):
        user.replace_input_with(index, new)
    for index, value in enumerate(graph.outputs):
        if value is old:
            graph.outputs[index] = new


def insert_requantize(graph: ir.Graph, node: ir.Node, index: int, fmt: str) -> None:
    """Puts a Requantize to `fmt` before input `index` of `node`; an equal one is shared."""
    value = node.inputs[index]
    assert value is not None
    for user, _ in value.uses():
        if is_op(user, "Requantize") and user.attributes["requantize"].value == fmt and user.meta.get("aligned"):
            node.replace_input_with(index, user.outputs[0])
            return
    made = make_node("Requantize", [value], {"requantize": fmt}, f"{value.name}_aligned")
    made.meta["aligned"] = True
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, made)
    else:
        graph.insert_before(node, made)
    type_node(made)
    node.replace_input_with(index, made.outputs[0])
