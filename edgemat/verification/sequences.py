"""What `verify` does with files that have recurrent states: sequences, and states compared as outputs are.

A sequence begins with the initial states. What random inputs would hardly bring about is done by corner sequences: each
corner vector held for some steps, which drives integrating states to their rails, and all of them in a random order.
Corner sequences have a length of their own: a long sequence that was given does not make them long, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgemat.errors import EdgematError, FormatError
from edgemat.lower.graph import Graph
from edgemat.sim import reference
from edgemat.sim.arrays import Arrays, by_name, input_values, to_codes, to_float32
from edgemat.verification.backends import Backend, Batch
from edgemat.verification.corners import corner_codes, tie_hits, ties_met
from edgemat.verification.report import Mismatch

Codes = dict[str, np.ndarray]
DEFAULT_STEPS = 256
DEFAULT_SEQUENCES = 4
CORNER_STEPS = 32
HELD_STEPS = 8
TIE_STEPS = 64


def compared(graph: Graph) -> list[str]:
    """What every backend shows at every step: the outputs' code tensors, and each state under `State.output`."""
    return [*graph.outputs, *(state.output for state in graph.states)]


def make_batches(
    graph: Graph,
    inputs: Arrays | None,
    steps: int | None,
    samples: int | None,
    corner_steps: int | None,
    codes: bool,
    seed: int,
) -> list[Batch]:
    """The sequences to run: those given (or random ones), and behind them the corner sequences.

    Args:
        graph: A lowered graph with recurrent states.
        inputs: Sequences [T, N, ...], values or `codes`; None draws some.
        steps: T of random sequences.
        samples: N of random sequences.
        corner_steps: Steps of a corner sequence; 0 for none of them; None for `CORNER_STEPS`, or T where that is less.
        codes: Whether `inputs` holds codes.
        seed: Of the random sequences, the search for ties and the random order of the corner vectors.

    Returns:
        One batch, or two with corner sequences; the second has values where the first has them.

    Raises:
        FormatError: if `inputs` are no sequences [T, N, ...] of the model's inputs.
    """
    if inputs is None:
        drawn = Batch(_random(graph, steps or DEFAULT_STEPS, samples or DEFAULT_SEQUENCES, seed + 1))
    else:
        drawn = _given(graph, inputs, codes)
    length = min(CORNER_STEPS, drawn.steps) if corner_steps is None else corner_steps
    if not length:
        return [drawn]
    corners = _corners(graph, length, seed)
    if drawn.values is None:
        return [drawn, Batch(corners)]
    values = {}
    for index, name in enumerate(graph.input_names):
        tensor = graph.input_type(index)
        found = corners[tensor.name]
        flat = found.reshape(-1, *tensor.sample_shape)
        values[name] = input_values(graph, index, flat).reshape(found.shape)
    return [drawn, Batch(corners, values)]


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


def _given(graph: Graph, inputs: Arrays, codes: bool) -> Batch:
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
        return Batch(drawn)
    real = {name: to_float32(name, array) for name, array in by_name(graph, flat).items()}
    return Batch(drawn, {name: array.reshape(steps, samples, *array.shape[1:]) for name, array in real.items()})


def _corners(graph: Graph, steps: int, seed: int) -> Codes:
    """Codes [steps, N, ...]: every corner vector held in turn, and every one in a random order, on as many sequences as
    that takes."""
    vectors, _ = corner_codes(graph, seed)
    count = len(next(iter(vectors.values())))
    held = np.repeat(np.arange(count), min(HELD_STEPS, steps))
    shuffled = np.random.default_rng(seed + 2).permutation(count)
    rows = [np.resize(order, (-(-len(order) // steps), steps)) for order in (held, shuffled)]
    places = np.concatenate(rows).T
    return {name: array[places] for name, array in vectors.items()}


def ties_in(graph: Graph, batches: Sequence[Batch]) -> tuple[int, int]:
    """`ties_met` over the first steps of all sequences."""
    hits = []
    for batch in batches:
        held = reference.initial_states(graph, batch.count)
        for step in range(min(TIE_STEPS, batch.steps)):
            tensors = reference.trace(graph, {**held, **{name: array[step] for name, array in batch.codes.items()}})
            held = reference.next_states(graph, tensors)
            found = tie_hits(graph, tensors)
            if found is None:
                return 0, 0
            hits.append(found)
    return ties_met(np.concatenate(hits))


def locate(
    graph: Graph, backend: Backend, batches: Sequence[Batch], expected: Sequence[Codes], found: Sequence[Codes]
) -> tuple[int, Mismatch]:
    """The first step at which a backend differs, there the first sequence, the first node in graph order, the index.

    Corner sequences come behind all others: they are looked at where the others are equal, and counted on from them.

    Returns:
        The node's place in the graph, and the difference.
    """
    names = compared(graph)
    for truth, shown in zip(expected, found, strict=True):
        for name in names:
            if name not in shown or shown[name].shape != truth[name].shape:
                return len(graph.nodes), Mismatch(backend.name, name, [0], int(truth[name].flat[0]), 0, 0)
    differs = [any((truth[n] != shown[n]).any() for n in names) for truth, shown in zip(expected, found, strict=True)]
    which = differs.index(True)
    wrong = np.stack([_rows(expected[which][name], found[which][name]) for name in names])
    step = int(wrong.any(axis=(0, 2)).argmax())
    sequence = int(wrong[:, step].any(axis=0).argmax())
    codes = batches[which].codes
    alone = {name: array[: step + 1, sequence : sequence + 1] for name, array in codes.items()}
    inner = [call.outputs[0] for call in graph.nodes]
    truth = {name: array[step, 0] for name, array in reference.run_sequence(graph, alone, [*inner, *names]).items()}
    # What ran before may be the fault.
    before = [*batches[:which], Batch({name: array[:, : sequence + 1] for name, array in codes.items()})]
    try:
        traced = backend.trace_sequences(graph, before)[which]
        shown = {name: array[step, sequence] for name, array in traced.items()}
    except (EdgematError, NotImplementedError):
        shown = {}
    shown |= {name: found[which][name][step, sequence] for name in names}
    owners = [(place, call.outputs[0], call.name) for place, call in enumerate(graph.nodes)]
    owners += [(len(owners), state.output, f"state {state.name}") for state in graph.states]
    owners += [(len(owners), name, name) for name in graph.outputs]
    number = sequence + sum(batch.count for batch in batches[:which])
    for place, name, node in owners:
        if name in shown and shown[name].shape == truth[name].shape and (shown[name] != truth[name]).any():
            index = [int(i) for i in np.argwhere(shown[name] != truth[name])[0]]
            at = tuple(index)
            codes_at = int(truth[name][at]), int(shown[name][at])
            return place, Mismatch(backend.name, node, [number, *index], *codes_at, step)
    raise AssertionError("called without a difference")


def _rows(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """bool [T, N]: where anything differs."""
    return (expected != found).reshape(*expected.shape[:2], -1).any(axis=2)
