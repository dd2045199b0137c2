"""The verb `verify`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from edgemat.errors import EdgematError, ToolchainError
from edgemat.lower.graph import Graph
from edgemat.lower.reader import read
from edgemat.sim import reference
from edgemat.sim.arrays import Arrays, by_name, input_values, to_codes, to_float32
from edgemat.verification import backends as rooms
from edgemat.verification import sequences
from edgemat.verification.corners import corner_codes
from edgemat.verification.isolated import isolated
from edgemat.verification.report import EXACT, MISMATCH, UNAVAILABLE, BackendResult, Mismatch, Report

DEFAULT_SAMPLES = 64


def verify(
    path: str | os.PathLike[str] | Graph,
    inputs: Arrays | None = None,
    *,
    samples: int | None = None,
    steps: int | None = None,
    corner_steps: int | None = None,
    backends: Sequence[str] | None = None,
    codes: bool = False,
    module: Any = None,
    seed: int = 0,
    keep: bool = False,
) -> Report:
    """Runs the same inputs through every backend and compares integer codes for equality.

    Corner vectors (rails, extremes, ties) are added to whatever is given. A file with recurrent states is run on whole
    sequences; what its states hold is compared at every step, as its outputs are. Corner sequences are short ones of
    their own beside them.

    Args:
        path: A lowered file.
        inputs: Real values (cast to float32) [N, ...], or a dict by input name; codes with `codes`. For a file with
            states: sequences [T, N, ...].
        samples: Without `inputs`: how many random samples to draw (default 64; sequences: 4).
        steps: Without `inputs`, for a file with states: how many steps a sequence has (default 256).
        corner_steps: For a file with states: how many steps a corner sequence has (default 32, or those of the other
            sequences if they are shorter); 0 leaves corner sequences out.
        backends: Names (`NAMES`); by default reference, onnx, hls and mcu, those missing here reported as unavailable.
            A backend asked for by name that cannot run is an error.
        codes: `inputs` holds integer codes.
        module: The torch module the file was made of; adds the backend "torch".
        seed: Of the random samples and tie search.
        keep: Whether the report holds what each backend returned for the inputs (`Report.outputs`).

    Returns:
        The report; mismatches do not raise.

    Raises:
        ToolchainError: if a backend asked for by name cannot run here.
        FormatError: for inputs that do not fit the model.
        EdgematError: for an unknown backend, both `inputs` and `samples` or `steps`, or `steps` or `corner_steps`
            without states.
    """
    if inputs is not None and samples is not None:
        raise EdgematError("inputs and samples exclude each other; pass one of them")
    if inputs is not None and steps is not None:
        raise EdgematError("inputs and steps exclude each other; pass one of them")
    for label, given in (("samples", samples), ("steps", steps)):
        if given is not None and given < 1:
            raise EdgematError(f"{label} is {given}, expected at least 1")
    if corner_steps is not None and corner_steps < 0:
        raise EdgematError(f"corner_steps is {corner_steps}, expected at least 1, or 0 for no corner sequences")
    graph = path if isinstance(path, Graph) else read(path)
    recurrent = bool(graph.states)
    for label, given in (("steps", steps), ("corner_steps", corner_steps)):
        if given is not None and not recurrent:
            raise EdgematError(f"{label} is {given}, expected none for {graph.name!r}, which has no recurrent states")
    asked = backends is not None
    names = list(dict.fromkeys(backends if backends is not None else rooms.DEFAULT))
    if module is not None and "torch" not in names:
        names.insert(0, "torch")
    if not names:
        raise EdgematError(f"no backend was named, expected some of {', '.join(rooms.NAMES)}")
    chosen = [rooms.make(name, module) for name in names]
    if recurrent:
        batches = sequences.make_batches(graph, inputs, steps, samples, corner_steps, codes, seed)
        met = sequences.ties_in(graph, batches)
        counts = [batch.count for batch in batches]
        total, corner_count, lengths = sum(counts), sum(counts[1:]), [batch.steps for batch in batches]
    else:
        feeds, values, corner_count, met = _inputs(graph, inputs, samples, codes, seed)
        batches, total, lengths = [rooms.Batch(feeds, values)], len(next(iter(feeds.values()))), []
    with _progress(len(chosen) + 1) as advance:
        advance("reference")
        expected = _expected(graph, batches)
        apart = isolated(graph)
        truth = None if apart is None else reference.run(*apart)
        rows: dict[str, BackendResult] = {}
        kept: dict[str, dict[str, np.ndarray]] = {}
        first: tuple[int, Mismatch] | None = None
        for backend in chosen:
            advance(backend.name)
            reason = backend.missing()
            if reason is not None:
                if asked:
                    raise ToolchainError(f"backend {backend.name!r} cannot run: {reason}")
                rows[backend.name] = BackendResult(UNAVAILABLE, reason=reason)
                continue
            if backend.name == "reference":
                found = expected
            elif recurrent:
                found = backend.run_sequences(graph, batches)
            else:
                found = [backend.run(graph, feeds, values)]
            rows[backend.name] = _sum([_compare(*pair) for pair in zip(expected, found, strict=True)])
            if keep:
                end = None if recurrent else total - corner_count
                names_of = zip(graph.output_names, graph.outputs, strict=True)
                kept[backend.name] = {name: found[0][tensor][:end] for name, tensor in names_of}
            if rows[backend.name].status == MISMATCH:
                if recurrent:
                    at = sequences.locate(graph, backend, batches, expected, found)
                else:
                    at = _locate(graph, backend, feeds, expected[0], found[0])
                if first is None or at[0] < first[0]:
                    first = at
                continue
            if apart is None or truth is None:
                continue
            alone = truth if backend.name == "reference" else backend.run_isolated(*apart)
            if alone is not None:
                rows[backend.name] = _sum([rows[backend.name], _compare(truth, alone)])
            if alone is not None and rows[backend.name].status == MISMATCH:
                at = _locate_isolated(graph, backend.name, truth, alone)
                if first is None or at[0] < first[0]:
                    first = at
    proved = all(call.bounds.magnitude < 1 << 63 for call in graph.nodes)
    steps_run, corner_steps_run = (*lengths, 0, 0)[:2]
    located = None if first is None else first[1]
    return Report(total, corner_count, rows, located, proved, met, steps_run, corner_steps_run, kept)


def _expected(graph: Graph, batches: Sequence[rooms.Batch]) -> list[dict[str, np.ndarray]]:
    """The reference's codes of each batch."""
    if not graph.states:
        return [reference.run(graph, batch.codes) for batch in batches]
    names = sequences.compared(graph)
    return [reference.run_sequence(graph, batch.codes, names) for batch in batches]


