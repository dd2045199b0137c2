"""docs/evidence.md: its tables and the plot are made of docs/evidence.json, which a full run writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.qat.protocol import BITS, NETWORKS, SEEDS
from tests.benchmarks.qat.statistics import GRID, cost_of, knee, mean_front, spread, undominated

DOCS = Path(__file__).resolve().parents[3] / "docs"
PAGE, DATA, PLOT = DOCS / "evidence.md", DOCS / "evidence.json", DOCS / "evidence-front.svg"
BEGIN, END = "<!-- tables: python -m tests.benchmarks qat -->", "<!-- end of tables -->"
LABELS = {
    "ptq": "edgemat PTQ",
    "edgemat": "edgemat",
    "qfx": "edgemat, every layer (QFX)",
    "brevitas": "Brevitas QAT",
    "hgq2": "HGQ2",
}
TITLES = {
    "mlp": "magic_gamma, MLP 64-32-32",
    "lenet": "mnist, LeNet",
    "resnet8": "cifar10_jpeg, ResNet8",
}
BUDGETS = (100, 200, 300, 500, 750, 1_000, 1_500, 2_000, 3_000, 4_000, 6_000, 8_000, 12_000)
ACCURACIES = (0.84, 0.85, 0.86, 0.865, 0.87)
Row = dict[str, Any]


def compact(rows: list[Row]) -> list[Row]:
    """The rows as they are stored: of a front, the points that no other beats."""
    stored = []
    for row in rows:
        result = {key: value for key, value in row["result"].items() if key != "seconds"}
        if "points" in result:
            result["points"] = [result["points"][i] for i in undominated(result["points"])]
        stored.append({"job": row["job"], "result": result})
    return stored


def chosen(rows: list[Row], task: str, network: str, method: str, bits: int = 0) -> list[Row]:
    """Results of one cell, by seed."""
    wanted = {"task": task, "network": network, "method": method, "bits": bits}
    found = [row for row in rows if all(row["job"][key] == value for key, value in wanted.items())]
    return sorted(found, key=lambda row: row["job"]["seed"])


def cell(rows: list[Row]) -> str:
    """Mean and deviation of the test accuracy; the number of seeds where it is not the whole."""
    if not rows:
        return "-"
    mean, deviation = spread([row["result"]["test"] for row in rows])
    seeds = "" if len(rows) == len(SEEDS) else f" ({len(rows)} seed{'s' if len(rows) > 1 else ''})"
    return f"{mean:.2f}{f' ± {deviation:.2f}' if len(rows) > 1 else ''}{seeds}"


def accuracy_table(rows: list[Row], network: str) -> str:
    """Methods down, widths across."""
    lines = [f"| {TITLES[network]} | " + " | ".join(f"{bits} bits" for bits in BITS) + " |"]
    lines.append("|---|" + "---:|" * len(BITS))
    for method, label in LABELS.items():
        cells = [cell(chosen(rows, "fixed", network, method, bits)) for bits in BITS]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    floats = cell(chosen(rows, "float", network, "float"))
    return "\n".join(lines) + f"\n\nfloat start: {floats}\n"


def budget_line(rows: list[Row], network: str) -> str:
    """What was run, in the words of the jobs themselves."""
    jobs = [row["job"] for row in rows if row["job"]["network"] == network and row["job"]["task"] == "fixed"]
    if not jobs:
        return f"{TITLES[network]}: not run yet.\n"
    budget = jobs[0]["budget"]
    samples = budget["samples"] or "all"
    return (
        f"{TITLES[network]}: {budget['float_epochs']} float epochs, then {budget['epochs']} quantised ones, batch "
        f"{budget['batch']}, {samples} training samples, {budget['validation']} held out for validation, "
        f"{budget['test'] or 'all'} test samples.\n"
    )


def exactness(rows: list[Row]) -> str:
    """How many exported points were compared for each network, and on what."""
    lines = []
    for network, title in TITLES.items():
        found = [row for row in rows if row["job"]["task"].startswith("exact-") and row["job"]["network"] == network]
        points = [point for row in found for point in row["result"]["verified"]]
        if not points:
            lines.append(f"- {title}: no exported point was compared.")
            continue
        exact = sum(point["exact"] for point in points)
        names = sorted({name for point in points for name in point["mismatches"]})
        lines.append(
            f"- {title}: {len(points)} exported points on {', '.join(names)}, "
            f"{sum(point['samples'] for point in points):,} samples with the corner vectors: {exact} exact, "
            f"{len(points) - exact} not."
        )
    return "\n".join(lines) + "\n"


def fronts(rows: list[Row], biases: bool = False) -> dict[str, np.ndarray]:
    """The mean front of each method that has one; with `biases` their bits are part of the cost."""
    made = {}
    for method in ("edgemat", "hgq2"):
        found = [row["result"]["points"] for row in chosen(rows, "front", "mlp", method)]
        if biases:
            found = [[{**p, "ebops": p["ebops"] + p["bias_bits"]} for p in points] for points in found]
        if found:
            made[method] = mean_front(found)
    return made


def front_table(rows: list[Row]) -> str:
    """Accuracy of both fronts at round budgets, and the cost at equal accuracy."""
    made = fronts(rows)
    if not made:
        return "No front was run.\n"
    lines = ["| EBOPs at most | " + " | ".join(LABELS[m] for m in made) + " |", "|---:|" + "---:|" * len(made)]
    for budget in BUDGETS:
        index = int(np.searchsorted(GRID, budget, side="right")) - 1
        cells = ["-" if np.isnan(front[index]) else f"{100 * front[index]:.2f}" for front in made.values()]
        lines.append(f"| {budget:,} | " + " | ".join(cells) + " |")
    seeds = {m: len(chosen(rows, "front", "mlp", m)) for m in made}
    counted = ", ".join(f"{LABELS[m]}: {n} seed{'s' if n > 1 else ''}" for m, n in seeds.items())
    added = fronts(rows, biases=True)
    said = f"{verdict(made)}\nWith the bits of the biases added: {verdict(added)}"
    equal = equal_accuracy_table(made, added)
    return "\n".join(lines) + f"\n\n{counted}.\n\n{equal}\n{said}"


def equal_accuracy_table(made: dict[str, np.ndarray], biases: dict[str, np.ndarray]) -> str:
    """EBOPs from which on each mean front is at least so good, without and with the bits of the biases."""
    lines = ["| test accuracy at least | " + " | ".join(LABELS[m] for m in made) + " | ratio | with biases: ratio |"]
    lines.append("|---:|" + "---:|" * (len(made) + 2))
    for accuracy in ACCURACIES:
        costs = {method: cost_of(front, accuracy) for method, front in made.items()}
        cells = ["-" if cost is None else f"{cost:,}" for cost in costs.values()]
        ratios = [cost_ratio(fronts, accuracy) for fronts in (made, biases)]
        lines.append(f"| {100 * accuracy:.1f} % | " + " | ".join([*cells, *ratios]) + " |")
    return "\n".join(lines) + "\n"


def cost_ratio(made: dict[str, np.ndarray], accuracy: float) -> str:
    """edgemat's cost over HGQ2's at equal accuracy."""
    ours, theirs = (cost_of(made[m], accuracy) if m in made else None for m in ("edgemat", "hgq2"))
    return "-" if ours is None or theirs is None else f"{ours / theirs:.2f}"


def verdict(made: dict[str, np.ndarray]) -> str:
    """Both goals, in figures."""
    if len(made) < 2:
        return "One of the two fronts is missing; nothing can be compared.\n"
    ours, theirs = made["edgemat"], made["hgq2"]
    both = ~(np.isnan(ours) | np.isnan(theirs))
    gap = 100 * (ours - theirs)[both]
    below = int((gap < 0).sum())
    at = knee(theirs)
    cost = cost_of(ours, theirs[at])
    said = "edgemat never reaches it"
    if cost is not None:
        said = f"edgemat needs {cost:,}, {cost / GRID[at]:.2f} times as many"
    where = "nowhere below" if below == 0 else f"below at {below} (by {-gap.min():.2f} points at most)"
    ends = f"{GRID[both][0]:,} and {GRID[both][-1]:,} EBOPs"
    return (
        f"Of {len(gap)} budgets between {ends} edgemat is {where}, and on average {gap.mean():+.2f} points from HGQ2. "
        f"HGQ2's knee is {100 * theirs[at]:.2f} % at {GRID[at]:,} EBOPs; for that accuracy {said}.\n"
    )


def tables(rows: list[Row]) -> str:
    """Everything between the page's two marks."""
    parts = []
    for network in NETWORKS:
        parts.append(budget_line(rows, network))
        if any(row["job"]["task"] == "fixed" and row["job"]["network"] == network for row in rows):
            parts.append(accuracy_table(rows, network))
    parts += [exactness(rows), "![accuracy over EBOPs](evidence-front.svg)\n", front_table(rows)]
    return "\n".join(parts)


