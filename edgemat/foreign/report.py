"""What an import did with each node of the file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

TAKEN, FOLDED, REFUSED, BEHIND = "taken", "folded", "refused", "not reached"


@dataclass(frozen=True)
class Row:
    """One node of the file.

    Attributes:
        node: Its name.
        op: Its operator, with a foreign domain.
        fate: "taken" (it has nodes of its own now), "folded" (constants, or part of a neighbour), "refused" or
            "not reached" (it reads what a refused node should have computed).
        note: What it became, or why it was refused and what would help.
        fidelity: "exact", or for how many codes the integers differ from the file's arithmetic and by how much; empty
            where nothing is computed.
    """

    node: str
    op: str
    fate: str
    note: str = ""
    fidelity: str = ""


@dataclass
class ImportReport:
    """Result of `edgemat.import_onnx`.

    Attributes:
        source: Label of the file.
        rows: One for each node, in the order of the file.
        notes: Sentences about inputs and outputs.
        inexact: Nodes whose integers are proved or counted to differ from the file's arithmetic.
    """

    source: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def refused(self) -> list[Row]:
        """The refused nodes."""
        return [row for row in self.rows if row.fate == REFUSED]

    @property
    def inexact(self) -> list[Row]:
        """Nodes whose integers differ from the file's own arithmetic for some codes."""
        return [row for row in self.rows if row.fidelity not in ("", "exact")]

    @property
    def counts(self) -> dict[str, int]:
        """Nodes by fate."""
        return {fate: sum(row.fate == fate for row in self.rows) for fate in (TAKEN, FOLDED, REFUSED, BEHIND)}

    def summary(self) -> str:
        """A line of counts, a line for each node that is not exact, and the notes."""
        counted = ", ".join(f"{count} {fate}" for fate, count in self.counts.items() if count)
        nodes = "1 node" if len(self.rows) == 1 else f"{len(self.rows)} nodes"
        exact = "" if self.refused else f", {len(self.inexact)} not exact" if self.inexact else ", all exact"
        inexact = (f"{row.node} ({row.op}) {row.fidelity}" for row in self.inexact)
        return "\n".join((f"{self.source}: {nodes}, {counted or 'none'}{exact}", *inexact, *self.notes))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "source": self.source,
            "nodes": self.counts,
            "rows": [asdict(row) for row in self.rows],
            "notes": self.notes,
        }

    def render(self) -> RenderableType:
        """A table for people."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(f"{self.source}: {len(self.rows)} nodes"))  # names of strangers hold no markup
        for column in ("node", "operator", "fate", "what it became", "fidelity"):
            table.add_column(column, overflow="fold")
        colours = {TAKEN: "green", FOLDED: "dim", REFUSED: "bold red", BEHIND: "yellow"}
        for row in self.rows:
            style = "yellow" if row.fidelity not in ("", "exact") else ""
            cells = (
                Text(row.node),
                Text(row.op),
                Text(row.fate, style=colours[row.fate]),
                Text(row.note),
                Text(row.fidelity, style=style),
            )
            table.add_row(*cells)
        return Group(table, *(Text(note) for note in self.notes))
