"""Means over seeds, fronts and knees. NumPy only."""

from __future__ import annotations

from typing import Any

import numpy as np

GRID = np.round(np.geomspace(100, 40_000, 91)).astype(int)
"""EBOPs at which fronts are compared."""


def undominated(points: list[dict[str, Any]]) -> list[int]:
    """Indices of the points that no other beats: more validation accuracy than all that cost no more."""
    order = sorted(range(len(points)), key=lambda i: (points[i]["ebops"], -points[i]["validation"]))
    kept, best = [], -1.0
    for i in order:
        if points[i]["validation"] > best:
            kept.append(i)
            best = points[i]["validation"]
    return kept


def at_budgets(points: list[dict[str, Any]]) -> np.ndarray:
    """Test accuracy at each budget of `GRID` of the point that validation prefers within it; NaN below all points."""
    front = [points[i] for i in undominated(points)]
    costs = np.array([p["ebops"] for p in front])
    tests = np.array([p["test"] for p in front])
    index = np.searchsorted(costs, GRID, side="right") - 1
    return np.where(index >= 0, tests[np.maximum(index, 0)], np.nan)


def mean_front(seeds: list[list[dict[str, Any]]]) -> np.ndarray:
    """Mean over the seeds; NaN where one has no point within the budget."""
    return np.stack([at_budgets(points) for points in seeds]).mean(axis=0)


def knee(front: np.ndarray) -> int:
    """Index into `GRID` of the point farthest above the chord, over the logarithm of the cost."""
    there = np.flatnonzero(~np.isnan(front))
    x = np.log(GRID[there])
    x = (x - x[0]) / (x[-1] - x[0])
    y = front[there]
    chord = y[0] + (y[-1] - y[0]) * x
    return int(there[np.argmax(y - chord)])


def cost_of(front: np.ndarray, accuracy: float) -> int | None:
    """The least cost on `GRID` from which on the front is at least as good, or None."""
    reached = np.flatnonzero(front >= accuracy)
    return int(GRID[reached[0]]) if reached.size else None


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, in percent; 0 for a single value."""
    found = 100 * np.array(values)
    return float(found.mean()), float(found.std(ddof=1)) if len(found) > 1 else 0.0
