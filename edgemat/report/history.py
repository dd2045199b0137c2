"""Learned formats over time, as files hold them: `edgemat.FormatHistory`'s JSON, or a CSV logger's metrics."""

from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemat.errors import EdgematError

VERSION = 1
KIND = "edgemat format history"
MAX_BYTES = 1 << 28
_PREFIX = "formats/"
_FIGURES = {"frac_bits": "frac", "frac_bits_mean": "frac", "width": "width", "width_mean": "width"}


@dataclass(frozen=True)
class Series:
    """One quantiser over time.

    Attributes:
        name: The quantiser.
        steps: When it was looked at, ascending.
        frac: Mean fractional bits at each step.
        width: Mean width at each step.
    """

    name: str
    steps: tuple[float, ...]
    frac: tuple[float, ...]
    width: tuple[float, ...]


def read_history(path: str | os.PathLike[str]) -> list[Series]:
    """Reads a history.

    Args:
        path: JSON that `edgemat.FormatHistory.save` wrote, or the ``metrics.csv`` of Lightning's CSVLogger under a
            `FormatLogger`.

    Raises:
        EdgematError: if the file cannot be read or holds no history.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise EdgematError(f"{path} has {path.stat().st_size} bytes, expected a history of at most {MAX_BYTES}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise EdgematError(f"{path} cannot be read ({reason}), expected a JSON history or a CSV log") from error
    found = _json(text) if text.lstrip().startswith("{") else _csv(text)
    if not found:
        raise EdgematError(
            f"{path} holds no formats over time, expected what edgemat.FormatHistory.save or a CSVLogger under a "
            "FormatLogger wrote"
        )
    return found


def _json(text: str) -> list[Series]:
    try:
        data = json.loads(text)
        return from_dict(data) if isinstance(data, dict) and data.get("kind") == KIND else []
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


def from_dict(data: dict[str, Any]) -> list[Series]:
    """The series of `FormatHistory.to_dict`, quantisers without an entry left out."""
    steps = [float(step) for step in data["steps"]]
    made = []
    for name, rows in data["quantisers"].items():
        points = [(step, row) for step, row in zip(steps, rows, strict=True) if row is not None]
        if points and all(math.isfinite(float(v)) for step, row in points for v in (step, *row[:2])):
            made.append(
                Series(
                    str(name),
                    tuple(step for step, _ in points),
                    tuple(float(row[0]) for _, row in points),
                    tuple(float(row[1]) for _, row in points),
                )
            )
    return made


def _csv(text: str) -> list[Series]:
    figures: dict[str, dict[float, dict[str, float]]] = {}
    try:
        for row in csv.DictReader(text.splitlines()):
            if not row.get("step"):
                continue
            step = float(row["step"])
            for column, cell in row.items():
                if not column or not column.startswith(_PREFIX) or not cell:
                    continue
                name, _, key = column.removeprefix(_PREFIX).rpartition("/")
                if key in _FIGURES and math.isfinite(float(cell)):
                    figures.setdefault(name, {}).setdefault(step, {})[_FIGURES[key]] = float(cell)
    except (ValueError, TypeError, csv.Error):
        return []
    made = []
    for name, points in figures.items():
        whole = {step: kept for step, kept in sorted(points.items()) if len(kept) == 2}
        if whole:
            frac, width = (tuple(kept[key] for kept in whole.values()) for key in ("frac", "width"))
            made.append(Series(name, tuple(whole), frac, width))
    return made


def read_front(path: str | os.PathLike[str]) -> list[tuple[float, float, str]]:
    """Cost, accuracy and checkpoint of each point of a front, by growing cost.

    Args:
        path: ``front.json``, or the folder of an `edgemat.Front`.

    Raises:
        EdgematError: if it cannot be read or holds no point.
    """
    path = Path(path)
    path = path / "front.json" if path.is_dir() else path
    try:
        points = json.loads(path.read_text(encoding="utf-8"))["points"]
        found = [(float(p["cost"]), float(p["accuracy"]), str(p["file"])) for p in points]
    except OSError as error:
        raise EdgematError(f"{path} cannot be read ({error.strerror}), expected an edgemat.Front") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EdgematError(
            f"{path} is no front ({type(error).__name__}), expected what edgemat.Front writes"
        ) from error
    if not found or not all(math.isfinite(v) for cost, accuracy, _ in found for v in (cost, accuracy)):
        raise EdgematError(f"{path} holds no points with finite figures, expected a front that was offered some")
    return sorted(found)
