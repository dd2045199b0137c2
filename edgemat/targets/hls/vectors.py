"""Sample vectors for the test bench, and the byte order of its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgemat.targets.layout import NativeTensor, Network

SAMPLES = 4
STEPS = 16


def sample_vectors(network: Network) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Deterministic input codes, rails first, then random ones, and what the reference makes of them.

    Returns:
        int64 codes ``[SAMPLES, *shape]`` of every input by code-tensor name, and of every tensor by name. Of a network
        with states: one sequence of ``STEPS`` steps.
    """
    graph = network.graph
    count = STEPS if network.states else SAMPLES
    codes = {}
    for seed, name in enumerate(graph.inputs):
        tensor = graph.tensors[name]
        rng = np.random.default_rng(seed)
        drawn = rng.integers(tensor.lo, tensor.hi, (count, *tensor.sample_shape), np.int64, endpoint=True)
        drawn[0], drawn[1] = tensor.lo, tensor.hi
        codes[name] = tensor.legal(drawn)
    if not network.states:
        return codes, run_reference(network, codes)
    held: dict[str, np.ndarray] = {}
    steps = []
    for step in range(count):
        found = run_reference(network, {**held, **{name: array[step : step + 1] for name, array in codes.items()}})
        held = {state.read: found[state.written] for state in graph.states}
        steps.append(found)
    return codes, {name: np.concatenate([found[name] for found in steps]) for name in steps[0]}


def run_reference(network: Network, codes: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Codes of every tensor of the network's graph, by the dossiers' reference; states left out are initial."""
    samples = len(next(iter(codes.values())))
    initial = {s.read.name: np.zeros((samples, *s.read.logical), np.int64) for s in network.states}
    known = {**initial, **codes}
    for call in network.graph.nodes:
        operands = []
        for position, name in enumerate(call.inputs):
            constant = call.constant(position)
            operands.append(known[name] if constant is None else constant)
        known[call.outputs[0]] = call.op.reference(call, *operands)
    return known


def encode(tensors: Sequence[NativeTensor], codes: Mapping[str, np.ndarray], resets: np.ndarray | None = None) -> bytes:
    """Codes ``[N, *shape]`` by graph tensor name as little-endian int64, sample by sample, port by port.

    With `resets`, bool ``[N]``, each sample begins with the flag that tells whether it begins a sequence.
    """
    packed = [tensor.pack(np.asarray(codes[tensor.source])) for tensor in tensors]
    if resets is not None:
        packed.insert(0, np.asarray(resets, np.int64)[:, None])
    return np.concatenate(packed, axis=1).astype("<i8").tobytes()


def decode(tensors: Sequence[NativeTensor], data: bytes) -> dict[str, np.ndarray]:
    """The inverse of `encode`: int64 codes ``[N, *shape]`` by graph tensor name."""
    table = np.frombuffer(data, "<i8").reshape(-1, sum(t.size for t in tensors)).astype(np.int64)
    found, at = {}, 0
    for tensor in tensors:
        found[tensor.source] = tensor.unpack(table[:, at : at + tensor.size])
        at += tensor.size
    return found