def _inputs(
    graph: Graph, inputs: Arrays | None, samples: int | None, codes: bool, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None, int, tuple[int, int]]:
    """Codes of all samples, their float values where the caller gave floats, the corner count and ties met."""
    corners, met = corner_codes(graph, seed)
    count = len(next(iter(corners.values())))
    values: dict[str, np.ndarray] | None = None
    if inputs is None:
        rng = np.random.default_rng(seed + 1)
        drawn = {}
        for name in graph.inputs:
            t = graph.tensors[name]
            shape = (samples or DEFAULT_SAMPLES, *t.sample_shape)
            drawn[name] = t.legal(rng.integers(t.lo, t.hi, shape, np.int64, endpoint=True))
    else:
        drawn = to_codes(graph, inputs, codes)
        if not codes:
            values = {}
            for index, (name, array) in enumerate(by_name(graph, inputs).items()):
                corner = input_values(graph, index, corners[graph.inputs[index]])
                values[name] = np.concatenate([to_float32(name, array), corner])
    return {n: np.concatenate([drawn[n], corners[n]]) for n in graph.inputs}, values, count, met


def _compare(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> BackendResult:
    compared = mismatches = 0
    for name, codes in expected.items():
        other = found.get(name)
        compared += codes.size
        if other is None or other.shape != codes.shape:
            mismatches += codes.size
        else:
            mismatches += int((other != codes).sum())
    return BackendResult(MISMATCH if mismatches else EXACT, compared, mismatches)


def _locate(
    graph: Graph,
    backend: rooms.Backend,
    feeds: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
    found: dict[str, np.ndarray],
) -> tuple[int, Mismatch]:
    """The first node in graph order, and there the first index, at which the backend differs."""
    sample = min(_first_sample(expected[name], found.get(name)) for name in expected)
    one = {name: array[sample : sample + 1] for name, array in feeds.items()}
    truth = reference.trace(graph, one)
    shown: dict[str, np.ndarray] = {}
    try:
        shown = backend.trace(graph, one)
    except (EdgematError, NotImplementedError):
        shown = {}
    order = [(i, call.outputs[0], call.name) for i, call in enumerate(graph.nodes)]
    for position, name, node in order:
        if name in shown and shown[name].shape == truth[name].shape and (shown[name] != truth[name]).any():
            index = [int(i) for i in np.argwhere(shown[name] != truth[name])[0]]
            spot = tuple(index)
            mismatch = Mismatch(
                backend.name, node, [sample, *index[1:]], int(truth[name][spot]), int(shown[name][spot])
            )
            return position, mismatch
    for position, name, node in order or [(0, graph.outputs[0], "input")]:
        other = found.get(name)
        if name in expected and (other is None or other.shape != expected[name].shape):
            return position, Mismatch(backend.name, node, [0], int(expected[name].flat[0]), 0)
        if name in expected and other is not None and (other != expected[name]).any():
            index = [int(i) for i in np.argwhere(other != expected[name])[0]]
            spot = tuple(index)
            return position, Mismatch(backend.name, node, index, int(expected[name][spot]), int(other[spot]))
    name = graph.outputs[0]
    return len(order), Mismatch(backend.name, name, [sample], int(expected[name].flat[0]), 0)


def _sum(parts: Sequence[BackendResult]) -> BackendResult:
    """All comparisons as one row."""
    mismatches = sum(part.mismatches for part in parts)
    return BackendResult(MISMATCH if mismatches else EXACT, sum(part.compared for part in parts), mismatches)


def _locate_isolated(
    graph: Graph, backend: str, truth: dict[str, np.ndarray], alone: dict[str, np.ndarray]
) -> tuple[int, Mismatch]:
    """The first node that differs when it stands alone; the index's sample counts the driving vectors."""
    for position, call in enumerate(graph.nodes):
        name = call.outputs[0]
        other = alone.get(name)
        if name not in truth or (other is not None and (other == truth[name]).all()):
            continue
        index = [0] if other is None else [int(i) for i in np.argwhere(other != truth[name])[0]]
        found = 0 if other is None else int(other[tuple(index)])
        expected = int(truth[name].flat[0] if other is None else truth[name][tuple(index)])
        return position, Mismatch(backend, call.name, index, expected, found)
    raise AssertionError("called without a difference")


def _first_sample(expected: np.ndarray, found: np.ndarray | None) -> int:
    if found is None or found.shape != expected.shape:
        return 0
    wrong = (expected != found).reshape(len(expected), -1).any(axis=1)
    return int(wrong.argmax()) if wrong.any() else len(expected) - 1


@contextmanager
def _progress(steps: int):  # type: ignore[no-untyped-def]
    """A progress bar on stderr when that is a terminal; gives a function that names the next step."""
    if not sys.stderr.isatty():
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("verify {task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=steps)
        started = False

        def advance(name: str) -> None:
            nonlocal started
            bar.update(task, description=name, advance=1 if started else 0)
            started = True

        step: Callable[[str], None] = advance
        yield step
