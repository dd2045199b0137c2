"""`summary`: which layers a quantised network has, in which formats, and what became of every float layer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from edgemat.errors import LoweringError
from edgemat.formats import Fixed
from edgemat.nn.accumulator import AccumulatorQuantizer
from edgemat.nn.khot import KHotQuantizer
from edgemat.nn.layer import QuantLayer
from edgemat.nn.learned_activation import LearnedActivationQuantizer
from edgemat.nn.learned_width import LearnedWidthQuantizer
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.statistics import StatisticsQuantizer
from edgemat.nn.treatment import Treatment, remembered

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class LayerSummary:
    """One row of a summary.

    Attributes:
        name: Name of the float layer or function.
        kind: Its class, or the function's name.
        action: One of `edgemat.nn.treatment.ACTIONS`.
        weights: Format of weights, scales or slopes, with the binary points found so far, or "".
        groups: What shares a binary point of the weights, or "".
        constraint: What else holds for the weights: K-hot, accumulator, learned widths, or "".
        activations: Format of the result, or "".
        parameters: Trained numbers of the layer, format parameters left out.
        reason: Why, where the formats do not say it.
    """

    name: str
    kind: str
    action: str
    weights: str
    groups: str
    constraint: str
    activations: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class Summary:
    """What `edgemat.summary` returns; ``print`` it, render it with rich, or take `to_dict`."""

    network: str
    rows: tuple[LayerSummary, ...]

    @property
    def parameters(self) -> int:
        """Trained numbers of all layers."""
        return sum(row.parameters for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and integers."""
        return {
            "network": self.network,
            "parameters": self.parameters,
            "layers": [asdict(row) for row in self.rows],
        }

    def __rich__(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        columns = ("layer", "kind", "done", "weights", "groups", "constraint", "result", "parameters", "why")
        used = [
            i
            for i, key in enumerate(LayerSummary.__dataclass_fields__)
            if i < 3 or any(getattr(row, key) for row in self.rows)
        ]
        made = Table(title=Text(f"{self.network}: {self.parameters:,} parameters"), title_justify="left")
        for i in used:
            made.add_column(columns[i], overflow="fold", justify="right" if columns[i] == "parameters" else "left")
        for row in self.rows:
            cells = [f"{v:,}" if isinstance(v, int) and v else str(v or "") for v in asdict(row).values()]
            style = {"left": "yellow", "kept": "dim", "folded": "dim", "moved": "dim"}.get(row.action, "")
            made.add_row(*(Text(cells[i]) for i in used), style=style)
        return made

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        text = StringIO()
        Console(file=text, width=160, color_system=None).print(self)
        return text.getvalue().rstrip("\n")


def summary(module: nn.Module) -> Summary:
    """Which layers `edgemat.quantize` took, left and why, with their present formats.

    Args:
        module: The result of `edgemat.quantize`, or a module built from edgemat.nn layers.

    Returns:
        A table: `str`, ``print``, rich and ``.to_dict()`` show it.

    Raises:
        LoweringError: if the module holds no layer of edgemat.
        FormatError: for what is no module.
    """
    from edgemat.nn.arguments import module as checked
    from edgemat.nn.conversion import network_name

    if not any(isinstance(part, QuantLayer | FixedQuantizer) for part in checked("summary", module).modules()):
        raise LoweringError(
            f"{type(module).__name__} holds no layer of edgemat.nn, expected a quantised module; call edgemat.quantize "
            "first"
        )
    treatments = remembered(module) or _direct(module)
    parts = dict(module.named_modules())
    counted: set[int] = set()
    rows = tuple(_row(entry, parts, counted) for entry in treatments)
    return Summary(network_name(module), rows)


def show(module: nn.Module) -> None:
    """Prints the summary to stderr."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:  # a log keeps its columns
        console = Console(stderr=True, width=max(console.width, 160))
    console.print(summary(module))


def wanted(verbose: bool | None) -> bool:
    """Whether a summary is to be printed: as asked, by default where stderr is a terminal."""
    return sys.stderr.isatty() if verbose is None else verbose


def _direct(module: nn.Module) -> list[Treatment]:
    """The layers of a network that its user built from edgemat.nn."""
    inner: set[str] = set()
    found = []
    for name, part in module.named_modules():
        if name.rpartition(".")[0] in inner:
            inner.add(name)
        elif isinstance(part, QuantLayer | FixedQuantizer):
            inner.add(name)
            found.append(Treatment(name, type(part).__name__, "quantised", name))
    return found


def _row(entry: Treatment, parts: dict[str, nn.Module], counted: set[int]) -> LayerSummary:
    part = parts.get(entry.name if entry.action == "folded" else entry.module or entry.name)
    weights = groups = constraint = activations = ""
    count = 0
    if entry.action in ("quantised", "kept") and part is not None:
        quantizer = getattr(part, "weight_quantizer", None)
        if isinstance(quantizer, FixedQuantizer):
            weights, groups, constraint = condensed(quantizer), _groups(quantizer), _constraint(quantizer)
        output = part if isinstance(part, FixedQuantizer) else getattr(part, "output_quantizer", None)
        if isinstance(output, FixedQuantizer):
            activations = condensed(output)
    if part is not None and entry.action != "moved":
        count = _parameters(part, counted)
    return LayerSummary(
        entry.name, entry.kind, entry.action, weights, groups, constraint, activations, count, entry.reason
    )


def _parameters(part: nn.Module, counted: set[int]) -> int:
    """Weights and biases of a layer, each counted once."""
    formats = {id(p) for m in part.modules() if isinstance(m, FixedQuantizer) for p in m.parameters()}
    own = [p for p in part.parameters() if id(p) not in formats and id(p) not in counted]
    counted.update(id(p) for p in own)
    return sum(p.numel() for p in own)


def _groups(quantizer: FixedQuantizer) -> str:
    if isinstance(quantizer, LearnedWidthQuantizer):
        named = getattr(quantizer, "groups", None)
        count = quantizer.frac.numel()
        size = getattr(named, "size", 0)
        return f"{count} of {size} inputs" if size else f"{count} groups" if count > 1 else "tensor"
    return f"channel ({quantizer.frac.numel()})" if quantizer.per_channel else "tensor"


def _constraint(quantizer: FixedQuantizer) -> str:
    if isinstance(quantizer, KHotQuantizer):
        return f"{quantizer.khot}-hot"
    if isinstance(quantizer, AccumulatorQuantizer):
        return f"{quantizer.bits}-bit accumulator ({quantizer.bound})"
    if isinstance(quantizer, LearnedWidthQuantizer):
        if not quantizer.has_codes:
            return "width learned"
        pruned = float((quantizer.codes_now() == 0).float().mean())
        return f"width learned: mean {float(quantizer.bits().detach().mean()):.2f} bits, {pruned:.0%} pruned"
    return "points from statistics" if isinstance(quantizer, StatisticsQuantizer) else ""


def condensed(quantizer: FixedQuantizer) -> str:
    """A quantiser's format in a few characters: ranges in place of lists, modes only where they are unusual."""
    if not quantizer.ready:
        return short(quantizer._blank) + (" (width learned)" if _learns(quantizer) else "")
    return short(quantizer.format)


def _learns(quantizer: FixedQuantizer) -> bool:
    return isinstance(quantizer, LearnedWidthQuantizer | LearnedActivationQuantizer)


def short(fmt: Fixed) -> str:
    """A format as ``fixed<6,-1..2>``: lists as ranges, RND and SAT left out."""
    if fmt.bipolar:
        return "bipolar"
    width = str(fmt.width) if fmt.widths is None else _range(fmt.widths)
    points = fmt.int_bits if isinstance(fmt.int_bits, tuple) else (fmt.int_bits,)
    point = "" if fmt.int_bits is None else f",{_range([p for p in points if p is not None])}"
    modes = "" if (fmt.rounding, fmt.overflow) == ("RND", "SAT") else f",{fmt.rounding},{fmt.overflow}"
    return f"{'' if fmt.signed else 'u'}fixed<{width}{point}{modes}>"


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}..{high}"
