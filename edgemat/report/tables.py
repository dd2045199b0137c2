"""The reports as tables for the terminal; names from a file are shown as text, never as markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from edgemat.report.nodes import Edge, NodeReport, Port, StateReport
    from edgemat.report.targets import TargetCost


LISTED = 8
"""Channels whose formats a table spells one by one."""


def inspection_tables(
    model: str,
    edges: Sequence[Port],
    reports: Sequence[NodeReport],
    totals: Mapping[str, int],
    overflow: Mapping[str, Any],
    target: TargetCost | None,
    states: Sequence[StateReport] = (),
) -> RenderableType:
    """Ports, states, nodes, the proof and, if asked for, a target's cost (the parts of an `Inspection`)."""
    ports = _table("inputs and outputs", "tensor", "shape", "format", "codes")
    for edge in edges:
        _row(ports, edge.name, _shape(edge), _format(edge) + _worth(edge), _interval(edge.range))
    nodes = _table(
        f"model {model}", "node", "operator", "result", "format", "codes", "partial sums", "acc bits", "C acc",
        "ONNX carrier", "multiplies", "additions", "shift-adds", "weight bits", "EBOPs",
    )  # fmt: skip
    for node in reports:
        _row(nodes, *_cells(node))
    _row(
        nodes,
        "total",
        *[""] * 8,
        *(f"{totals[key]:,}" for key in ("multiplies", "additions", "shift_adds", "weight_bits", "ebops")),
    )
    parts: list[RenderableType] = [ports, nodes, _proof(overflow)]
    trits = [node for node in reports if node.ternary is not None]
    if trits:
        parts.insert(2, _sums_of_trits(trits))
    if states:
        kept = _table("recurrent states", "state", "shape", "format", "bits", "C bytes")
        for state in states:
            shape = "x".join(map(str, state.shape))
            _row(kept, state.name, shape, state.format, f"{state.bits:,}", f"{state.c_bytes:,}")
        parts.insert(1, kept)
    if target is not None:
        parts.append(_target(target))
    return Group(*parts)


def operator_table(backends: Sequence[str], rows: Sequence[Sequence[str]]) -> RenderableType:
    """Operators by backend: a name, a cell for each backend and a note in each row."""
    made = _table("operators by backend", "operator", *backends, "what it is")
    for row in rows:
        _row(made, *row)
    return made


def _cells(node: NodeReport) -> list[str]:
    edge = node.outputs[0]
    return [
        node.name,
        node.operator,
        _shape(edge),
        _format(edge),
        _interval(edge.range),
        _interval(node.partial),
        f"{node.accumulator} stated, {node.needed_bits} needed" if node.accumulator else str(node.hls_bits),
        f"int{node.c_bits}_t" if node.c_bits else "none",
        ", ".join(node.carriers) or "moves codes",
        f"{node.multiplies:,}",
        f"{node.additions:,}",
        f"{node.shift_adds:,}",
        f"{node.weight_bits:,}",
        f"{node.ebops:,}",
    ]


def _sums_of_trits(nodes: Sequence[NodeReport]) -> Table:
    """What the accumulators of ternary layers need, and why: the scale is a binary point and takes no bits."""
    made = _table("ternary layers", "node", "accumulator bits", "weights not 0 (largest)", "input codes", "zeros")
    for node in nodes:
        found = node.ternary
        assert found is not None
        fan_in = f"{found.nonzeros:,} of {found.fan_in:,}"
        _row(made, node.name, str(node.hls_bits), fan_in, _interval(found.input), f"{found.zeros:.1%}")
    return made


def _proof(proof: Mapping[str, Any]) -> Text:
    if proof["proved"]:
        return Text(
            f"proved: no accumulator of {proof['nodes']} nodes can overflow for any input; the widest needs "
            f"{proof['widest_hls_bits']} bits in HLS and {proof['widest_c_bits']} in C",
            style="green",
        )
    return Text(f"not proved for {', '.join(proof['unproved'])}; narrow their formats", style="red")


def _target(cost: TargetCost) -> RenderableType:
    label = f"target {cost.target}" + (" (modelled, not measured)" if cost.modelled else "")
    made = _table(label, *cost.columns)
    for row in cost.rows:
        _row(made, *(_figure(cell) for cell in row))
    lines = []
    for key, value in cost.totals.items():
        if isinstance(value, dict):
            lines.append(f"{key}: " + ", ".join(f"{name} {_figure(figure)}" for name, figure in value.items()))
        else:
            lines.append(f"{key}: {_figure(value)}")
    return Group(made, Text("\n".join(lines)))


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {depth}" for key, depth in value.items()) or "-"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(title: str, *columns: str) -> Table:
    made = Table(title=Text(title), title_justify="left")
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def _row(table: Table, *cells: str) -> None:
    table.add_row(*(Text(cell) for cell in cells))


def _shape(edge: Edge) -> str:
    return "x".join("N" if d is None else str(d) for d in edge.shape) or "scalar"


def _worth(port: Port) -> str:
    """What a code is worth beyond its format."""
    return "" if port.scale is None else f" * {port.scale:.6g}"


def _format(edge: Edge) -> str:
    """The format; where channels have their own, as many as `LISTED` in full, of more the span."""
    from edgemat.formats import Fixed

    fmt = Fixed.parse(edge.format)
    count = len(fmt.fracs)
    if count <= LISTED:
        return edge.format
    widths, points = fmt.widths or (fmt.width,), fmt.int_bits
    assert isinstance(points, tuple)
    kind = "fixed" if fmt.signed else "ufixed"
    return f"{kind}<{_span(widths)},{_span(points)},{fmt.rounding},{fmt.overflow}> of {count} channels"


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}..{high}"


def _interval(ends: tuple[int, int]) -> str:
    return f"{ends[0]:,} to {ends[1]:,}"
