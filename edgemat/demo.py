"""The demonstration: handwritten digits, one trained network, the same integers on every target.

Trains a small residual CNN on scikit-learn's 8x8 digits in float, then with learned binary points, writes the
lowered ONNX file, an HLS C++ project and an MCU C library, and compares all of them on the whole test set and on
corner vectors.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from edgemat.errors import ToolchainError

if TYPE_CHECKING:
    from torch import nn

TRAINING_SAMPLES = 1_300
BATCH = 50
EMULATED_SAMPLES = 20
BACKENDS = ("torch", "reference", "onnx", "hls:parallel", "hls:stream", "mcu", "mcu:cortex-m4", "mcu:rv32imc")
RECIPE = {"input": "ufixed<5,1>", "weights": "fixed<5>", "activations": "fixed<5>"}


@dataclass(frozen=True)
class Split:
    """Digits: float32 images ``[N, 1, 8, 8]`` in 0..1 (sixteenths, exact in the input format) and int64
    labels.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


@dataclass(frozen=True)
class Result:
    """What the demonstration found.

    Attributes:
        float_accuracy: On the test set, 0..1.
        quantised_accuracy: As above, of the quantised network (of every backend, since all agree).
        ok: Whether every backend gave the same codes.
        files: What was written, by name.
        seconds: Time of the whole run.
    """

    float_accuracy: float
    quantised_accuracy: float
    ok: bool
    files: dict[str, Path]
    seconds: float


