"""Charts as inline SVG: histograms, lines over time, the front, buffers in an arena.

Texts are escaped, and nothing is loaded. Every function returns a complete ``<svg>`` whose colours are classes that the
page's style sheet defines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

COLOURS = 8
"""Number of line colours (classes ``c0`` to ``c7``)."""


@dataclass(frozen=True)
class Line:
    """One line of a chart: its name and its points, x ascending."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


class _Canvas:
    """Axes of a chart: positions of values, ticks and labels."""

    def __init__(
        self, size: tuple[int, int], x: tuple[float, float], y: tuple[float, float], label: str, left: int = 46
    ) -> None:
        self.width, self.height = size
        self.left, self.right, self.top, self.bottom = left, 10, 10, 22
        self.x, self.y = _widened(*x), _widened(*y)
        self.parts: list[str] = []
        self.label = label

    def at_x(self, value: float) -> float:
        low, high = self.x
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def at_y(self, value: float) -> float:
        low, high = self.y
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom)

    def add(self, text: str) -> None:
        self.parts.append(text)

    def text(self, x: float, y: float, text: str, kind: str = "tick", anchor: str = "middle") -> None:
        self.add(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def line(self, x0: float, y0: float, x1: float, y1: float, kind: str) -> None:
        self.add(f'<line class="{kind}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>')

    def axes(self, x_text: Callable[[float], str], y_ticks: bool = True, x_ticks: int = 5) -> None:
        base = self.height - self.bottom
        self.line(self.left, base, self.width - self.right, base, "axis")
        for value in ticks(*self.x, x_ticks):
            at = self.at_x(value)
            self.line(at, base, at, base + 3, "axis")
            self.text(at, base + 14, x_text(value))
        if y_ticks:
            for value in ticks(*self.y, 6):
                at = self.at_y(value)
                self.line(self.left, at, self.width - self.right, at, "grid")
                self.text(self.left - 5, at + 3.5, number(value), anchor="end")

    def svg(self) -> Markup:
        label = escape(self.label)
        return Markup(  # every text that went in was escaped above
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{label}"><title>{label}</title>'
            f"{''.join(self.parts)}</svg>"
        )


def _widened(low: float, high: float) -> tuple[float, float]:
    return (low - 0.5, high + 0.5) if low == high else (low, high)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from `low` to `high`, about `count`: steps of 1, 2 or 5 times a power of ten."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return []
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A figure in few characters."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= scale:
                return f"{value / scale:.4g}{unit}"
        return f"{value:.1e}"
    return f"{value:.4g}"


def histogram(
    edges: np.ndarray,
    counts: np.ndarray,
    rails: tuple[float, float] | None,
    label: str,
    size: tuple[int, int] = (360, 120),
) -> Markup:
    """Bars of square-root height, and the format's rails as dashed lines where they lie inside the picture.

    Args:
        edges: Ends of the bins, one more than there are bins.
        counts: Elements of each bin.
        rails: Smallest and largest value of the format, or None.
        label: What a screen reader says.
        size: Width and height in pixels.
    """
    low, high = float(edges[0]), float(edges[-1])
    if rails is not None:
        low, high = min(low, rails[0]), max(high, rails[1])
    margin = (high - low) * 0.02
    canvas = _Canvas(size, (low - margin, high + margin), (0.0, 1.0), label, left=10)
    heights = np.sqrt(counts / max(float(counts.max(initial=0)), 1.0))
    for left, right, height, count in zip(edges[:-1], edges[1:], heights, counts, strict=True):
        if height > 0:
            x0, x1, y = canvas.at_x(float(left)), canvas.at_x(float(right)), canvas.at_y(float(height))
            wide = max(x1 - x0 - 0.4, 0.6)
            tip = f"<title>{number(float(left))} to {number(float(right))}: {int(count):,}</title>"
            base = canvas.height - canvas.bottom
            canvas.add(
                f'<rect class="bar" x="{x0:.2f}" y="{y:.2f}" width="{wide:.2f}" height="{base - y:.2f}">{tip}</rect>'
            )
    for rail in () if rails is None else rails:
        at = canvas.at_x(rail)
        canvas.line(at, canvas.top - 6, at, canvas.height - canvas.bottom, "rail")
    canvas.axes(number, y_ticks=False)
    return canvas.svg()


def stroke(index: int) -> str:
    """Classes of line `index`: eight colours, then the same dashed, then dotted."""
    return f"c{index % COLOURS} d{index // COLOURS % 3}"


def lines(series: Sequence[Line], label: str, x_name: str, size: tuple[int, int] = (1040, 260)) -> Markup:
    """Lines over time, names as tool tips.

    Args:
        series: The lines; at least one point among them.
        label: What a screen reader says.
        x_name: What the x axis counts.
        size: Width and height in pixels.
    """
    xs = [v for s in series for v in s.x]
    ys = [v for s in series for v in s.y]
    top = (max(ys) - min(ys)) * 0.06 or 0.5
    canvas = _Canvas(size, (min(xs), max(xs)), (min(ys) - top, max(ys) + top), label)
    canvas.axes(number, x_ticks=8)
    for index, line in enumerate(series):
        points = [(canvas.at_x(x), canvas.at_y(y)) for x, y in zip(line.x, line.y, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        name = f"<title>{escape(line.name)}: {number(line.y[0])} to {number(line.y[-1])}</title>"
        canvas.add(f'<polyline class="line {stroke(index)}" points="{path}">{name}</polyline>')
        if len(points) == 1:
            x, y = points[0]
            canvas.add(f'<circle class="dot {stroke(index)}" cx="{x:.1f}" cy="{y:.1f}" r="3">{name}</circle>')
    canvas.text(canvas.width - canvas.right, canvas.top - 1, x_name, "name", "end")
    return canvas.svg()


def front(points: Sequence[tuple[float, float, str]], label: str, size: tuple[int, int] = (1040, 300)) -> Markup:
    """Accuracy over cost: the points, and the stairs of what they reach. Cost on a logarithmic axis from 20 times on.

    Args:
        points: Cost, accuracy and name of each, by growing cost.
        label: What a screen reader says.
        size: Width and height in pixels.
    """
    costs, accuracies = [p[0] for p in points], [p[1] for p in points]
    logarithmic = min(costs) > 0 and max(costs) >= 20 * min(costs)
    place: Callable[[float], float] = math.log10 if logarithmic else float
    at = [place(cost) for cost in costs]
    wide, high = (max(at) - min(at)) * 0.04 or 0.5, (max(accuracies) - min(accuracies)) * 0.1 or 0.01
    canvas = _Canvas(
        size, (min(at) - wide, max(at) + wide), (min(accuracies) - high, max(accuracies) + high), label, left=56
    )
    canvas.axes((lambda v: number(10.0**v)) if logarithmic else number, x_ticks=8)
    stairs = []
    for index, (x, accuracy) in enumerate(zip(at, accuracies, strict=True)):
        if index:
            stairs.append((x, accuracies[index - 1]))
        stairs.append((x, accuracy))
    stairs.append((canvas.x[1], accuracies[-1]))
    path = " ".join(f"{canvas.at_x(x):.1f},{canvas.at_y(y):.1f}" for x, y in stairs)
    canvas.add(f'<polyline class="line c0" points="{path}"/>')
    for x, (cost, accuracy, name) in zip(at, points, strict=True):
        tip = f"<title>{escape(name)}: cost {number(cost)}, accuracy {accuracy:.4f}</title>"
        canvas.add(
            f'<circle class="dot c0" cx="{canvas.at_x(x):.1f}" cy="{canvas.at_y(accuracy):.1f}" r="4">{tip}</circle>'
        )
    canvas.text(canvas.width - canvas.right, canvas.top - 1, "cost", "name", "end")
    return canvas.svg()


@dataclass(frozen=True)
class Block:
    """A buffer in an arena: its name, the steps during which it lives, its first byte and its size."""

    name: str
    first: int
    last: int
    offset: int
    size: int


def arena(blocks: Sequence[Block], steps: int, total: int, label: str, size: tuple[int, int] = (1040, 260)) -> Markup:
    """Which bytes hold what at which step.

    Args:
        blocks: The buffers.
        steps: Number of steps.
        total: Bytes of the arena.
        label: What a screen reader says.
        size: Width and height in pixels.
    """
    canvas = _Canvas(size, (0.0, float(max(steps, 1))), (0.0, float(max(total, 1))), label, left=62)
    canvas.axes(number, x_ticks=10)
    for index, block in enumerate(blocks):
        x0, x1 = canvas.at_x(block.first), canvas.at_x(block.last + 1)
        y0, y1 = canvas.at_y(block.offset + block.size), canvas.at_y(block.offset)
        tip = f"<title>{escape(block.name)}: {block.size:,} bytes from {block.offset:,}</title>"
        canvas.add(
            f'<rect class="block f{index % COLOURS}" x="{x0:.1f}" y="{y0:.1f}" width="{max(x1 - x0 - 1, 1):.1f}" '
            f'height="{max(y1 - y0 - 0.5, 0.5):.1f}">{tip}</rect>'
        )
        if x1 - x0 > 7 * len(block.name) and y1 - y0 > 13:
            canvas.text((x0 + x1) / 2, (y0 + y1) / 2 + 4, block.name, "inside")
    canvas.text(canvas.width - canvas.right, canvas.top - 1, "step", "name", "end")
    return canvas.svg()
