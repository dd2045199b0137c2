"""What a verification found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.console import RenderableType

EXACT, MISMATCH, UNAVAILABLE = "exact", "mismatch", "unavailable"


@dataclass(frozen=True)
class BackendResult:
    """One backend's row.

    Attributes:
        status: "exact", "mismatch" or "unavailable".
        compared: Codes compared.
        mismatches: Codes that differ.
        reason: Why it is unavailable, or what was found.
    """

    status: str
    compared: int = 0
    mismatches: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Mismatch:
    """The first code that differs: the first node in graph order, then the first index.

    Attributes:
        backend: Name of the backend.
        node: Node that wrote the tensor.
        index: Position, beginning with the sample (of sequences: with the sequence).
        expected: The reference's code.
        found: The backend's code.
        step: The step of the sequence, from 0, or None where the file has no states.
    """

    backend: str
    node: str
    index: list[int]
    expected: int
    found: int
    step: int | None = None


@dataclass(frozen=True)
class Report:
    """Result of `edgemat.verify`.

    Attributes:
        samples: Samples each full backend ran, corner vectors included; of a file with states: sequences.
        corners: How many of them are corner vectors, or corner sequences.
        backends: Row by backend name.
        first_mismatch: The first difference, or None.
        overflow_proved: Whether every accumulator is proved to hold its sums.
        ties: Fused requantisations whose ties (and their neighbours) occurred, of all that have any.
        steps: Steps of each sequence that is no corner sequence, of a file with recurrent states; else 0.
        corner_steps: Steps of each corner sequence; 0 where none ran.
        outputs: With `keep`: by backend that ran and name of the output, the int64 codes it returned for the inputs,
            corner vectors left out: [N, ...], or [T, N, ...] of sequences. Empty without `keep`.
    """

    samples: int
    corners: int
    backends: dict[str, BackendResult]
    first_mismatch: Mismatch | None
    overflow_proved: bool
    ties: tuple[int, int]
    steps: int = 0
    corner_steps: int = 0
    outputs: dict[str, dict[str, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def ok(self) -> bool:
        """True if every backend that ran is exact and at least one ran beside the reference."""
        ran = [row.status for row in self.backends.values()]
        return MISMATCH not in ran and EXACT in ran

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        first = self.first_mismatch
        return {
            "ok": self.ok,
            "samples": self.samples,
            "corners": self.corners,
            "steps": self.steps,
            "corner_steps": self.corner_steps,
            "backends": {
                name: {
                    "status": row.status,
                    "compared": row.compared,
                    "mismatches": row.mismatches,
                    "reason": row.reason,
                }
                for name, row in self.backends.items()
            },
            "first_mismatch": None
            if first is None
            else {
                "backend": first.backend,
                "node": first.node,
                "step": first.step,
                "index": first.index,
                "expected": first.expected,
                "found": first.found,
            },
            "overflow": {"proved": self.overflow_proved},
            "ties": {"covered": self.ties[0], "of": self.ties[1]},
        }

    def render(self) -> RenderableType:
        """A table for people."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        title = f"{self.samples} samples, {self.corners} of them corner vectors"
        if self.steps:
            title = f"{_counted(self.samples - self.corners, 'sequence')} of {_counted(self.steps, 'step')}, "
            beside = f"{_counted(self.corners, 'corner sequence')} of {_counted(self.corner_steps, 'step')}"
            title += beside if self.corners else "no corner sequences"
        table = Table(title=title)
        for column in ("backend", "status"):
            table.add_column(column)
        for column in ("codes compared", "mismatches"):
            table.add_column(column, justify="right")
        table.add_column("note")
        colours = {EXACT: "green", MISMATCH: "bold red", UNAVAILABLE: "yellow"}
        for name, row in self.backends.items():
            table.add_row(
                name,
                Text(row.status, style=colours[row.status]),
                f"{row.compared:,}",
                f"{row.mismatches:,}",
                Text(row.reason),
            )
        proof = "proved: no accumulator can overflow" if self.overflow_proved else "NOT proved: see edgemat inspect"
        lines = [f"Overflow {proof}. Ties met at {self.ties[0]} of {self.ties[1]} requantisations."]
        first = self.first_mismatch
        if first is not None:
            at = "" if first.step is None else f"step {first.step}, "
            lines.append(
                f"First difference: backend {first.backend}, {at}node {first.node}, index {first.index}: "
                f"expected {first.expected}, found {first.found}."
            )
        return Group(table, *(Text(line) for line in lines))


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
