"""The sums of a network taken apart, so that each can be driven to both ends of its proved interval.

Inputs of the whole network reach the extremes of the first sums only (`corners.extremes`). For the others the node that
holds the sum stands alone in a graph: same weights, same proved input interval, hence the same accumulators and the
same generated code, but its operand is an input. All of them lie side by side, so a backend compiles once.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime

from edgemat.lower.graph import Graph
from edgemat.op import Call
from edgemat.sim import session
from edgemat.verification.corners import driving_codes, reads_input

SUMS = ("Linear", "Conv")
ROWS = 8


def isolated(graph: Graph) -> tuple[Graph, dict[str, np.ndarray]] | None:
    """The graph of all sums that no network input reaches directly, and its driving codes; None where there is none.

    Args:
        graph: A lowered graph.

    Returns:
        A graph whose inputs are called ``<node>_operand``, and int64 codes [N, ...] by those names: for up to `ROWS`
        channels of each node the operands of its largest and its smallest sum.
    """
    calls = [c for c in graph.nodes if c.op.name in SUMS and not reads_input(graph, c)]
    if not calls:
        return None
    nodes, inputs, codes = [], [], {}
    for call in calls:
        operand = replace(call.x[0], name=f"{call.name}_operand")
        nodes.append(
            Call(call.op, call.name, (operand, *call.x[1:]), dict(call.attrs), dict(call.constants), call.outputs)
        )
        inputs.append(operand)
        codes[operand.name] = np.stack(driving_codes(call, ROWS))
    longest = max(len(array) for array in codes.values())
    codes = {name: np.resize(array, (longest, *array.shape[1:])) for name, array in codes.items()}
    outputs = [node.outputs[0] for node in nodes]
    tensors = {t.name: t for t in inputs} | {t.name: t for node in nodes for t in node.y}
    names = [t.name for t in inputs]
    return Graph(graph.name, names, outputs, names, outputs, nodes, tensors, graph.constants, {}, graph.model), codes


def onnx_session(graph: Graph) -> onnxruntime.InferenceSession:
    """The isolated nodes as the file's own bodies compute them under onnxruntime.

    Args:
        graph: A graph `isolated` made.
    """
    model = session.copy(graph.model)
    by_name = {node.name: node for node in model.graph}
    chosen = [by_name[call.name] for call in graph.nodes]
    fresh = []
    for call, node in zip(graph.nodes, chosen, strict=True):
        old = node.inputs[0]
        assert old is not None
        value = ir.Value(name=call.inputs[0], type=old.type, shape=old.shape)
        node.replace_input_with(0, value)
        fresh.append(value)
    model.graph.outputs.clear()
    model.graph.outputs.extend(node.outputs[0] for node in chosen)
    for node in reversed(list(model.graph)):
        if node not in chosen:
            model.graph.remove(node, safe=False)
    model.graph.inputs.clear()
    model.graph.inputs.extend(fresh)
    return session.open_session(model)
