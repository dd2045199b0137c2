"""`compare`: a lowered file beside the foreign file it was made of, on the same samples.

Both run under onnxruntime. Outputs are compared as numbers, with onnxruntime's optimisations, as users run the file.
Every tensor of codes that both have is compared as codes, without them, as the file says, and in the foreign file's
order, so that the first node that differs is named. A difference is a node's own in those samples in which nothing
before it differed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemat.errors import EdgematError, FormatError
from edgemat.foreign.execution import Execution
from edgemat.foreign.opening import open_model
from edgemat.foreign.pairing import Pair, Pairing, pair
from edgemat.foreign.source import Source, load
from edgemat.formats import Fixed
from edgemat.lower.graph import Graph
from edgemat.lower.reader import read
from edgemat.sim import session
from edgemat.sim.arrays import Arrays, by_name, output_scale, output_values, to_codes
from edgemat.sim.simulator import Simulator

if TYPE_CHECKING:
    from rich.console import RenderableType

CHUNK = 32
"""Samples whose tensors are held at once."""


@dataclass(frozen=True)
class OutputFidelity:
    """One output of both files.

    Attributes:
        name: Its name.
        compared: What is compared: "" for the output itself, else what enters the operator left to the reader.
        numbers: How many numbers.
        equal_numbers: How many are equal, as float32.
        rows: Samples.
        equal_rows: Samples whose numbers are all equal.
        equal_argmax: Samples in which the foreign file's largest class is (one of) the lowered file's; None for outputs
            that are no vector of several numbers.
        largest: Largest absolute difference, real.
        largest_codes: Largest difference in codes of the lowered output.
    """

    name: str
    compared: str
    numbers: int
    equal_numbers: int
    rows: int
    equal_rows: int
    equal_argmax: int | None
    largest: float
    largest_codes: float


@dataclass(frozen=True)
class NodeFidelity:
    """A tensor of codes that both files have.

    Attributes:
        node: The foreign node that makes it.
        op: Its operator.
        tensor: The tensor's foreign name.
        codes: How many codes were compared.
        different: How many differ.
        own: How many differ in samples in which no node before it differs.
        largest: Largest difference in codes.
        fidelity: What the import says of the node.
        binary: Whether its scales are powers of two.
    """

    node: str
    op: str
    tensor: str
    codes: int
    different: int
    own: int
    largest: int
    fidelity: str
    binary: bool


@dataclass(frozen=True)
class FidelityReport:
    """Result of `edgemat.compare`.

    Attributes:
        net: The lowered file.
        original: The foreign file.
        executor: Who ran the foreign file.
        samples: How many samples were compared.
        outputs: One for each output.
        nodes: One for each tensor of codes both files have, in the foreign file's order.
        unpaired: Why nodes are not compared, or "".
        changed: How many numbers of the original's outputs onnxruntime's optimisations change; `outputs` are compared
            with them, `nodes` without.
        broken: Names of nodes that the import calls exact, that have power-of-two scales, and whose own codes differ.
            Only for files with quantisers of QONNX: of files that store integers there are two truths, the kernels of
            onnxruntime and the file's own nodes, and they round ties in two ways.
    """

    net: str
    original: str
    executor: str
    samples: int
    outputs: list[OutputFidelity]
    nodes: list[NodeFidelity] = field(default_factory=list)
    unpaired: str = ""
    changed: int = 0
    broken: list[str] = field(default_factory=list)

    @property
    def first(self) -> NodeFidelity | None:
        """The first node that differs."""
        return next((node for node in self.nodes if node.different), None)

    @property
    def ok(self) -> bool:
        """Whether every largest class is the same, and no node broke its word."""
        return not self.broken and all(o.equal_argmax in (None, o.rows) for o in self.outputs)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        first = self.first
        return {**asdict(self), "ok": self.ok, "first": None if first is None else asdict(first)}

    def render(self) -> RenderableType:
        """Tables for people."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(f"{self.net} against {self.original}: {self.samples} samples"))
        for column in ("output", "equal numbers", "equal rows", "equal argmax", "largest difference", "in codes"):
            table.add_column(column, overflow="fold")
        for output in self.outputs:
            argmax = "-" if output.equal_argmax is None else _share(output.equal_argmax, output.rows)
            table.add_row(
                Text(output.name + (f" ({output.compared})" if output.compared else "")),
                _share(output.equal_numbers, output.numbers),
                _share(output.equal_rows, output.rows),
                argmax,
                f"{output.largest:.6g}",
                f"{output.largest_codes:.6g}",
            )
        lines = [f"The original ran under {self.executor}."]
        first = self.first
        if self.unpaired:
            lines.append(f"Nodes are not compared: {self.unpaired}")
        elif first is None:
            lines.append(f"No node differs: {len(self.nodes)} tensors have the same codes.")
        else:
            lines.append(
                f"The first node that differs: {first.node!r} ({first.op}), tensor {first.tensor!r}: "
                f"{first.different} of {first.codes} codes, by at most {first.largest}. The import says of it: "
                f"{first.fidelity}."
            )
        if self.changed:
            lines.append(
                f"onnxruntime's optimisations change {self.changed} numbers of the original's outputs: the table is "
                "with them, as users run the file; the nodes are compared without them, as the file says."
            )
        if self.broken:
            lines.append(f"Called exact, and different from codes that are equal: {', '.join(self.broken)}.")
        return Group(table, *(Text(line) for line in lines))


