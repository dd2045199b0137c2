"""`write_report`: one HTML file that shows a network's values, formats, training and cost; it loads nothing else."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from edgemat.errors import EdgematError
from edgemat.formats import Fixed
from edgemat.lower.graph import Graph
from edgemat.lower.reader import read
from edgemat.report import charts
from edgemat.report.checkpoint import Checkpoint, is_checkpoint, read_checkpoint
from edgemat.report.history import Series, read_front, read_history
from edgemat.report.inspection import Inspection, inspect
from edgemat.report.targets import TargetCost
from edgemat.report.values import BINS, Distribution, distributions, infinities
from edgemat.sim.arrays import Arrays

Card = dict[str, Any]
Table = dict[str, Any]
_LEGEND = 40


def write_report(
    model: str | os.PathLike[str] | Graph,
    output: str | os.PathLike[str],
    inputs: Arrays | None = None,
    codes: bool = False,
    history: str | os.PathLike[str] | None = None,
    front: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes the report, under a temporary name first.

    Args:
        model: A lowered file, or one that `edgemat.lower.read` has read, or a checkpoint of a training (which has
            formats and weights, but no graph).
        output: HTML file to write.
        inputs: Samples for the histograms of a lowered file; None generates some over the whole input formats.
        codes: Whether `inputs` are codes.
        history: Formats over time: what `edgemat.FormatHistory.save` wrote, or a CSV logger's ``metrics.csv``.
        front: ``front.json`` of an `edgemat.Front`, or its folder.

    Returns:
        The file.

    Raises:
        EdgematError: if something cannot be read or written; nothing is left behind then.

    Warns:
        RuntimeWarning: for infinities among the inputs, which saturate; the page says so, too.
    """
    output = Path(output)
    file = None if isinstance(model, Graph) else Path(model)
    for source in (file, history, front, None if front is None else Path(front) / "front.json"):
        if source is not None and output.exists() and Path(source).exists() and output.samefile(source):
            raise EdgematError(f"the report would replace {output}, which it is made from; choose another output")
    series: Sequence[Series] = () if history is None else read_history(history)
    points = [] if front is None else read_front(front)
    if file is not None and is_checkpoint(file):
        if inputs is not None:
            raise EdgematError(f"{file} is a checkpoint, which cannot be run; give inputs with a lowered file only")
        page = _checkpoint_page(read_checkpoint(file), file.name)
        series = series or page.pop("series")
    else:
        graph = model if isinstance(model, Graph) else read(model)
        page = _graph_page(graph, inputs, codes)
    page.pop("series", None)
    for warning in page.get("warnings", ()):
        warnings.warn(warning, RuntimeWarning, stacklevel=2)
    page |= {"file": graph.name if file is None else file.name, "training": _training(series), "front": _front(points)}
    return _write(output, _environment().get_template("report.html").render(page))


def _graph_page(graph: Graph, inputs: Arrays | None, codes: bool) -> dict[str, Any]:
    """Everything a lowered file says."""
    report = inspect(graph)
    tensors, weights = distributions(graph, inputs, codes)
    infinite = {} if inputs is None or codes else infinities(graph, inputs)
    costs = [_cost(inspect(graph, target).target) for target in ("mcu", "hls")]
    source = "generated, uniform over what the inputs can hold" if inputs is None else "given"
    samples = tensors[0].count // max(graph.input_type(0).size, 1)
    return {
        "title": report.model,
        "facts": _facts(report),
        "samples": f"{samples:,} samples, {source}",
        "warnings": list(infinite.values()),
        "cards": [_card(entry) for entry in tensors],
        "weights": [_card(entry) for entry in weights],
        "tables": [_nodes(report), *(cost for cost in costs if cost)],
        "arena": _arena(graph),
    }


