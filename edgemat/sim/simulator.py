"""The fast simulator: a lowered file on onnxruntime, bit for bit."""

from __future__ import annotations

import collections
import gc
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import TypeVar

import numpy as np
import onnxruntime

from edgemat import formats
from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.lower.graph import Graph
from edgemat.lower.reader import read
from edgemat.op import Tensor
from edgemat.sim import reference, session
from edgemat.sim.arrays import (
    Arrays,
    by_name,
    check_codes,
    output_scale,
    output_values,
    refuse_index,
    refuse_infinity,
    single,
    to_codes,
    to_float32,
)
from edgemat.sim.carriers import SINGLE
from edgemat.sim.fused import Ports, fuse

Result = TypeVar("Result")
SLICE_BYTES = 1 << 19
"""A slice of the batch whose largest tensor has this size stays in a core's second-level cache."""


class Simulator:
    """Runs a lowered file; outputs are those of the hardware, to the bit.

    The file is canonical. What runs is a fused copy of it in memory (`edgemat.sim.fused`), in slices of the batch, one
    thread a slice; `OMP_NUM_THREADS` bounds the threads. A Simulator may be used from several threads, unless the file
    has recurrent states.

    A file with states is one step of a recurrent network: each call computes a step and keeps the states for the next;
    `reset` begins another sequence, `run_sequence` runs many steps. All steps of a sequence have the same batch.

    Args:
        path: A lowered file, or a `Graph` that was read already.

    Attributes:
        graph: The checked graph.

    Raises:
        LoweringError: if the file is not a lowered file this edgemat reads.
    """

    def __init__(self, path: str | os.PathLike[str] | Graph) -> None:
        self.graph = path if isinstance(path, Graph) else read(path)
        self._states: dict[str, np.ndarray] = {}  # by State.read, in the code types; empty: initial

    @cached_property
    def _from_values(self) -> tuple[Ports, onnxruntime.InferenceSession]:
        return self._opened(from_codes=False)

    @cached_property
    def _from_codes(self) -> tuple[Ports, onnxruntime.InferenceSession]:
        return self._opened(from_codes=True)

    def _opened(self, from_codes: bool) -> tuple[Ports, onnxruntime.InferenceSession]:
        """A session over the fused graph; its large weights are the session's alone."""
        fused = fuse(self.graph, from_codes)
        ports, weights = fused.ports, fused.weights
        try:
            serialized = session.Serialized.of(fused.model)
            del fused
            if weights is not None:
                gc.collect()  # the nodes of a large model are megabytes, and refer to each other
            return ports, session.open_session(serialized, threads=1)
        finally:
            if weights is not None:
                weights.remove()

    def _run(self, x: Arrays, codes: bool) -> dict[str, np.ndarray]:
        """Outputs in their carriers by code tensor name."""
        arrays = list(by_name(self.graph, x).items())
        types = [self.graph.input_type(index) for index in range(len(arrays))]
        ports, active = self._from_codes if codes else self._from_values
        used = {value.name for value in active.get_inputs()}
        total = len(arrays[0][1])
        largest = max(tensor.size for tensor in self.graph.tensors.values())
        workers = session.thread_count()
        step = max(1, min(SLICE_BYTES // (4 * largest), -(-total // workers)))
        held = self._held(total)

        def run_slice(start: int) -> list[np.ndarray]:
            feeds = {}
            for (name, array), tensor, fed in zip(arrays, types, ports.inputs, strict=True):
                part = array[start : start + step]
                made = (
                    check_codes(name, part, tensor).astype(tensor.dtype)
                    if codes
                    else _values(self.graph, name, part, tensor)
                )
                if fed in used:
                    feeds[fed] = made
            for state, fed in zip(self.graph.states, ports.states, strict=True):
                if fed in used:
                    feeds[fed] = held[state.read][start : start + step]
            return active.run(None, feeds)

        starts = range(0, total, step)
        found = share(run_slice, starts, min(workers, len(starts)))
        parts = [found[start] for start in starts]
        made = {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(ports.outputs)}
        for state in self.graph.states:
            self._states[state.read] = made[state.written].astype(self.graph.tensors[state.read].dtype)
        return made

    # -- recurrent states -----------------------------------------------------------------------------------------
    def reset(self) -> None:
        """Begins another sequence: every state is its initial one, for a batch of any size."""
        self._states = {}

    @property
    def state(self) -> dict[str, np.ndarray]:
        """int64 codes [N, ...] of the states that the next step will read, by name; empty before a first step."""
        return {s.name: self._states[s.read].astype(np.int64) for s in self.graph.states if s.read in self._states}

    @state.setter
    def state(self, codes: Mapping[str, np.ndarray]) -> None:
        names = [state.name for state in self.graph.states]
        if set(codes) not in (set(), set(names)):
            raise FormatError(f"states {', '.join(codes)} were given, expected {', '.join(names) or 'none'}")
        made = {}
        for state in self.graph.states if codes else ():
            tensor = self.graph.tensors[state.read]
            array = np.asarray(codes[state.name])
            if array.ndim == 0 or array.shape[1:] != state.shape or len(array) != len(codes[names[0]]):
                raise FormatError(
                    f"state {state.name!r} was given in shape {array.shape}, expected "
                    f"(N, {', '.join(map(str, state.shape))})"
                )
            made[state.read] = check_codes(state.name, array, tensor).astype(tensor.dtype)
        self._states = made

    def _held(self, samples: int) -> dict[str, np.ndarray]:
        """The states that a step of so many samples reads, in the code types."""
        if not self._states:
            zeros = reference.initial_states(self.graph, samples)
            return {name: array.astype(self.graph.tensors[name].dtype) for name, array in zeros.items()}
        kept = len(next(iter(self._states.values())))
        if kept != samples:
            raise FormatError(
                f"the states hold {kept} samples and the step has {samples}, expected the same number in every step of "
                "a sequence; call reset() before another sequence"
            )
        return self._states

    def run_sequence(self, x: Arrays, codes: bool = False) -> np.ndarray | dict[str, np.ndarray]:
        """The outputs of many steps, one call after the other, from the present states on.

        Args:
            x: One array [T, N, ...] of T steps, or a dict by input name.
            codes: `x` holds integer codes, and the result shall too.

        Returns:
            One array [T, N, ...], or a dict by output name where there are several.

        Raises:
            FormatError: as `__call__`, and for a batch that differs from the states'.
        """
        given = x if isinstance(x, Mapping) else {self.graph.input_names[0]: x}
        arrays = {name: np.asarray(array) for name, array in given.items()}
        lengths = {array.shape[0] if array.ndim > 1 else 0 for array in arrays.values()}
        if len(lengths) != 1 or 0 in lengths:
            raise FormatError(
                f"a sequence of shape {', '.join(str(a.shape) for a in arrays.values())} was given, expected "
                "(T, N, ...) with the same number of steps in every input"
            )
        parts = []
        for step in range(lengths.pop()):
            made = self({name: array[step] for name, array in arrays.items()}, codes=codes)
            parts.append(made if isinstance(made, dict) else {self.graph.output_names[0]: made})
        return single({name: np.stack([part[name] for part in parts]) for name in parts[0]})

    def codes(self, x: Arrays, codes: bool = False) -> np.ndarray | dict[str, np.ndarray]:
        """int64 output codes.

        Args:
            x: One array [N, ...], or a dict by input name; real values (cast to float32), or codes with `codes`.
            codes: `x` holds integer codes.

        Returns:
            int64 array, or a dict by output name where there are several.

        Raises:
            FormatError: for wrong names or shapes, NaN, codes outside the input's format, infinities under WRAP.
        """
        found = self._run(x, codes)
        pairs = zip(self.graph.output_names, self.graph.outputs, strict=True)
        return single({name: found[tensor].astype(np.int64) for name, tensor in pairs})

    def __call__(self, x: Arrays, codes: bool = False) -> np.ndarray | dict[str, np.ndarray]:
        """Real output values (float32 up to 24 bits, float64 beyond); with `codes`, codes in and codes out.

        Args:
            x: One array [N, ...], or a dict by input name.
            codes: `x` holds integer codes, and the result shall too.

        Returns:
            One array, or a dict by output name where there are several.

        Raises:
            FormatError: for wrong names or shapes, NaN, codes outside the input's format, infinities under WRAP.
        """
        if codes:
            return self.codes(x, codes=True)
        found = self._run(x, False)
        values = {}
        for index, (name, tensor) in enumerate(zip(self.graph.output_names, self.graph.outputs, strict=True)):
            if output_scale(self.graph, index) is None:
                values[name] = _real(found[tensor], self.graph.tensors[tensor].format)
            else:
                values[name] = output_values(self.graph, index, found[tensor])
        return single(values)

    def trace(self, x: Arrays, codes: bool = False) -> dict[str, np.ndarray]:
        """Codes of every tensor, by ONNX value name, as the file's own bodies compute them.

        With states: those of the next step, which is not taken.
        """
        made = to_codes(self.graph, x, codes)
        held = self._held(len(next(iter(made.values()))))
        return onnx_trace(self.graph, {**made, **{name: array.astype(np.int64) for name, array in held.items()}})


def onnx_trace(graph: Graph, codes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Codes of every tensor of one step as the file's own bodies compute them under onnxruntime.

    States that `codes` leaves out are initial.
    """
    inner = [call.outputs[0] for call in graph.nodes]
    made = {**reference.initial_states(graph, len(next(iter(codes.values())))), **codes}
    if inner:
        active = session.open_session(session.code_model(graph, inner, from_codes=True))
        used = {i.name for i in active.get_inputs()}
        feeds = {k: v for k, v in session.feed_codes(graph, made).items() if k in used}
        for name, array in zip(inner, active.run(inner, feeds), strict=True):
            made[name] = array.astype(np.int64)
    return made


def share(task: Callable[[int], Result], items: range, workers: int) -> dict[int, Result]:
    """Results of a task by item; the calling thread and `workers - 1` others take the next item in turn.

    A helper that has not begun when the items are used up is called off, so a busy machine costs nothing.
    """
    waiting = iter(items)  # the next item of a range is taken atomically
    done: dict[int, Result] = {}

    def work() -> None:
        try:
            for item in waiting:
                done[item] = task(item)
        except BaseException:
            collections.deque(waiting, maxlen=0)  # no one need begin another
            raise

    helpers = [_pool(workers - 1).submit(work) for _ in range(workers - 1)]
    try:
        work()
    finally:
        running = [helper for helper in helpers if not helper.cancel()]
        errors = [helper.exception() for helper in running]
    for error in errors:
        if error is not None:
            raise error
    return done


@lru_cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="edgemat-simulator")


def _values(graph: Graph, name: str, array: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Checked float32 values for an input quantiser."""
    values = to_float32(name, array)
    if tensor.format.overflow == "WRAP":
        refuse_infinity(name, values, tensor.format)
    refuse_index(graph, name, values, tensor)
    return values


def _real(codes: np.ndarray, fmt: Fixed) -> np.ndarray:
    """Values of codes in any carrier; adding 0 turns a float carrier's -0 into 0."""
    if codes.dtype == SINGLE and fmt.width <= 24 and max(map(abs, fmt.fracs)) <= 100:
        factors = np.ldexp(1.0, -formats.channel_array(fmt.fracs, codes.ndim)).astype(np.float32)
        return codes * factors + np.float32(0)
    return formats.dequantize(codes.astype(np.int64), fmt)
