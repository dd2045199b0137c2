"""The numpy interpreter: every node by its dossier's reference, the definition the other backends are held to."""

from __future__ import annotations

import numpy as np

from edgemat.lower.graph import Graph
from edgemat.op import Call

CHUNK_ELEMENTS = 1 << 22


def operands(call: Call, tensors: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Codes of a call's inputs, constants included."""
    found = []
    for index, name in enumerate(call.inputs):
        constant = call.constant(index)
        found.append(tensors[name] if constant is None else constant)
    return found


def trace(graph: Graph, codes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Codes of every tensor.

    Args:
        graph: A lowered graph.
        codes: int64 input codes [N, ...] by code tensor name.

    Returns:
        int64 codes by value name, inputs included.
    """
    tensors = dict(codes)
    for call in graph.nodes:
        tensors[call.outputs[0]] = call.op.reference(call, *operands(call, tensors))
    return tensors


def chunk_size(graph: Graph) -> int:
    """Samples per slice so that the largest tensor's windows stay within memory."""
    largest = max([t.size for t in graph.tensors.values()] or [1])
    return max(1, min(4096, CHUNK_ELEMENTS // (largest * 9)))


def run(graph: Graph, codes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Codes of the outputs by code tensor name, computed slice by slice."""
    total = len(next(iter(codes.values())))
    step = chunk_size(graph)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in graph.outputs}
    for start in range(0, total, step):
        found = trace(graph, {name: array[start : start + step] for name, array in codes.items()})
        for name in parts:
            parts[name].append(found[name])
    return {name: np.concatenate(pieces) for name, pieces in parts.items()}