def _checkpoint_page(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Everything a checkpoint says."""
    rows = [
        [f.name, f.format, _span(f.fracs) if f.calibrated else "not calibrated", f"{f.fracs.size:,}"]
        for f in checkpoint.formats
    ]
    facts = [("quantisers", f"{len(rows):,}"), ("layers with weights", f"{len(checkpoint.weights):,}")]
    if checkpoint.step is not None:
        facts.append(("steps", f"{checkpoint.step:,}"))
    cards = []
    for layer, values in checkpoint.weights.items():
        finite = values[np.isfinite(values)]
        if finite.size:
            counts, edges = np.histogram(finite.astype(np.float64), min(BINS, finite.size))
            drawn = charts.histogram(edges, counts, None, f"weights of {layer}")
            low, high = (charts.number(float(v)) for v in (finite.min(), finite.max()))
            text = f"{values.size:,} real weights, {low} to {high}"
            cards.append(
                {"name": layer, "kind": "weights before rounding", "format": "", "chart": drawn, "notes": [text]}
            )
    table = {
        "title": "Formats",
        "note": "",
        "columns": ("quantiser", "format", "fractional bits", "points"),
        "rows": rows,
    }
    return {
        "title": name,
        "facts": facts,
        "samples": "",
        "cards": [],
        "weights": cards,
        "tables": [table],
        "arena": None,
        "series": list(checkpoint.history),
    }


def _facts(report: Inspection) -> list[tuple[str, str]]:
    totals = report.totals
    return [
        ("nodes", f"{totals['nodes']:,}"),
        ("multiplies", f"{totals['multiplies']:,}"),
        ("additions", f"{totals['additions']:,}"),
        ("weight bytes", f"{-(-totals['weight_bits'] // 8):,}"),
        ("widest accumulator", f"{report.overflow['widest_hls_bits']} bits"),
        ("overflow", "impossible, proved" if report.proved else "not excluded"),
    ]


def _card(entry: Distribution) -> Card:
    """A histogram and what is to be said beside it."""
    shown = entry.shown_rails
    notes = [f"{entry.count:,} values, {charts.number(entry.low)} to {charts.number(entry.high)}"]
    if entry.at_rails is not None:
        notes.append(f"{entry.at_rails:.2%} at a rail")
    notes.append(f"{entry.zeros:.1%} zeros")
    if entry.spare_bits:
        notes.append(f"{entry.spare_bits} bit{'s' if entry.spare_bits > 1 else ''} of range unused")
    if shown is None:
        low, high = entry.rails
        notes.append(f"the format reaches {charts.number(low)} to {charts.number(high)}")
    drawn = charts.histogram(entry.edges, entry.counts, shown, f"values of {entry.name}")
    flagged = entry.at_rails is not None and entry.at_rails > 0.01
    return {
        "name": entry.name,
        "kind": entry.kind,
        "format": format_text(entry.format),
        "chart": drawn,
        "notes": notes,
        "flagged": flagged,
    }


def format_text(fmt: Fixed) -> str:
    """A format for people: lists of more than four channels as ranges."""
    text = str(fmt)
    if fmt.per_channel and len(fmt.fracs) > 4:
        widths = "" if fmt.widths is None else f", widths {_span(np.asarray(fmt.widths))}"
        kind = "fixed" if fmt.signed else "ufixed"
        points = f"int bits {_span(np.asarray(fmt.int_bits))} by channel"
        return f"{kind}<{fmt.width}> {points}{widths}, {fmt.rounding}, {fmt.overflow}"
    return text


def _span(values: np.ndarray) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high} (mean {float(values.mean()):.2f})"


def _nodes(report: Inspection) -> Table:
    columns = (
        "node",
        "operator",
        "result",
        "format",
        "partial sums",
        "accumulator bits",
        "C",
        "multiplies",
        "weight bits",
    )
    rows = []
    for node in report.nodes:
        edge = node.outputs[0]
        shape = "x".join("N" if d is None else str(d) for d in edge.shape)
        bits = f"{node.accumulator} stated, {node.needed_bits} needed" if node.accumulator else str(node.hls_bits)
        kind = f"int{node.c_bits}_t" if node.c_bits else "none"
        text = format_text(Fixed.parse(edge.format))
        span = f"{node.partial[0]:,} to {node.partial[1]:,}"
        rows.append(
            [node.name, node.operator, shape, text, span, bits, kind, f"{node.multiplies:,}", f"{node.weight_bits:,}"]
        )
    note = "Every partial sum in any order lies in the interval given: proved from the codes and the formats."
    return {"title": "Nodes", "note": note, "columns": columns, "rows": rows}


def _cost(cost: TargetCost | None) -> Table | None:
    if cost is None:
        return None
    parts = []
    for key, value in cost.totals.items():
        figures = value.items() if isinstance(value, dict) else ((key, value),)
        start = f"{key}: " if isinstance(value, dict) else ""
        parts.append(start + ", ".join(f"{name.replace('_', ' ')} {_figure(v)}" for name, v in figures))
    names = {"mcu": "Microcontroller", "hls": "FPGA (modelled, not measured)" if cost.modelled else "FPGA"}
    return {
        "title": names[cost.target],
        "note": "; ".join(parts),
        "columns": tuple(column.replace("_", " ") for column in cost.columns),
        "rows": [[_figure(cell) for cell in row] for row in cost.rows],
    }


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {depth}" for key, depth in value.items()) or "-"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _arena(graph: Graph) -> dict[str, Any] | None:
    """Which buffer lies where in the microcontroller's arena, and when."""
    from edgemat.targets.layout import to_native
    from edgemat.targets.mcu.arena import plan_arena

    network = to_native(graph)
    plan = plan_arena(network)
    if not plan.buffers:
        return None
    blocks = [charts.Block(b.members[0], b.first, b.last, b.offset, b.size_bytes) for b in plan.buffers]
    drawn = charts.arena(blocks, len(network.steps), plan.size_bytes, "buffers in the arena")
    note = f"{plan.size_bytes:,} bytes; no plan can do with fewer than {plan.lower_bound_bytes:,}"
    return {"chart": drawn, "note": note}


def _training(series: Sequence[Series]) -> dict[str, Any] | None:
    if not series:
        return None
    moved = sorted(series, key=lambda s: -(max(s.frac) - min(s.frac)))
    legend = [
        {
            "name": s.name,
            "stroke": charts.stroke(series.index(s)),
            "from": _point(s.frac[0]),
            "to": _point(s.frac[-1]),
        }
        for s in moved[:_LEGEND]
    ]
    widths = [charts.Line(s.name, s.steps, s.width) for s in series]
    changes = any(len(set(line.y)) > 1 for line in widths)
    return {
        "points": charts.lines(
            [charts.Line(s.name, s.steps, s.frac) for s in series], "fractional bits over time", "step"
        ),
        "widths": charts.lines(widths, "widths over time", "step") if changes else None,
        "legend": legend,
        "hidden": max(len(series) - _LEGEND, 0),
    }


def _point(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _front(points: Sequence[tuple[float, float, str]]) -> dict[str, Any] | None:
    if not points:
        return None
    rows = [[name, f"{accuracy:.4f}", charts.number(cost)] for cost, accuracy, name in points]
    return {"chart": charts.front(points, "accuracy over cost"), "rows": rows}


def _environment() -> jinja2.Environment:
    folder = resources.files("edgemat.report").joinpath("templates")
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(f"{name}.j2").read_text(encoding="utf-8")),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else str(value),
    )


def _write(output: Path, text: str) -> Path:
    """Replaces the file at once, or leaves what was there."""
    if output.is_dir():
        raise EdgematError(f"{output} is a folder, expected the name of an HTML file to write")
    try:
        handle, part = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
    except OSError as error:
        raise EdgematError(f"{output} cannot be written ({error.strerror}); choose another place") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(part, 0o666 & ~umask)
        os.replace(part, output)
    except OSError as error:
        raise EdgematError(
            f"{output} cannot be written ({error.strerror}); make room or choose another place"
        ) from error
    finally:
        Path(part).unlink(missing_ok=True)
    return output
