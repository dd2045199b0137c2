"""One sample of codes for a graph and what the reference makes of it: the self-test of the generated example."""

from __future__ import annotations

from typing import Any

import numpy as np


def sample_codes(graph: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Deterministic input codes over each input's whole interval, and every tensor the reference computes from them.

    Args:
        graph: A `Graph` of `edgemat.lower.reader`.

    Returns:
        Input codes ``[1, *shape]`` by tensor name, and the codes of every tensor by name.
    """
    inputs = {}
    for seed, name in enumerate(graph.inputs):
        tensor = graph.tensors[name]
        rng = np.random.default_rng(seed)
        codes = rng.integers(tensor.lo, tensor.hi, (1, *tensor.sample_shape), np.int64, endpoint=True)
        codes.flat[0], codes.flat[-1] = tensor.lo, tensor.hi
        inputs[name] = tensor.legal(codes)
    return inputs, run_reference(graph, inputs)


def run_reference(graph: Any, codes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every tensor of the graph, by the dossiers' reference; states that `codes` leaves out are initial.

    Args:
        graph: A `Graph` of `edgemat.lower.reader`.
        codes: int64 codes ``[N, *shape]`` of every input by tensor name.

    Returns:
        int64 codes of every tensor by name, the inputs included.
    """
    samples = len(next(iter(codes.values())))
    initial = {state.read: np.zeros((samples, *state.shape), np.int64) for state in getattr(graph, "states", ())}
    known = {**initial, **codes}
    for call in graph.nodes:
        operands = []
        for position, name in enumerate(call.inputs):
            constant = call.constant(position)
            operands.append(known[name] if constant is None else constant)
        known[call.outputs[0]] = call.op.reference(call, *operands)
    return known
