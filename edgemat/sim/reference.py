"""The numpy interpreter: every node by its dossier's reference, the definition the other backends are held to.

Codes travel by code tensor name. A recurrent state is one more tensor: a step begins with it, under the name its
readers use (`State.read`), and ends with what the next step begins with (`State.written`).
"""

from __future__ import annotations

from collections.abc import Iterable

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


def initial_states(graph: Graph, samples: int) -> dict[str, np.ndarray]:
    """What the first step of a sequence reads: int64 zeros [samples, ...] for each state, by `State.read`."""
    return {state.read: np.zeros((samples, *state.shape), np.int64) for state in graph.states}


def next_states(graph: Graph, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the step behind the one that computed `tensors` reads, by `State.read`."""
    return {state.read: tensors[state.written] for state in graph.states}


def trace(graph: Graph, codes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Codes of every tensor.

    Args:
        graph: A lowered graph.
        codes: int64 input codes [N, ...] by code tensor name; states that are left out are initial.

    Returns:
        int64 codes by value name, inputs and states included; what a state will hold also under `State.output`.
    """
    tensors = {**initial_states(graph, len(next(iter(codes.values())))), **codes}
    for call in graph.nodes:
        tensors[call.outputs[0]] = call.op.reference(call, *operands(call, tensors))
    tensors.update((state.output, tensors[state.written]) for state in graph.states)
    return tensors


def run_sequence(graph: Graph, codes: dict[str, np.ndarray], names: Iterable[str]) -> dict[str, np.ndarray]:
    """Codes of tensors over whole sequences, each from the initial states.

    Args:
        graph: A lowered graph.
        codes: int64 input codes [T, N, ...] of N sequences of T steps, by code tensor name.
        names: Code tensors to return.

    Returns:
        int64 codes [T, N, ...] by name.
    """
    steps, samples = next(iter(codes.values())).shape[:2]
    wanted = list(dict.fromkeys(names))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
    held = initial_states(graph, samples)
    for step in range(steps):
        tensors = trace(graph, {**held, **{name: array[step] for name, array in codes.items()}})
        held = next_states(graph, tensors)
        for name in wanted:
            parts[name].append(tensors[name])
    return {name: np.stack(arrays) for name, arrays in parts.items()}


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
