"""`Front`: the checkpoints of a training that no other beats in accuracy and cost, on disk."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgemat.errors import FormatError
from edgemat.nn import arguments

if TYPE_CHECKING:
    from rich.table import Table

INDEX = "front.json"
VERSION = 1


@dataclass(frozen=True)
class FrontPoint:
    """One checkpoint of the front.

    Attributes:
        accuracy: Higher is better.
        cost: Lower is better.
        file: Name of the checkpoint in the front's folder.
    """

    accuracy: float
    cost: float
    file: str

    def dominates(self, accuracy: float, cost: float) -> bool:
        """Whether this point is at least as good in both."""
        return self.accuracy >= accuracy and self.cost <= cost


class Front:
    """The non-dominated checkpoints of one or more trainings, in a folder.

    Files appear and vanish atomically. `front.json`, for plots, holds ``{"points": [{"accuracy", "cost", "file"}]}`` by
    growing cost; it is replaced after a checkpoint is complete and before a beaten one is deleted, so that a run
    that dies leaves a front that opens again.

    Args:
        folder: Where checkpoints and the index lie; made if missing. A front already there continues.

    Raises:
        FormatError: if the folder is no path or cannot be made, or the index there cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = arguments.place("Front: folder", folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FormatError(
                f"Front: {str(self.folder)!r} cannot be a folder ({error.strerror}); choose another place"
            ) from None
        self._points: list[FrontPoint] = []
        self._count = 0
        index = self.folder / INDEX
        if index.exists():
            try:
                self._take(json.loads(index.read_text(encoding="utf-8")))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise FormatError(
                    f"Front: {str(index)!r} cannot be read ({error}), expected an index this class wrote; choose "
                    "another folder or delete it"
                ) from None

    @property
    def points(self) -> list[FrontPoint]:
        """The front by growing cost (and so by growing accuracy)."""
        return list(self._points)

    def offer(self, q: nn.Module, accuracy: float | Tensor, cost: float | Tensor) -> bool:
        """Keeps the network's `state_dict` if no point is at least as good in both; drops what it beats.

        Args:
            q: The network.
            accuracy: Its accuracy (or anything of which more is better), measured on data it was not trained on.
            cost: Its cost.

        Returns:
            Whether it was kept.

        Raises:
            FormatError: if `q` is no module, or accuracy or cost is no finite number.
        """
        arguments.module("Front: offer", q)
        accuracy, cost = arguments.number("Front: accuracy", accuracy), arguments.number("Front: cost", cost)
        if any(point.dominates(accuracy, cost) for point in self._points):
            return False
        self._count += 1
        made = FrontPoint(accuracy, cost, f"point-{self._count:05d}.pt")
        state = {name: value.detach().cpu() if isinstance(value, Tensor) else value for name, value in
                 q.state_dict().items()}  # fmt: skip
        self._write(made.file, lambda path: torch.save(state, path))
        beaten = [point for point in self._points if made.dominates(point.accuracy, point.cost)]
        kept = [point for point in self._points if point not in beaten]
        self._points = sorted([*kept, made], key=lambda point: (point.cost, point.accuracy))
        text = json.dumps(self.state_dict(), indent=1) + "\n"
        self._write(INDEX, lambda path: Path(path).write_text(text, encoding="utf-8"))
        for point in beaten:
            (self.folder / point.file).unlink(missing_ok=True)
        return True

    def _write(self, name: str, write: Callable[[str], Any]) -> None:
        """Writes a file beside its place, then moves it there."""
        handle, path = tempfile.mkstemp(prefix=".", suffix=".part", dir=self.folder)
        os.close(handle)
        try:
            write(path)
            os.replace(path, self.folder / name)
        except BaseException:
            Path(path).unlink(missing_ok=True)
            raise

    def load(self, q: nn.Module, point: FrontPoint | int) -> FrontPoint:
        """Loads a point's checkpoint into `q`, a network of the same recipe.

        Args:
            q: The network.
            point: A point, or its position in `points`.

        Returns:
            The point.

        Raises:
            FormatError: if `q` is no module, or there is no such point.
        """
        arguments.module("Front: load", q)
        found = point if isinstance(point, FrontPoint) else self._at(point)
        q.load_state_dict(torch.load(self.folder / found.file, weights_only=True, map_location="cpu"))
        return found

    def _at(self, position: Any) -> FrontPoint:
        """The point at a position, counted from the end where it is negative."""
        count = len(self._points)
        if isinstance(position, bool) or not isinstance(position, int) or not -count <= position < count:
            raise FormatError(
                f"Front: point is {position!r}, expected one of its {count} points or a position among them; "
                "`front.points` lists them"
            )
        return self._points[position]

    def table(self) -> Table:
        """The front for the terminal."""
        from rich.table import Table

        made = Table(title=f"Front in {self.folder.name}: {len(self._points)} points")
        made.add_column("cost", justify="right")
        made.add_column("accuracy", justify="right")
        made.add_column("checkpoint")
        for point in self._points:
            made.add_row(f"{point.cost:,.0f}", f"{point.accuracy:.4f}", point.file)
        return made

    def state_dict(self) -> dict[str, Any]:
        """The index: what front.json holds."""
        return {"version": VERSION, "count": self._count, "points": [asdict(point) for point in self._points]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up an index; points whose checkpoint is missing are left out."""
        self._take(state)

    def _take(self, state: dict[str, Any]) -> None:
        if state["version"] != VERSION:
            raise FormatError(f"Front: the index has version {state['version']}, expected {VERSION}")
        found = [FrontPoint(float(p["accuracy"]), float(p["cost"]), str(p["file"])) for p in state["points"]]
        for point in found:
            if Path(point.file).name != point.file:
                raise FormatError(f"Front: the index names {point.file!r}, expected a file in its own folder")
        self._points = [point for point in found if (self.folder / point.file).exists()]
        self._count = int(state["count"])
