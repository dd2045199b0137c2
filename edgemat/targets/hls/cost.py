"""Modelled cost of a design: cycles, multipliers and memory, from the loops the templates spell.

No tool has synthesised anything: every figure here follows from loop bounds at II = 1, and is to be labelled
*modelled* wherever it is shown. A process adds `PIPELINE_STAGES` cycles, and the adder tree of its SIMD terms, to the
latency of its loops.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil, log2
from typing import Any

from edgemat.targets.hls.design import COMPLETE_ELEMENTS, Design
from edgemat.targets.hls.plan import Plan
from edgemat.targets.hls.process import Process
from edgemat.targets.hls.project import project

PIPELINE_STAGES = 4
MEMORY_PORTS = 2
BASIS = "modelled"


@dataclass(frozen=True)
class ProcessCost:
    """Cost of one call of the top function.

    Attributes:
        node: name of the graph node, or of the load, store or clone.
        operator: stem of its template.
        latency_cycles: from its first read to its last write.
        ii_cycles: between the starts of two samples.
        multipliers: multiplications by constants or variables per cycle.
        macs: multiplications per sample.
        shift_adds: shifted terms added per sample in place of multiplications (K-hot constants).
        memory_bits: constants, line buffers and held samples.
        fifo_depths: beats of each FIFO it writes, by channel.
        fifo_bits: bits of those FIFOs.
        adders: adders and subtracters of ternary sums.
        adder_luts: LUTs of six inputs in those, one per bit, with the decoding of packed weights.
        memory_bytes: bytes read from an external memory of weights per sample.
    """

    node: str
    operator: str
    latency_cycles: int
    ii_cycles: int
    multipliers: int
    macs: int
    shift_adds: int
    memory_bits: int
    fifo_depths: dict[str, int]
    fifo_bits: int
    adders: int
    adder_luts: int
    memory_bytes: int


@dataclass(frozen=True)
class DesignCost:
    """Cost of a whole design; `basis` says that it is modelled."""

    basis: str
    io: str
    clock_ns: float
    latency_cycles: int
    ii_cycles: int
    latency_us: float
    samples_per_second: float
    bottleneck: str
    multipliers: int
    macs: int
    shift_adds: int
    memory_bits: int
    fifo_bits: int
    adders: int
    adder_luts: int
    memory_bytes: int
    processes: tuple[ProcessCost, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def model_cost(graph: Any, plan: Plan | None = None) -> DesignCost:
    """Modelled cost of the HLS design of a graph.

    Args:
        graph: a `Graph` of `edgemat.lower.reader`.
        plan: choices; the defaults of `Plan` if not given.
    """
    return design_cost(project(graph, plan).design)


def design_cost(design: Design) -> DesignCost:
    """Modelled cost of a design."""
    costs = [_process_cost(design, process) for process in design.processes]
    if design.dataflow:
        slowest = max(costs, key=lambda cost: cost.ii_cycles)
        ii, bottleneck = slowest.ii_cycles, slowest.node
    else:
        ii, bottleneck = 1, ""
    latency = _latency(design, costs)
    clock = design.plan.clock_ns
    return DesignCost(
        BASIS,
        design.plan.io,
        clock,
        latency,
        ii,
        latency * clock / 1000,
        1e9 / (ii * clock),
        bottleneck,
        sum(c.multipliers for c in costs),
        sum(c.macs for c in costs),
        sum(c.shift_adds for c in costs),
        sum(c.memory_bits for c in costs),
        sum(c.fifo_bits for c in costs),
        sum(c.adders for c in costs),
        sum(c.adder_luts for c in costs),
        sum(c.memory_bytes for c in costs),
        tuple(costs),
    )


def _process_cost(design: Design, process: Process) -> ProcessCost:
    inner = [c for c in process.outputs if not c.port] if design.stream else []
    cycles = _cycles(design, process)
    arrays = 0 if design.stream else sum(c.size * c.tensor.format.storage_width for c in process.outputs if not c.port)
    return ProcessCost(
        process.step.name if process.step is not None else process.label,
        process.step.stem if process.step is not None else process.label.partition("_")[0],
        cycles + _stages(process),
        cycles,
        process.multipliers,
        process.macs,
        process.shift_adds,
        sum(a.bits for a in process.arrays) + process.buffer_bits + arrays,
        {c.name: c.depth for c in inner},
        sum(c.depth * c.width for c in inner),
        process.adders,
        process.adder_luts,
        process.memory_bytes,
    )


def _cycles(design: Design, process: Process) -> int:
    """Cycles of one sample; a map too large for registers gives two pixels per cycle to a window."""
    cycles = max(1, process.pattern.cycles)
    if not design.dataflow:
        return 1
    step = process.step
    if not design.stream and step is not None and "kernel_h" in step.params:
        p = step.params
        if step.inputs[0].size > COMPLETE_ELEMENTS:
            cycles = max(cycles, p["out_h"] * p["out_w"] * ceil(p["kernel_h"] * p["kernel_w"] / MEMORY_PORTS))
    return cycles


def _stages(process: Process) -> int:
    terms = 1
    if process.config is not None:
        found = {member.name: member.value for member in process.config.constants}
        terms = int(found.get("simd", "1"))
    return PIPELINE_STAGES + ceil(log2(max(1, terms)))


def _latency(design: Design, costs: list[ProcessCost]) -> int:
    """First input to last output along the slowest path."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    end = 0
    for process, cost in zip(design.processes, costs, strict=True):
        begin = max((first.get(c.name, 0) for c in process.inputs), default=0)
        ready = max((last.get(c.name, 0) for c in process.inputs), default=0)
        stages = _stages(process)
        if design.stream:
            started = begin + process.pattern.fill + stages
            finished = max(started + cost.ii_cycles - process.pattern.fill, ready + stages)
        else:
            started = finished = ready + cost.latency_cycles
        for channel in process.outputs:
            first[channel.name], last[channel.name] = started, finished
        end = max(end, finished)
    return end
