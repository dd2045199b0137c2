"""What a lowered graph costs on a target: bytes on a microcontroller, modelled cycles and memories on an FPGA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemat.lower.graph import Graph

if TYPE_CHECKING:
    from edgemat.targets.hls.design import Design
    from edgemat.targets.hls.process import Process


@dataclass(frozen=True)
class TargetCost:
    """Cost on one target.

    Attributes:
        target: ``hls`` or ``mcu``.
        modelled: whether figures come from a model of the tool rather than from the generated files.
        totals: figures of the whole network by name; units are in the names.
        columns: names of the columns of `rows`.
        rows: one line per call or process.
    """

    target: str
    modelled: bool
    totals: dict[str, Any]
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        layers = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return {"target": self.target, "modelled": self.modelled, "totals": self.totals, "layers": layers}


def target_cost(graph: Graph, target: str) -> TargetCost:
    """Cost of `graph` on ``hls`` or ``mcu``."""
    return _mcu(graph) if target == "mcu" else _hls(graph)


def _mcu(graph: Graph) -> TargetCost:
    from edgemat.targets.layout import to_native
    from edgemat.targets.mcu import project
    from edgemat.targets.mcu.storage import size_of
    from edgemat.targets.mcu.variants import plan_calls

    planned = project(graph)
    rows = []
    for step in to_native(graph).steps:
        for call in plan_calls(step):
            macros = dict(call.variant.macros)
            held = sum(a.values.size * size_of(a.element) for a in call.arrays if a is not None)
            sums = call.takes_epilogue and "EM_ACC_BITS" not in macros
            accumulator = f"int{macros.get('EM_ACC_BITS', '32')}_t" if sums or "EM_ACC_BITS" in macros else "none"
            rows.append((step.node, call.variant.function, accumulator, int(held)))
    totals = {
        "arena_bytes": planned.arena_bytes,
        "arena_lower_bound_bytes": planned.arena_lower_bound_bytes,
        "weight_bytes": planned.weight_bytes,
    }
    return TargetCost("mcu", False, totals, ("node", "kernel", "accumulator", "weight_bytes"), tuple(rows))


def _hls(graph: Graph) -> TargetCost:
    """Both io modes with the plan's defaults; cycles and bits as the generated loops imply them."""
    from edgemat.targets.hls.design import make_design
    from edgemat.targets.hls.plan import IO, Plan
    from edgemat.targets.layout import to_native

    network = to_native(graph)
    totals: dict[str, Any] = {"clock_ns": Plan().clock_ns, "reuse": Plan().reuse}
    rows: list[tuple[Any, ...]] = []
    for io in IO:
        design = make_design(network, Plan(io=io))
        own = [_process_row(process, design.stream) for process in design.processes]
        latency, ii = _timing(design)
        totals[io] = {
            "latency_cycles": latency,
            "ii_cycles": ii,
            "multipliers": sum(process.multipliers for process in design.processes),
            "memory_bits": sum(row[-2] for row in own),
        }
        rows += [(io, *row) for row in own]
    columns = ("io", "node", "latency_cycles", "ii_cycles", "multipliers", "memory_bits", "fifo_depths")
    return TargetCost("hls", True, totals, columns, tuple(rows))


def _process_row(process: Process, stream: bool) -> tuple[Any, ...]:
    """Name, cycles to the first output, cycles of one sample, multipliers, bits of memory, FIFO depths."""
    inner = [channel for channel in process.outputs if not channel.port]
    depths = {channel.name: channel.depth for channel in inner} if stream else {}
    held = (
        channel.depth * channel.width if stream else channel.size * channel.tensor.format.width for channel in inner
    )
    bits = sum(array.bits for array in process.arrays) + process.buffer_bits + sum(held)
    latency = process.pattern.fill if stream else process.pattern.cycles
    return process.label, latency, process.pattern.cycles, process.multipliers, bits, depths


def _timing(design: Design) -> tuple[int, int]:
    """Cycles from the first input to the last output, and between samples.

    A process starts when its slowest producer has its first output (where tensors lie in arrays: its last), and ends
    no earlier than one cycle after its slowest producer. Where nothing runs at the same time, cycles add up.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for process in design.processes:
        start = max((first.get(channel.name, 0) for channel in process.inputs), default=0)
        end = max((last.get(channel.name, -1) for channel in process.inputs), default=-1)
        for channel in process.outputs:
            first[channel.name] = start + (process.pattern.fill if design.stream else process.pattern.cycles)
            last[channel.name] = max(start + process.pattern.cycles, end + 1)
    cycles = [process.pattern.cycles for process in design.processes]
    if not design.dataflow:
        return sum(cycles), 1
    return max(last.values(), default=0), max(cycles, default=0)
