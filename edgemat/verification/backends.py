"""The backends verify can hold against the reference: each a name, a way to say it is missing, and a way to run.

A backend takes int64 input codes by code tensor name and gives output codes by code tensor name; `trace` gives every
tensor it can, so that a difference can be pinned on the first node that differs.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgemat.errors import EdgematError, ToolchainError
from edgemat.lower.graph import Graph
from edgemat.sim import reference, session
from edgemat.sim.arrays import input_values
from edgemat.sim.simulator import Simulator, onnx_trace
from edgemat.verification.isolated import onnx_session
from edgemat.verification.shown import codes_of, output_codes, shown_codes, stock_session

Codes = dict[str, np.ndarray]


@dataclass(frozen=True)
class Batch:
    """Sequences of one length, each of which begins with the initial states.

    Attributes:
        codes: int64 input codes [T, N, ...] of N sequences of T steps by code tensor name.
        values: The float inputs by input name where the caller has them, [T, N, ...], too.
    """

    codes: Codes
    values: Codes | None = None

    @property
    def steps(self) -> int:
        """T."""
        return int(next(iter(self.codes.values())).shape[0])

    @property
    def count(self) -> int:
        """N."""
        return int(next(iter(self.codes.values())).shape[1])


class Backend(ABC):
    """One way to compute the outputs."""

    name: str

    def missing(self) -> str | None:
        """Why this backend cannot run here and what to install, or None."""
        return None

    @abstractmethod
    def run(self, graph: Graph, codes: Codes, values: Codes | None) -> Codes:
        """Output codes; `values` holds the float inputs by input name where the caller has them."""

    def trace(self, graph: Graph, codes: Codes) -> Codes:
        """Codes of the tensors this backend can show (outputs at least)."""
        return self.run(graph, codes, None)

    @abstractmethod
    def run_sequences(self, graph: Graph, batches: Sequence[Batch]) -> list[Codes]:
        """Of each batch the output codes [T, N, ...], and what the states hold by `State.output`.

        Further tensors may be among the result. Generated code is compiled once and runs one batch behind the other.
        """

    def trace_sequences(self, graph: Graph, batches: Sequence[Batch]) -> list[Codes]:
        """`run_sequences` with every tensor this backend can show."""
        return self.run_sequences(graph, batches)

    def run_isolated(self, graph: Graph, codes: Codes) -> Codes | None:
        """Output codes of a graph `isolated` made, or None where the backend knows the whole network only."""
        return self.run(graph, codes, None)


class Reference(Backend):
    """The numpy interpreter, run again: catches nothing by itself but states what was compared."""

    name = "reference"

    def run(self, graph: Graph, codes: Codes, values: Codes | None) -> Codes:
        return reference.run(graph, codes)

    def run_sequences(self, graph: Graph, batches: Sequence[Batch]) -> list[Codes]:
        names = [*graph.outputs, *(state.output for state in graph.states)]
        return [reference.run_sequence(graph, batch.codes, names) for batch in batches]


class Onnx(Backend):
    """The file under a stock onnxruntime, and the fast Simulator; both must agree."""

    name = "onnx"

    def run(self, graph: Graph, codes: Codes, values: Codes | None) -> Codes:
        feeds = {}
        for index, name in enumerate(graph.input_names):
            given = input_values(graph, index, codes[graph.inputs[index]])
            feeds[name] = given if values is None or name not in values else values[name]
        stock, wanted = stock_session(graph)
        step = reference.chunk_size(graph)
        total = len(next(iter(feeds.values())))
        parts: list[list[np.ndarray]] = []
        for start in range(0, total, step):
            parts.append(stock.run(wanted, {k: v[start : start + step] for k, v in feeds.items()}))
        made = shown_codes(graph, {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(wanted)})
        # The fast Simulator is held to the file, from codes and, where there are any, from real values.
        simulator = Simulator(graph)
        by_input = {name: codes[graph.inputs[i]] for i, name in enumerate(graph.input_names)}
        runs = [simulator.codes(by_input, codes=True)]
        if values is not None:
            runs.append(simulator.codes({name: feeds[name] for name in graph.input_names}))
        shown = [made]
        for fast in runs:
            rows = fast if isinstance(fast, dict) else {graph.output_names[0]: fast}
            shown.append({t: rows[n] for n, t in zip(graph.output_names, graph.outputs, strict=True)})
        return _worst(shown, lambda: reference.run(graph, codes))

    def run_sequences(self, graph: Graph, batches: Sequence[Batch]) -> list[Codes]:
        return [self._run_batch(graph, batch.codes, batch.values) for batch in batches]

    def _run_batch(self, graph: Graph, codes: Codes, values: Codes | None) -> Codes:
        stock, wanted = stock_session(graph)
        wanted += [state.output for state in graph.states]
        simulator, from_values = Simulator(graph), Simulator(graph)
        states = graph.states
        steps, samples = next(iter(codes.values())).shape[:2]
        fed = {state.name: np.zeros((samples, *state.shape), graph.tensors[state.read].dtype) for state in states}
        parts: list[list[Codes]] = []
        for step in range(steps):
            feeds = _floats(graph, {n: a[step] for n, a in codes.items()}, _at(values, step))
            found = dict(zip(wanted, stock.run(wanted, {**feeds, **fed}), strict=True))
            fed = {state.name: found[state.output] for state in states}
            made = {state.output: found[state.output].astype(np.int64) for state in states}
            made |= shown_codes(graph, found)
            by_input = {name: codes[graph.inputs[i]][step] for i, name in enumerate(graph.input_names)}
            fast = [(simulator, simulator.codes(by_input, codes=True))]
            if values is not None:
                fast.append((from_values, from_values.codes(feeds)))
            ways = [made]
            for sim, result in fast:
                rows = result if isinstance(result, dict) else {graph.output_names[0]: result}
                shown = {t: rows[n] for n, t in zip(graph.output_names, graph.outputs, strict=True)}
                ways.append(shown | {state.output: sim.state[state.name] for state in states})
            parts.append(ways)
        runs = [{name: np.stack([way[name] for way in run]) for name in run[0]} for run in zip(*parts, strict=True)]
        return _worst(runs, lambda: reference.run_sequence(graph, codes, list(runs[0])))

    def trace(self, graph: Graph, codes: Codes) -> Codes:
        return onnx_trace(graph, codes)

    def trace_sequences(self, graph: Graph, batches: Sequence[Batch]) -> list[Codes]:
        made = []
        for batch in batches:
            held, parts = reference.initial_states(graph, batch.count), []
            for step in range(batch.steps):
                parts.append(onnx_trace(graph, {**held, **{name: array[step] for name, array in batch.codes.items()}}))
                held = reference.next_states(graph, parts[-1])
            made.append({name: np.stack([part[name] for part in parts]) for name in parts[0]})
        return made

    def run_isolated(self, graph: Graph, codes: Codes) -> Codes | None:
        found = onnx_session(graph).run(graph.outputs, session.feed_codes(graph, codes))
        return {name: array.astype(np.int64) for name, array in zip(graph.outputs, found, strict=True)}


class Torch(Backend):
    """The trained module itself, in eval mode."""

    name = "torch"

    def __init__(self, module: object) -> None:
        self._module = module

    def run(self, graph: Graph, codes: Codes, values: Codes | None) -> Codes:
        import torch

        module = self._module
        assert isinstance(module, torch.nn.Module)
        feeds = []
        for index, name in enumerate(graph.input_names):
            given = input_values(graph, index, codes[graph.inputs[index]])
            feeds.append(torch.from_numpy(given if values is None or name not in values else values[name].copy()))
        training = module.training
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        parts: list[list[np.ndarray]] = []
        step = reference.chunk_size(graph)
        module.eval()
        try:
            with torch.no_grad():
                for start in range(0, len(feeds[0]), step):
                    found = module(*(f[start : start + step].to(device) for f in feeds))
                    parts.append([t.cpu().numpy() for t in flatten(found)])
        finally:
            module.train(training)
        if len(parts[0]) != len(graph.outputs):
            raise EdgematError(
                f"the module returns {len(parts[0])} tensors where the file has {len(graph.outputs)} outputs; "
                "pass the module the file was made of"
            )
        return {
            name: output_codes(graph, i, np.concatenate([part[i] for part in parts]))
            for i, name in enumerate(graph.outputs)
        }

    def run_sequences(self, graph: Graph, batches: Sequence[Batch]) -> list[Codes]:
        return [self._run_batch(graph, batch.codes, batch.values) for batch in batches]

    def _run_batch(self, graph: Graph, codes: Codes, values: Codes | None) -> Codes:
        import torch

        module = self._module
        assert isinstance(module, torch.nn.Module)
        copied = copy.deepcopy(module).eval()
        device = next((p.device for p in copied.parameters()), torch.device("cpu"))
        parts_of = dict(copied.named_modules())
        states = {state.name: parts_of.get(state.name) for state in graph.states}
        for part in states.values():
            if part is not None and hasattr(part, "reset"):
                part.reset()
        parts: list[Codes] = []
        with torch.no_grad():
            for step in range(next(iter(codes.values())).shape[0]):
                feeds = _floats(graph, {n: a[step] for n, a in codes.items()}, _at(values, step))
                found = flatten(copied(*(torch.from_numpy(f.copy()).to(device) for f in feeds.values())))
                named = enumerate(zip(graph.outputs, found, strict=True))
                made = {name: output_codes(graph, index, t.cpu().numpy()) for index, (name, t) in named}
                for state in graph.states:
                    kept = getattr(states[state.name], "value", None)
                    if kept is None:
                        raise EdgematError(
                            f"the module has no state {state.name!r}, or did not write it; pass the module the file "
                            "was made of"
                        )
                    made[state.output] = codes_of(kept.cpu().numpy(), state.format)
                parts.append(made)
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def run_isolated(self, graph: Graph, codes: Codes) -> Codes | None:
        return None


def _worst(ways: Sequence[Codes], truth: Callable[[], Codes]) -> Codes:
    """One of several runs that should be equal; where they are not, of each code one that is wrong."""
    first, *others = ways
    if all((other[name] == first[name]).all() for other in others for name in first):
        return first
    right = truth()
    made = dict(first)
    for other in others:
        made = {name: np.where(made[name] == right[name], other[name], made[name]) for name in made}
    return made


def _at(values: Codes | None, step: int) -> Codes | None:
    return None if values is None else {name: array[step] for name, array in values.items()}


def _floats(graph: Graph, codes: Codes, values: Codes | None) -> Codes:
    """float32 inputs by input name: the caller's where there are any, else those of the codes."""
    made = {}
    for index, name in enumerate(graph.input_names):
        given = input_values(graph, index, codes[graph.inputs[index]])
        made[name] = given if values is None or name not in values else values[name]
    return made