def _share(count: int, total: int) -> str:
    return f"{count} of {total} ({100.0 * count / max(total, 1):.4g} %)"


def compare(
    net: str | os.PathLike[str] | Graph,
    original: str | os.PathLike[str],
    inputs: Arrays,
    *,
    formats: Mapping[str, str] | None = None,
    executor: str | None = None,
) -> FidelityReport:
    """Measures a lowered file against the foreign file it was made of.

    Args:
        net: The lowered file (a foreign one is imported on the way).
        original: The foreign file: QONNX, QDQ or QOperator.
        inputs: Real values [N, ...] (cast to the file's types), or a dict by input name.
        formats: Formats of float inputs the import was given; None takes those of `net` where they are needed.
        executor: Who computes QONNX's operators: "qonnx", "edgemat", or None for qonnx where it is installed.

    Returns:
        The report; differences do not raise.

    Raises:
        LoweringError: if a file cannot be read or run.
        FormatError: for inputs that do not fit, or outputs of other shapes than the original's.
        EdgematError: if the executor is not installed.
    """
    opened = net if isinstance(net, Graph) else open_model(net, inputs=formats or None).model
    graph = opened if isinstance(opened, Graph) else read(opened)
    label = graph.name if isinstance(net, Graph) else str(net)
    return compare_source(graph, label, load(original), inputs, formats, executor)


def compare_source(
    graph: Graph,
    label: str,
    source: Source,
    inputs: Arrays,
    formats: Mapping[str, str] | None = None,
    executor: str | None = None,
) -> FidelityReport:
    """`compare` of files that are read already."""
    if graph.states:
        raise FormatError(f"{graph.name!r} has recurrent states, expected a file without any; compare it step by step")
    pairing, reason = _paired(source, graph, formats)
    arrays = by_name(graph, inputs)
    samples = len(next(iter(arrays.values())))
    entering = [tensor for tensor, _ in pairing.entering.values()]
    plain = Execution(source, entering, executor)
    expected = plain(_feeds(plain, graph, arrays))
    outputs = _outputs(graph, plain, pairing, arrays, expected)
    nodes: list[NodeFidelity] = []
    changed = 0
    if pairing.pairs:
        nodes, changed = _nodes(graph, source, pairing, arrays, expected, executor)
        if not nodes:
            reason = "the lowered file has none of the tensors that importing the original makes"
    hidden = pairing.inexact - {node.node for node in nodes}
    broken = [n.node for n in nodes if n.own and n.fidelity == "exact" and n.binary and not hidden and not plain.whole]
    return FidelityReport(label, source.label, plain.executor, samples, outputs, nodes, reason, changed, broken)


def _paired(source: Source, graph: Graph, formats: Mapping[str, str] | None) -> tuple[Pairing, str]:
    """What importing the original makes; and why it is not known."""
    stated = {name: str(call.attrs["y_format"]) for name, call in graph.quantizers.items()}
    tried = [formats] if formats else [{}, stated]
    reason = ""
    for texts in tried:
        try:
            known = {value.name for value in source.graph.inputs}
            return pair(source, {k: Fixed.parse(v) for k, v in (texts or {}).items() if k in known}), ""
        except EdgematError as error:
            reason = reason or str(error)
    return Pairing((), {}, frozenset()), reason


