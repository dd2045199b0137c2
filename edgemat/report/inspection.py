"""`inspect`: formats, ranges, accumulators, the overflow proof and the cost of a lowered file."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from edgemat.errors import UnsupportedOpError
from edgemat.lower.graph import Graph
from edgemat.lower.reader import read
from edgemat.lower.states import State
from edgemat.lower.writer import FORMAT_VERSION
from edgemat.op import Call, Native, Tensor
from edgemat.report.carrier import carriers, reach_bits
from edgemat.report.nodes import Edge, NodeReport, Port, StateReport, Ternary
from edgemat.report.targets import TargetCost, target_cost
from edgemat.targets.mcu.storage import size_of, storage

if TYPE_CHECKING:
    from rich.console import RenderableType

ACCUMULATOR_BITS = (32, 64)
SHORT_BITS = 16
"""Width of the C accumulator where the file states so many bits or fewer."""
HLS_ACCUMULATOR_BITS_MAX = 64


@dataclass(frozen=True)
class Inspection:
    """What `inspect` returns.

    Attributes:
        model: the model's name.
        inputs: code tensors behind the input quantisers.
        outputs: code tensors before the output dequantisers.
        nodes: operators in topological order.
        target: modelled cost of a target, or None.
        states: recurrent states that the model keeps between steps.
    """

    model: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    nodes: tuple[NodeReport, ...]
    target: TargetCost | None = field(default=None)
    states: tuple[StateReport, ...] = ()

    @property
    def proved(self) -> bool:
        """Whether no accumulator of any backend can overflow for any input."""
        return all(node.proved for node in self.nodes)

    @property
    def totals(self) -> dict[str, int]:
        """Sums over the nodes, for one sample."""
        keys = ("multiplies", "additions", "shift_adds", "weight_bits", "ebops")
        return {"nodes": len(self.nodes), **{key: sum(getattr(node, key) for node in self.nodes) for key in keys}}

    @property
    def overflow(self) -> dict[str, Any]:
        """The proof: whether it holds, the widest accumulators, and the nodes it fails for."""
        return {
            "proved": self.proved,
            "nodes": len(self.nodes),
            "widest_hls_bits": max((node.hls_bits for node in self.nodes), default=0),
            "widest_c_bits": max((node.c_bits for node in self.nodes), default=0),
            "unproved": [node.name for node in self.nodes if not node.proved],
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and integers."""
        made: dict[str, Any] = {"model": self.model, "format_version": FORMAT_VERSION}
        made["inputs"] = [_plain(asdict(edge)) for edge in self.inputs]
        made["outputs"] = [_plain(asdict(edge)) for edge in self.outputs]
        made["states"] = [_plain(asdict(state)) for state in self.states]
        made["nodes"] = [_plain(asdict(node)) for node in self.nodes]
        made["totals"] = self.totals
        made["overflow"] = self.overflow
        made["target"] = None if self.target is None else self.target.to_dict()
        return made

    def render(self) -> RenderableType:
        """Tables for the terminal."""
        from edgemat.report.tables import inspection_tables

        return inspection_tables(
            self.model, (*self.inputs, *self.outputs), self.nodes, self.totals, self.overflow, self.target, self.states
        )


def inspect(path: str | os.PathLike[str] | Graph, target: str | None = None) -> Inspection:
    """Describes a lowered file and proves that nothing in it can overflow.

    Args:
        path: A lowered file.
        target: ``hls`` or ``mcu`` adds that target's cost (for ``hls``: modelled).

    Returns:
        The report; ``.to_dict()`` is JSON-able.

    Raises:
        LoweringError: if the file is not a lowered file.
        UnsupportedOpError: if the target is unknown or has no form of a node.
    """
    if target not in (None, "hls", "mcu"):
        raise UnsupportedOpError(f"target is {target!r}, expected one of hls, mcu")
    graph = path if isinstance(path, Graph) else read(path)
    functions = {f.overload: f for f in graph.model.functions.values()}
    overloads = {node.outputs[0].name or "": node.overload for node in graph.model.graph}
    return Inspection(
        graph.name,
        tuple(_port(graph, *names) for names in zip(graph.input_names, graph.inputs, strict=True)),
        tuple(_port(graph, *names) for names in zip(graph.output_names, graph.outputs, strict=True)),
        tuple(_node(call, functions[overloads[call.outputs[0]]]) for call in graph.nodes),
        None if target is None else target_cost(graph, target),
        tuple(_state(state) for state in graph.states),
    )


def _state(state: State) -> StateReport:
    element_bytes = size_of(storage(state.format))
    return StateReport(
        state.name,
        state.shape,
        str(state.format),
        state.size * state.format.storage_width,
        state.size * element_bytes,
    )


def _ternary(call: Call, native: Native | None) -> Ternary | None:
    if native is None or not native.params.get("ternary"):
        return None
    weight = native.arrays["weight"]
    rows = weight.reshape(len(weight), -1) != 0
    counts = rows.sum(1)
    return Ternary(int(counts.max()), rows.shape[1], (call.x[0].lo, call.x[0].hi), 1.0 - float(rows.mean()))


def _port(graph: Graph, name: str, tensor: str) -> Port:
    scale, edge = graph.scale(name), _edge(graph.tensors[tensor])
    return Port(edge.name, edge.shape, edge.format, edge.range, None if scale is None else float(scale))


def _edge(tensor: Tensor) -> Edge:
    return Edge(tensor.name, tensor.shape, str(tensor.format), (tensor.lo, tensor.hi))


def _node(call: Call, function: ir.Function) -> NodeReport:
    native = call.op.native(call) if call.op.name in ("Linear", "Conv") else None
    bounds = call.bounds if native is None or native.bounds is None else native.bounds
    cost = call.op.cost(call)
    used = carriers(call, function)
    hls_bits = two_complement_bits(*bounds.final) if bounds.width is None else bounds.width
    wanted = two_complement_bits(*bounds.partial)
    c_bits = next((bits for bits in ACCUMULATOR_BITS if wanted <= bits), 0)
    if bounds.width is not None and bounds.width <= SHORT_BITS:
        c_bits = SHORT_BITS
    carried = call.bounds.magnitude.bit_length() <= reach_bits(used)
    proved = c_bits > 0 and hls_bits <= HLS_ACCUMULATOR_BITS_MAX and carried
    return NodeReport(
        call.name,
        call.op.name,
        tuple(_edge(tensor) for tensor in call.x),
        tuple(_edge(tensor) for tensor in call.y),
        bounds.final,
        bounds.partial,
        hls_bits,
        c_bits,
        used,
        "" if call.epilogue is None else str(call.epilogue.format),
        cost.multiplies,
        cost.additions,
        cost.shift_adds,
        cost.weight_bits,
        proved,
        bounds.width or 0,
        wanted,
        cost.ebops,
        _ternary(call, native),
    )


def two_complement_bits(lo: int, hi: int) -> int:
    """Bits of the narrowest two's complement integer that holds lo to hi."""
    return max(hi.bit_length() if hi > 0 else 0, (-lo - 1).bit_length() if lo < 0 else 0) + 1


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