def flatten(found: object) -> list:  # type: ignore[type-arg]
    """Tensors of a module's result in order: a tensor, a tuple or list, a dict (in its own order)."""
    if isinstance(found, dict):
        return [t for value in found.values() for t in flatten(value)]
    if isinstance(found, list | tuple):
        return [t for value in found for t in flatten(value)]
    return [found]


class Mcu(Backend):
    """The generated C on this machine."""

    name = "mcu"

    def missing(self) -> str | None:
        from edgemat.targets import toolchain

        try:
            toolchain.find_c()
        except ToolchainError as error:
            return str(error)
        return None

    def run(self, graph: Graph, codes: Codes, values: Codes | None) -> Codes:
        from edgemat.targets import mcu

        return mcu.run_host(graph, codes)

    def trace(self, graph: Graph, codes: Codes) -> Codes:
        from edgemat.targets import mcu

        return mcu.run_host(graph, codes, trace=True)

    def run_sequences(self, graph: Graph, batches: Sequence[Batch], trace: bool = False) -> list[Codes]:
        from edgemat.targets.mcu.host import HostProgram

        with HostProgram(graph, trace=trace) as program:
            return [program.run_sequence(batch.codes) for batch in batches]

    def trace_sequences(self, graph: Graph, batches: Sequence[Batch]) -> list[Codes]:
        return self.run_sequences(graph, batches, trace=True)