def load_digits() -> Split:
    """scikit-learn's handwritten digits in a fixed shuffle, 1,300 for training and 497 for the test."""
    if importlib.util.find_spec("sklearn") is None:
        raise ToolchainError(
            "the demonstration found no scikit-learn, which holds the digits; "
            "install it with: pip install 'edgemat[demo]'"
        )
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x = (images[order] / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    y = labels[order].astype(np.int64)
    return Split(x[:TRAINING_SAMPLES], y[:TRAINING_SAMPLES], x[TRAINING_SAMPLES:], y[TRAINING_SAMPLES:])


def make_network() -> nn.Module:
    """A residual CNN of 8x8 images: a convolution, a residual one, a strided one, average pooling, a dense
    layer.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    class DigitNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
            self.bn1 = nn.BatchNorm2d(16)
            self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
            self.bn2 = nn.BatchNorm2d(16)
            self.conv3 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
            self.bn3 = nn.BatchNorm2d(32)
            self.dense = nn.Linear(32, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(self.bn1(self.conv1(x)))
            x = F.relu(self.bn2(self.conv2(x)) + x)
            x = F.relu(self.bn3(self.conv3(x)))
            return self.dense(F.avg_pool2d(x, 4).flatten(1))

    torch.manual_seed(0)
    return DigitNet()


def train(model: nn.Module, split: Split, epochs: int, lr: float, advance: Callable[[float], None]) -> list[float]:
    """A plain PyTorch loop (AdamW, one-cycle); leaves the module in eval mode and returns the loss of every
    epoch.
    """
    import torch
    from torch.nn import functional as F

    torch.manual_seed(0)
    x, y = torch.from_numpy(split.x_train), torch.from_numpy(split.y_train)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small lose more to waiting than they gain from a second core
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(x) // BATCH)
    losses = []
    model.train()
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(x)).split(BATCH):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        losses.append(total / len(x))
        advance(1)
    model.eval()
    torch.set_num_threads(threads)
    return losses


def accuracy(model: nn.Module, split: Split) -> float:
    """Share of the test set the module in eval mode gets right."""
    import torch

    with torch.no_grad():
        return float(np.mean(model(torch.from_numpy(split.x_test)).numpy().argmax(axis=1) == split.y_test))


def run(output: str | Path = "build/demo", quick: bool = False) -> Result:
    """Trains, lowers, exports, verifies and reports; tables go to stdout, progress to stderr.

    Args:
        output: Folder for ``digits.onnx``, ``hls/``, ``mcu/`` and the picture; made where it is missing.
        quick: A few epochs and 20 samples, for tests: the same steps, a worse network.

    Returns:
        What was found. `ok` is False where a backend disagreed.

    Raises:
        ToolchainError: scikit-learn is missing.
    """
    import torch

    import edgemat

    start = time.perf_counter()
    folder = Path(output)
    split = load_digits()
    float_epochs, quantised_epochs = (3, 2) if quick else (15, 10)
    samples = split.x_test[:20] if quick else split.x_test
    folder.mkdir(parents=True, exist_ok=True)
    files = {"ONNX": folder / "digits.onnx", "HLS C++": folder / "hls", "MCU C": folder / "mcu"}

    with Progress(
        TextColumn("{task.description:<36}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as progress:
        advance = _stage(progress, "Training in float32", float_epochs)
        model = make_network()
        float_losses = train(model, split, float_epochs, 1e-2, advance)

        advance = _stage(progress, "Training with learned binary points", quantised_epochs)
        quantised = edgemat.quantize(model, edgemat.Recipe(**RECIPE))
        edgemat.calibrate(quantised, torch.from_numpy(split.x_train[:256]).split(64))
        losses = train(quantised, split, quantised_epochs, 2e-3, advance)

        advance = _stage(progress, "Writing ONNX, HLS C++ and MCU C", 3)
        edgemat.to_onnx(quantised, torch.from_numpy(split.x_test[:2]), files["ONNX"])
        advance(1)
        edgemat.export(files["ONNX"], target="hls", output=files["HLS C++"], io="stream")
        advance(1)
        edgemat.export(files["ONNX"], target="mcu", output=files["MCU C"])
        advance(1)

    rows = [compare(backend, files["ONNX"], samples, quantised) for backend in BACKENDS]
    if _draw(folder / "training.png", float_losses, losses):
        files["Picture"] = folder / "training.png"
    result = Result(
        float_accuracy=accuracy(model, split),
        quantised_accuracy=accuracy(quantised, split),
        ok=all(row.status != "mismatch" for row in rows),
        files=files,
        seconds=time.perf_counter() - start,
    )
    _print(result, rows, len(samples))
    return result


@dataclass(frozen=True)
class Row:
    """One line of the backend table; `compared` and `mismatches` count output codes."""

    backend: str
    status: str
    compared: int
    mismatches: int
    seconds: float
    reason: str


def compare(backend: str, onnx_file: Path, samples: np.ndarray, quantised: nn.Module) -> Row:
    """Verifies one backend; a missing toolchain becomes a row that says so instead of an error."""
    import edgemat
    from edgemat.targets.apheaders import fetch_ap_headers

    start = time.perf_counter()
    x = samples[:EMULATED_SAMPLES] if backend.startswith("mcu:") else samples
    module = quantised if backend == "torch" else None
    try:
        if backend.startswith("hls"):
            fetch_ap_headers()
        report = edgemat.verify(onnx_file, inputs=x, backends=(backend,), module=module).to_dict()
    except ToolchainError as missing:
        return Row(backend, "unavailable", 0, 0, time.perf_counter() - start, str(missing))
    found = report["backends"][backend]
    return Row(
        backend,
        found["status"],
        found["compared"],
        found["mismatches"],
        time.perf_counter() - start,
        found["reason"],
    )


def _stage(progress: Progress, title: str, total: int) -> Callable[[float], None]:
    """Adds a bar and gives the function that moves it."""
    task = progress.add_task(title, total=total)
    return lambda count: progress.advance(task, count)


def _draw(path: Path, float_losses: list[float], losses: list[float]) -> bool:
    """Draws the loss of both trainings where matplotlib is installed; says whether it did."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    first = len(float_losses)
    axes.plot(range(1, first + 1), float_losses, label="float32")
    axes.plot(range(first + 1, first + len(losses) + 1), losses, label="learned binary points")
    axes.set(xlabel="epoch", ylabel="training loss", yscale="log")
    axes.legend()
    FigureCanvasAgg(figure).print_png(path)
    return True


def _figures(result: Result, samples: int) -> Table:
    """The network in numbers."""
    from edgemat.lower.reader import read
    from edgemat.targets import mcu

    graph = read(result.files["ONNX"])
    costs = [call.op.cost(call) for call in graph.nodes]
    project = mcu.project(graph)
    widest = max(max(-low - 1, high).bit_length() + 1 for low, high in (call.bounds.partial for call in graph.nodes))
    weight_bits = sum(cost.weight_bits for cost in costs)
    table = Table(title="A residual CNN on handwritten digits", show_header=False)
    table.add_row("test set", f"{samples} images the training never saw")
    table.add_row("accuracy in float32", f"{result.float_accuracy:.2%}")
    table.add_row("accuracy in fixed point", f"{result.quantised_accuracy:.2%}")
    table.add_row("formats", ", ".join(f"{name} {text}" for name, text in RECIPE.items()))
    table.add_row("multiplies per image", f"{sum(cost.multiplies for cost in costs):,}")
    table.add_row("weights and biases", f"{weight_bits:,} bits ({weight_bits / 8192:.1f} KiB)")
    table.add_row("accumulators", f"at most {widest} bits, proved: nothing can overflow")
    table.add_row(
        "arena on a microcontroller",
        f"{project.arena_bytes:,} bytes (no plan can take less than {project.arena_lower_bound_bytes:,})",
    )
    return table


def _print(result: Result, rows: list[Row], samples: int) -> None:
    """The three tables on stdout."""
    console = Console()
    if not console.is_terminal:  # tables in a log or a pipe keep their columns
        console = Console(width=max(console.width, 120))
    console.print(_figures(result, samples))
    table = Table(title="The same integers everywhere")
    for heading in ("backend", "result"):
        table.add_column(heading)
    for heading in ("integers compared", "mismatches", "seconds"):
        table.add_column(heading, justify="right")
    for row in rows:
        if row.status == "unavailable":
            table.add_row(row.backend, f"unavailable: {row.reason}", "-", "-", "-")
        else:
            table.add_row(row.backend, row.status, f"{row.compared:,}", f"{row.mismatches:,}", f"{row.seconds:.1f}")
    console.print(table)
    console.print("Every comparison includes generated corner vectors: rails, ties, extremes of each accumulator.")
    table = Table(title="Written", show_header=False)
    for name, path in result.files.items():
        table.add_row(name, str(path))
    console.print(table)
    console.print(f"{result.seconds:.0f} seconds in all.")
