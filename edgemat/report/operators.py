"""`ops_table`: which operator runs on which backend, derived from the dossiers and the native files that exist."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from edgemat.op import Op
from edgemat.ops import OPS

if TYPE_CHECKING:
    from rich.console import RenderableType

BACKENDS = ("reference", "onnx", "torch", "hls", "mcu")
_FOREIGN = ("thresholds",)
"""Only what is read from other files becomes these; no layer of torch does."""
_BOUNDARY = ("quantize", "dequantize", "state", "next_state")
LOWERED_AWAY = (
    ("Split", "lowered to Slice"),
    ("Flatten, Squeeze, Unsqueeze", "lowered to Reshape"),
    ("Gather (one index)", "lowered to Slice, Reshape"),
    ("GlobalMaxPool", "lowered to MaxPool"),
    ("Batch norm (folded)", "folded into the weights before quantisation"),
    ("Batch norm (fixed point)", "lowered to Affine"),
    ("Global average pooling", "lowered to AveragePool"),
    ("ReLU6, hard tanh", "lowered to Clip"),
    ("LeakyReLU", "lowered to PRelu"),
    ("Sigmoid, tanh, SiLU, GELU, hard variants", "lowered to Table"),
)
"""What users write and the lowered file spells otherwise."""


@dataclass(frozen=True)
class OpRow:
    """An operator and, by backend, how it runs there; an empty text means that it does not."""

    operator: str
    reference: str
    onnx: str
    torch: str
    hls: str
    mcu: str
    note: str = ""


@dataclass(frozen=True)
class OpsTable:
    """What `ops_table` returns; ``rows`` follow `edgemat.ops.OPS`, then what is lowered to them."""

    rows: tuple[OpRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, by operator."""
        return {"backends": list(BACKENDS), "operators": [asdict(row) for row in self.rows]}

    def render(self) -> RenderableType:
        """A table for the terminal."""
        from edgemat.report.tables import operator_table

        cells = [[row.operator, *(getattr(row, backend) or "-" for backend in BACKENDS), row.note] for row in self.rows]
        return operator_table(BACKENDS, cells)

    def markdown(self) -> str:
        """The table of docs/operators.md."""
        lines = ["| operator | reference | onnx | torch | hls | mcu | note |", "|---|---|---|---|---|---|---|"]
        for row in self.rows:
            cells = [row.operator, *(getattr(row, backend) or "none" for backend in BACKENDS), row.note]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"


def ops_table() -> OpsTable:
    """The operators of this edgemat and the backends that have them."""
    rows = [_row(op) for op in OPS]
    rows += [OpRow(name, "", "", "yes", "", "", note) for name, note in LOWERED_AWAY]
    return OpsTable(tuple(rows))


def _row(op: Op) -> OpRow:
    note = (op.__doc__ or "").strip().splitlines()[0].rstrip(".").replace("``", "`")
    hls, mcu = _native(op)
    return OpRow(op.name, "yes", "body", "" if op.stem in _FOREIGN else "yes", hls, mcu, note)


def _native(op: Op) -> tuple[str, str]:
    """How the two native targets run an operator."""
    from edgemat.targets.hls.project import library

    if op.stem in _BOUNDARY:
        return "generated", "generated"
    if op.stem == "constant":
        return "ROM", "const"
    if op.stem == "reshape":
        return "alias", "alias"
    headers = library().joinpath("include", "edgemat")
    hls = f"{op.stem}.hpp" if headers.joinpath(f"{op.stem}.hpp").is_file() else ""
    mcu = f"{op.stem}.c" if resources.files("edgemat").joinpath(f"targets/mcu/kernels/{op.stem}.c").is_file() else ""
    return hls, mcu
