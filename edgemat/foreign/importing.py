"""The verb `import`: a foreign file to a lowered one, or every refusal at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from edgemat.errors import EdgematError, LoweringError
from edgemat.foreign.outputs import close
from edgemat.foreign.report import REFUSED, ImportReport, Row
from edgemat.foreign.source import Source, load
from edgemat.foreign.translator import MALFORMED, Translator, malformed
from edgemat.formats import Fixed
from edgemat.lower.passes import simplify
from edgemat.lower.writer import finish, write


class ImportRefused(LoweringError):
    """A file cannot be taken as it is.

    Attributes:
        report: What became of each node; all refusals are in it.
    """

    def __init__(self, message: str, report: ImportReport) -> None:
        super().__init__(message)
        self.report = report


def import_onnx(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    inputs: Mapping[str, str] | None = None,
    strict: bool = False,
    name: str | None = None,
) -> ImportReport:
    """Brings a quantised ONNX file of another tool into edgemat's lowered form.

    Args:
        path: A QONNX, QDQ or QOperator file.
        output: Lowered file to write (atomically).
        inputs: Formats of float inputs that no quantiser of the file states, by name: ``{"x": "ufixed<8,0>"}``.
        strict: Refuse nodes whose integers differ from the file's own arithmetic for some codes.
        name: Name of the model; by default the file's stem.

    Returns:
        What became of each node.

    Raises:
        ImportRefused: if a node has no exact integer form; the message lists every such node.
        LoweringError: if the file cannot be read or written.
        FormatError: if a stated format is none.
    """
    model, report = imported(load(path), inputs or {}, strict, name or Path(path).stem)
    write(model, output)
    return report


def imported(
    source: Source, inputs: Mapping[str, str], strict: bool = False, name: str = "model"
) -> tuple[ir.Model, ImportReport]:
    """The lowered model of a foreign one, not yet written."""
    from edgemat.foreign.handlers import HANDLERS

    formats = {key: Fixed.parse(text) for key, text in inputs.items()}
    known = {value.name for value in source.graph.inputs}
    unknown = [key for key in formats if key not in known]
    if unknown:
        raise LoweringError(f"no input is called {unknown[0]!r}; the file's inputs are {', '.join(map(str, known))}")
    tr = Translator(source, _legal(name), formats, HANDLERS)
    report = tr.run()
    refusals = [row.note for row in report.refused]

    def refused(value: ir.Value, text: str) -> None:
        refusals.append(text)
        report.rows.append(Row(value.name or "output", "graph output", REFUSED, text))

    for value in source.graph.outputs:
        try:
            close(tr, value)
        except EdgematError as error:
            refused(value, str(error))
        except MALFORMED as error:
            refused(value, f"output {value.name!r}: {malformed(error)}; check the file with onnx.checker")
    if strict:
        refusals += [f"node {row.node!r} ({row.op}) {row.fidelity}, and --strict is set" for row in report.inexact]
    if refusals:
        count = f"{len(refusals)} nodes are" if len(refusals) > 1 else "a node is"
        listed = "".join(f"\n  - {text}" for text in refusals) if len(refusals) > 1 else f" {refusals[0]}"
        raise ImportRefused(f"{source.label} is not taken, {count} refused:{listed}", report)
    if not tr.bench.graph.outputs:
        raise ImportRefused(f"{source.label} has no output", report)
    model = ir.Model(tr.bench.graph, ir_version=10)
    simplify(model)
    unread = [value.name for value in model.graph.inputs if not value.uses()]
    if unread:
        raise ImportRefused(
            f"no output depends on input {unread[0]!r} of {source.label}; remove it from the file", report
        )
    finish(model)
    return model, report


def _legal(name: str) -> str:
    kept = "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in name)
    return kept or "model"
