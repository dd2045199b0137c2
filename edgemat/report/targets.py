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
    from edgemat.targets.mcu.storage import size_of
    from edgemat.targets.mcu.variants import plan_calls

    planned = project(graph)
    costs = [call.op.cost(call) for call in graph.nodes]
    rows = []
    for step in to_native(graph).steps:
        for call in plan_calls(step):
            macros = dict(call.variant.macros)
            held = sum(a.values.size * size_of(a.element) for a in call.arrays if a is not None)
            sums = call.takes_epilogue and "EM_ACC_BITS" not in macros
            bits = macros.get("EM_SUM_BITS", macros.get("EM_ACC_BITS", "32"))
            accumulator = f"int{bits}_t" if sums or "EM_ACC_BITS" in macros else "none"
            rows.append((step.node, call.variant.function, accumulator, int(held)))
    totals = {
        "arena_bytes": planned.arena_bytes,
        "arena_lower_bound_bytes": planned.arena_lower_bound_bytes,
        "weight_bytes": planned.weight_bytes,
        "multiplies": sum(cost.multiplies for cost in costs),
        "shift_adds": sum(cost.shift_adds for cost in costs),
    }
    return TargetCost("mcu", False, totals, ("node", "kernel", "accumulator", "weight_bytes"), tuple(rows))


def _hls(graph: Graph) -> TargetCost:
    """Both io modes with the plan's defaults; cycles and bits as the generated loops imply them."""
    from edgemat.targets.hls import Plan, model_cost
    from edgemat.targets.hls.plan import IO

    totals: dict[str, Any] = {"clock_ns": Plan().clock_ns, "reuse": Plan().reuse}
    rows: list[tuple[Any, ...]] = []
    figures = ("node", "latency_cycles", "ii_cycles", "multipliers", "adder_luts")
    for io in IO:
        cost = model_cost(graph, Plan(io=io))
        totals[io] = {
            "latency_cycles": cost.latency_cycles,
            "ii_cycles": cost.ii_cycles,
            "multipliers": cost.multipliers,
            "shift_adds": cost.shift_adds,
            "adders": cost.adders,
            "adder_luts": cost.adder_luts,
            "memory_bits": cost.memory_bits + cost.fifo_bits,
        }
        rows += [
            (io, *(getattr(p, key) for key in figures), p.memory_bits + p.fifo_bits, p.fifo_depths)
            for p in cost.processes
        ]
    columns = ("io", *figures, "memory_bits", "fifo_depths")
    return TargetCost("hls", True, totals, columns, tuple(rows))