class Emulated(Backend):
    """The generated C on an emulated microcontroller."""

    def __init__(self, machine: str) -> None:
        self.name = f"mcu:{machine}"
        self._machine = machine

    def missing(self) -> str | None:
        from edgemat.targets.mcu import emulator

        return emulator.missing()

    def run(self, graph: Graph, codes: Codes, values: Codes | None) -> Codes:
        from edgemat.targets import mcu

        return mcu.run_emulated(graph, codes, self._machine)

    def trace(self, graph: Graph, codes: Codes) -> Codes:
        from edgemat.targets.mcu import emulator

        return emulator.emulate(graph, codes, self._machine, trace=True).codes

    def run_sequences(self, graph: Graph, batches: Sequence[Batch], trace: bool = False) -> list[Codes]:
        from edgemat.targets.mcu import emulator
        from edgemat.targets.sequences import by_step, in_order

        ordered = [in_order(batch.codes) for batch in batches]
        flat = {name: np.concatenate([codes[name] for codes, _ in ordered]) for name in ordered[0][0]}
        resets = np.concatenate([begins for _, begins in ordered])
        found = emulator.emulate(graph, flat, self._machine, trace=trace, resets=resets).codes
        ends = np.cumsum([batch.steps * batch.count for batch in batches])[:-1]
        parts = {name: np.split(array, ends) for name, array in found.items()}
        return [by_step({name: parts[name][i] for name in parts}, batch.steps) for i, batch in enumerate(batches)]

    def trace_sequences(self, graph: Graph, batches: Sequence[Batch]) -> list[Codes]:
        return self.run_sequences(graph, batches, trace=True)