def plot(rows: list[Row], path: Path) -> None:
    """The fronts: a thin line for each seed, a thick one for their mean."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "edgemat"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.2))
    colours = {"edgemat": "#0b6e99", "hgq2": "#c2571a"}
    for method, mean in fronts(rows).items():
        for row in chosen(rows, "front", "mlp", method):
            front = [row["result"]["points"][i] for i in undominated(row["result"]["points"])]
            costs, tests = [p["ebops"] for p in front], [100 * p["test"] for p in front]
            axes.plot(costs, tests, "o", markersize=2.5, alpha=0.45, color=colours[method])
        axes.plot(GRID, 100 * mean, drawstyle="steps-post", linewidth=2, color=colours[method], label=LABELS[method])
    axes.set_xscale("log")
    axes.set_ylim(bottom=78)
    axes.set_xlabel("EBOPs (bits of weight x bits of activation, summed over the multiplications)")
    axes.set_ylabel("test accuracy, %")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(loc="lower right")
    axes.set_title("magic_gamma, MLP 64-32-32: mean of the seeds, and each seed's points")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def write(rows: list[Row]) -> None:
    """Stores the results and puts the tables and the plot into the page."""
    stored = compact(rows)
    text = "[\n" + ",\n".join(json.dumps(row, sort_keys=True) for row in stored) + "\n]\n"
    DATA.write_text(text, encoding="utf-8")
    page = PAGE.read_text("utf-8")
    head, rest = page.split(BEGIN)
    tail = rest.split(END)[1]
    PAGE.write_text(f"{head}{BEGIN}\n\n{tables(stored)}\n{END}{tail}", encoding="utf-8")
    plot(stored, PLOT)