def _feeds(execution: Execution, graph: Graph, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The original's inputs: by name, else in order."""
    names = execution.inputs
    if len(names) != len(graph.input_names):
        raise FormatError(f"{execution.label} has {len(names)} inputs, {graph.name!r} has {len(graph.input_names)}")
    return {n: arrays[n if n in arrays else own] for n, own in zip(names, graph.input_names, strict=True)}


def _outputs(
    graph: Graph,
    execution: Execution,
    pairing: Pairing,
    arrays: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
) -> list[OutputFidelity]:
    simulator = Simulator(graph)
    found = simulator.codes(arrays)
    made = found if isinstance(found, dict) else {graph.output_names[0]: found}
    rows = []
    for index, name in enumerate(graph.output_names):
        tensor, op = pairing.entering.get(name, ("", ""))
        there = tensor or (name if name in execution.outputs else execution.outputs[index])
        truth = expected[there]
        here = np.asarray(output_values(graph, index, made[name]))
        if truth.shape != here.shape:
            raise FormatError(f"output {name!r} has the shape {here.shape}, the original's {truth.shape}")
        rows.append(_output(graph, index, f"what enters {op}" if op else "", truth, here))
    return rows


def _output(graph: Graph, index: int, compared: str, truth: np.ndarray, here: np.ndarray) -> OutputFidelity:
    scale = output_scale(graph, index)
    fracs = np.asarray(graph.output_type(index).format.fracs, np.int64)
    unit = np.ldexp(1.0 if scale is None else float(scale), -fracs)
    shape = [1] * here.ndim
    if unit.size > 1:
        shape[1] = unit.size
    difference = np.abs(truth.astype(np.float64) - here.astype(np.float64))
    equal = truth.astype(np.float32) == here.astype(np.float32)
    rows = len(here)
    argmax = None
    flat_truth, flat_here = truth.reshape(rows, -1), here.reshape(rows, -1)
    if truth.ndim >= 2 and max(truth.shape[1:]) == flat_truth.shape[1] > 1:
        chosen = flat_truth.argmax(axis=1)
        argmax = int((flat_here[np.arange(rows), chosen] == flat_here.max(axis=1)).sum())
    return OutputFidelity(
        graph.output_names[index],
        compared,
        int(equal.size),
        int(equal.sum()),
        rows,
        int(equal.reshape(rows, -1).all(axis=1).sum()),
        argmax,
        float(difference.max(initial=0.0)),
        float((difference / unit.reshape(shape)).max(initial=0.0)),
    )


def _nodes(
    graph: Graph,
    source: Source,
    pairing: Pairing,
    arrays: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
    executor: str | None,
) -> tuple[list[NodeFidelity], int]:
    """Codes of every tensor both files have, some samples at a time; and how many outputs are not `expected`."""
    pairs = [p for p in pairing.pairs if p.built in graph.tensors]
    changed = 0
    execution = Execution(source, [p.tensor for p in pairs], executor, optimised=False)
    feeds = _feeds(execution, graph, arrays)
    inner = list(dict.fromkeys(p.built for p in pairs if p.built not in graph.inputs))
    active = session.open_session(session.code_model(graph, inner, from_codes=True)) if inner else None
    counts = np.zeros((len(pairs), 4), np.int64)  # codes, different, own, largest
    for start in range(0, len(next(iter(arrays.values()))), CHUNK):
        part = {name: array[start : start + CHUNK] for name, array in arrays.items()}
        truth = execution({name: array[start : start + CHUNK] for name, array in feeds.items()})
        changed += sum(int((truth[n] != expected[n][start : start + CHUNK]).sum()) for n in execution.outputs)
        made = to_codes(graph, part, False)
        if active is not None:
            used = {port.name for port in active.get_inputs()}
            fed = {k: v for k, v in session.feed_codes(graph, made).items() if k in used}
            made |= dict(zip(inner, active.run(inner, fed), strict=True))
        clean = np.ones(len(next(iter(part.values()))), bool)
        for index, known in enumerate(pairs):
            difference = _difference(graph, known, truth[known.tensor], made[known.built])
            wrong = (difference != 0).reshape(len(difference), -1)
            counts[index, :3] += [wrong.size, wrong.sum(), wrong[clean].sum()]
            counts[index, 3] = max(counts[index, 3], int(difference.max(initial=0)))
            clean &= ~wrong.any(axis=1)
    rows = []
    for p, (codes, different, own, largest) in zip(pairs, counts.tolist(), strict=True):
        rows.append(NodeFidelity(p.node, p.op, p.tensor, codes, different, own, largest, p.fidelity, p.binary))
    return rows, changed


def _difference(graph: Graph, known: Pair, truth: np.ndarray, made: np.ndarray) -> np.ndarray:
    """Absolute differences in codes."""
    order = tuple(range(made.ndim)) if known.order is None else known.order
    codes = made.astype(np.int64).transpose(order)
    expected = known.codes(truth, graph.tensors[known.built].format.fracs)
    if expected.shape != codes.shape:
        raise FormatError(
            f"tensor {known.tensor!r} has the shape {expected.shape}, its codes {codes.shape}; give the file "
            "that the lowered one was made of"
        )
    return np.abs(expected - codes)