class Hls(Backend):
    """The generated C++, compiled with the real ap_* headers."""

    def __init__(self, io: str) -> None:
        self.name = f"hls:{io}"
        self._io = io

    def missing(self) -> str | None:
        from edgemat.targets import apheaders, toolchain

        try:
            toolchain.find_cxx()
        except ToolchainError as error:
            return str(error)
        if apheaders.find_ap_headers() is None:
            return "the ap_* headers are not here; run: edgemat headers"
        return None

    def run(self, graph: Graph, codes: Codes, values: Codes | None) -> Codes:
        from edgemat.targets import hls

        return hls.run_csim(graph, codes, io=self._io)

    def trace(self, graph: Graph, codes: Codes) -> Codes:
        from edgemat.targets import hls

        return hls.run_csim(graph, codes, io=self._io, trace=True)

    def run_sequences(self, graph: Graph, batches: Sequence[Batch]) -> list[Codes]:
        from edgemat.targets.hls.plan import Plan
        from edgemat.targets.hls.simulation import Simulation

        # The states are seen in a traced build only; the trace changes no statement of the model.
        with Simulation(graph, Plan(io=self._io), trace=True) as simulation:
            return [simulation.run_sequence(batch.codes) for batch in batches]


NAMES = ("reference", "torch", "onnx", "hls", "hls:parallel", "hls:stream", "mcu", "mcu:cortex-m4", "mcu:rv32imc")
DEFAULT = ("reference", "onnx", "hls", "mcu")


def make(name: str, module: object | None) -> Backend:
    """The backend of a name; "hls" is the parallel interface.

    Raises:
        EdgematError: for an unknown name, or "torch" without a module.
    """
    if name == "torch":
        if module is None:
            raise EdgematError("backend 'torch' needs the module: pass module= to edgemat.verify")
        return Torch(module)
    if name in ("hls", "hls:parallel", "hls:stream"):
        backend = Hls("stream" if name.endswith("stream") else "parallel")
        backend.name = name
        return backend
    if name in ("mcu:cortex-m4", "mcu:rv32imc"):
        return Emulated(name.split(":")[1])
    simple: dict[str, type[Backend]] = {"reference": Reference, "onnx": Onnx, "mcu": Mcu}
    if name not in simple:
        raise EdgematError(f"backend {name!r} is unknown, expected some of {', '.join(NAMES)}")
    return simple[name]()
