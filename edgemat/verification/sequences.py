"""What `verify` does with files that have recurrent states: sequences, and states compared as outputs are.

A sequence begins with the initial states. What random inputs would hardly bring about is done by corner sequences: each
corner vector held for some steps, which drives integrating states to their rails, and all of them in a random order.
"""

from __future__ import annotations

import numpy as np

from edgemat import formats
from edgemat.errors import EdgematError, FormatError
from edgemat.lower.graph import Graph
from edgemat.sim import reference
from edgemat.sim.arrays import Arrays, by_name, to_codes, to_float32
from edgemat.verification.backends import Backend
from edgemat.verification.corners import corner_codes, tie_hits, ties_met
from edgemat.verification.report import Mismatch

Codes = dict[str, np.ndarray]
DEFAULT_STEPS = 256
DEFAULT_SEQUENCES = 4
HELD_STEPS = 8
TIE_STEPS = 64


def compared(graph: Graph) -> list[str]:
    """What every backend shows at every step: the outputs' code tensors, and each state under `State.output`."""
    return [*graph.outputs, *(state.output for state in graph.states)]


def make_sequences(
    graph: Graph, inputs: Arrays | None, steps: int | None, samples: int | None, codes: bool, seed: int
) -> tuple[Codes, Codes | None, int]:
    """Input codes [T, N, ...] of all sequences, their float values where the caller gave floats, the corner sequences.

    Raises:
        FormatError: if `inputs` are no sequences [T, N, ...] of the model's inputs.
    """
    values: Codes | None = None
    if inputs is None:
        drawn = _random(graph, steps or DEFAULT_STEPS, samples or DEFAULT_SEQUENCES, seed + 1)
    else:
        drawn, values = _given(graph, inputs, codes)
    length = next(iter(drawn.values())).shape[0]
    corners = _corners(graph, length, seed)
    count = next(iter(corners.values())).shape[1]
    if values is not None:
        for index, name in enumerate(graph.input_names):
            tensor = graph.input_type(index)
            flat = corners[tensor.name].reshape(length * count, *tensor.sample_shape)
            real = formats.dequantize(flat, tensor.format).astype(np.float32).reshape(corners[tensor.name].shape)
            values[name] = np.concatenate([values[name], real], axis=1)
    return {name: np.concatenate([drawn[name], corners[name]], axis=1) for name in graph.inputs}, values, count


def _random(graph: Graph, steps: int, samples: int, seed: int) -> Codes:
    """Uniform codes; every second sequence is a quarter as large, so that its states do not only saturate."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for name in graph.inputs:
        tensor = graph.tensors[name]
        shape = (steps, samples, *tensor.sample_shape)
        codes = rng.integers(tensor.lo, tensor.hi, shape, np.int64, endpoint=True)
        codes[:, 1::2] = np.clip(codes[:, 1::2] // 4, tensor.lo, tensor.hi)
        drawn[name] = tensor.legal(codes.reshape(-1, *tensor.sample_shape)).reshape(shape)
    return drawn


def _given(graph: Graph, inputs: Arrays, codes: bool) -> tuple[Codes, Codes | None]:
    given = inputs if isinstance(inputs, dict) else {graph.input_names[0]: np.asarray(inputs)}
    arrays = {name: np.asarray(array) for name, array in given.items()}
    shapes = {array.shape[:2] for array in arrays.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2 or 0 in next(iter(shapes)):
        raise FormatError(
            f"inputs of shape {', '.join(str(a.shape) for a in arrays.values())} were given for a file with recurrent "
            "states, expected sequences (T, N, ...) with the same T and N in every input"
        )
    steps, samples = next(iter(shapes))
    flat = {name: array.reshape(steps * samples, *array.shape[2:]) for name, array in arrays.items()}
    made = to_codes(graph, flat, codes)
    drawn = {name: array.reshape(steps, samples, *array.shape[1:]) for name, array in made.items()}
    if codes:
        return drawn, None
    real = {name: to_float32(name, array) for name, array in by_name(graph, flat).items()}
    return drawn, {name: array.reshape(steps, samples, *array.shape[1:]) for name, array in real.items()}


def _corners(graph: Graph, steps: int, seed: int) -> Codes:
    vectors, _ = corner_codes(graph, seed)
    count = len(next(iter(vectors.values())))
    held = max(1, min(HELD_STEPS, steps // count))
    order = np.repeat(np.arange(count), held)
    rows = -(-len(order) // steps)
    shuffled = np.random.default_rng(seed + 2).permutation(np.resize(np.arange(count), steps))
    places = np.stack([*np.resize(order, (rows, steps)), shuffled], axis=1)
    return {name: array[places] for name, array in vectors.items()}


def ties_in(graph: Graph, codes: Codes) -> tuple[int, int]:
    """`ties_met` over the first steps of all sequences."""
    held = reference.initial_states(graph, next(iter(codes.values())).shape[1])
    hits = []
    for step in range(min(TIE_STEPS, next(iter(codes.values())).shape[0])):
        tensors = reference.trace(graph, {**held, **{name: array[step] for name, array in codes.items()}})
        held = reference.next_states(graph, tensors)
        found = tie_hits(graph, tensors)
        if found is None:
            return 0, 0
        hits.append(found)
    return ties_met(np.concatenate(hits))


def locate(graph: Graph, backend: Backend, codes: Codes, expected: Codes, found: Codes) -> tuple[int, Mismatch]:
    """The first step at which a backend differs, there the first sequence, the first node in graph order, the index.

    Returns:
        The node's place in the graph, and the difference.
    """
    names = compared(graph)
    for name in names:
        if name not in found or found[name].shape != expected[name].shape:
            return len(graph.nodes), Mismatch(backend.name, name, [0], int(expected[name].flat[0]), 0, 0)
    wrong = np.stack([_rows(expected[name], found[name]) for name in names])
    step = int(wrong.any(axis=(0, 2)).argmax())
    sequence = int(wrong[:, step].any(axis=0).argmax())
    alone = {name: array[: step + 1, sequence : sequence + 1] for name, array in codes.items()}
    before = {name: array[:, : sequence + 1] for name, array in codes.items()}  # what they left may be the fault
    inner = [call.outputs[0] for call in graph.nodes]
    truth = {name: array[step, 0] for name, array in reference.run_sequence(graph, alone, [*inner, *names]).items()}
    try:
        shown = {name: array[step, sequence] for name, array in backend.trace_sequence(graph, before).items()}
    except (EdgematError, NotImplementedError):
        shown = {}
    shown |= {name: found[name][step, sequence] for name in names}
    owners = [(place, call.outputs[0], call.name) for place, call in enumerate(graph.nodes)]
    owners += [(len(owners), state.output, f"state {state.name}") for state in graph.states]
    owners += [(len(owners), name, name) for name in graph.outputs]
    for place, name, node in owners:
        if name in shown and shown[name].shape == truth[name].shape and (shown[name] != truth[name]).any():
            index = [int(i) for i in np.argwhere(shown[name] != truth[name])[0]]
            at = tuple(index)
            codes_at = int(truth[name][at]), int(shown[name][at])
            return place, Mismatch(backend.name, node, [sequence, *index], *codes_at, step)
    raise AssertionError("called without a difference")


def _rows(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """bool [T, N]: where anything differs."""
    return (expected != found).reshape(*expected.shape[:2], -1).any(axis=2)
