"""What a lowered graph costs on a target: bytes on a microcontroller, modelled cycles and memories on an FPGA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgemat.lower.graph import Graph


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
    from edgemat.targets.mcu.variants import plan_calls, size_of

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
    from edgemat.targets.hls.design import make_design
    from edgemat.targets.hls.plan import Plan
    from edgemat.targets.layout import to_native

    plan = Plan(io="stream")
    design = make_design(to_native(graph), plan)
    rows = []
    for process in design.processes:
        fifo = [channel for channel in process.outputs if not channel.port]
        depths = {channel.name: channel.depth for channel in fifo}
        bits = sum(array.bits for array in process.arrays) + process.buffer_bits
        bits += sum(channel.depth * channel.width for channel in fifo)
        rows.append((process.label, process.pattern.fill, process.pattern.cycles, process.multipliers, bits, depths))
    totals = {
        "io": plan.io,
        "reuse": plan.reuse,
        "clock_ns": plan.clock_ns,
        "latency_cycles": sum(row[1] for row in rows) + max((row[2] for row in rows), default=0),
        "ii_cycles": max((row[2] for row in rows), default=0),
        "multipliers": sum(row[3] for row in rows),
        "memory_bits": sum(row[4] for row in rows),
    }
    columns = ("node", "fill_cycles", "ii_cycles", "multipliers", "memory_bits", "fifo_depths")
    return TargetCost("hls", True, totals, columns, tuple(rows))
