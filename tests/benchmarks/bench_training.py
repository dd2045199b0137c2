"""Time and memory of a quantised training step against float32's: ResNet8 (MLPerf Tiny), batch 64, two threads.

Run: ``python -m tests.benchmarks training``. Prints ratios: of eager steps, of compiled ones (`torch.compile`, against
the compiled float network), of the memory that a step adds to its process, and, with ``EDGEMAT_BENCH_PEERS=1`` or
``EDGEMAT_BENCH_PEER_PYTHON``, of Brevitas and HGQ2 on the same network. All variants of a table take turns.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

import edgemat
from tests.benchmarks.qat import campaign, environment
from tests.networks.models import ResNet8

BATCH, THREADS, ROUNDS, WARM_UP = 64, 2, 40, 3
VARIANTS: dict[str, dict[str, object] | None] = {
    "float32": None,
    "weights and activations": {},
    "batch norm as an affine": {"batch_norm": "affine"},
    "every element-wise layer": {"batch_norm": "affine", "every_layer": True},
}
PROMISED = {
    "eager": {"weights and activations": 1.1, "every element-wise layer": 1.25},
    "compiled": {"weights and activations": 1.15, "every element-wise layer": 1.15},
    "memory": {"weights and activations": 1.2, "every element-wise layer": 1.2},
}


def stepper(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, compiled: bool = False) -> Callable[[], None]:
    """One training step of `model` as a function."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    run = torch.compile(model) if compiled else model

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(run(x), y).backward()
        optimizer.step()

    return step


def quantised(x: torch.Tensor, **fields: object) -> torch.nn.Module:
    """A calibrated quantised ResNet8."""
    torch.manual_seed(0)
    module = edgemat.quantize(
        ResNet8(),
        edgemat.Recipe(input="fixed<8,1>", weights="fixed<8>", activations="fixed<8>", **fields),
        verbose=False,
    )
    edgemat.calibrate(module, [x])
    return module


def variant(name: str, x: torch.Tensor) -> torch.nn.Module:
    """The network of a row."""
    fields = VARIANTS[name]
    return ResNet8() if fields is None else quantised(x, **fields)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of noise."""
    torch.manual_seed(0)
    return torch.rand(BATCH, 3, 32, 32) * 2 - 1, torch.randint(0, 10, (BATCH,))


def measure(compiled: bool, rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds of the fastest step of each variant, taken in turns so that all see the same machine."""
    torch.set_num_threads(THREADS)
    x, y = data()
    steps = {name: stepper(variant(name, x), x, y, compiled) for name in VARIANTS}
    best = dict.fromkeys(steps, float("inf"))
    for turn in range(WARM_UP + rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= WARM_UP:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def _added(name: str) -> float:
    """MiB that training steps of a variant add to the peak of a fresh process."""
    torch.set_num_threads(1)
    x, y = data()
    model = variant(name, x)
    step = stepper(model, x[:1], y[:1])
    step()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = _status("VmRSS")
    step = stepper(model, x, y)
    for _ in range(4):
        step()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """A figure of this process in KiB; the peak that `getrusage` knows is inherited from the parent."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def memory() -> dict[str, float]:
    """MiB that a training step adds, each variant in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return {name: pool.apply(_added, (name,)) for name in VARIANTS}


def peers() -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Seconds of the peers' steps and of their frameworks' float steps; why a peer is missing."""
    found = environment.find(campaign.folder())
    reasons, times = dict(found.reasons), {}
    for name in found.versions:
        command = [found.python, "-m", "tests.benchmarks.peer_training", name, str(THREADS), str(BATCH), "8"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "KERAS_BACKEND": "torch"})
        if done.returncode:
            reasons[name] = (done.stderr.strip().splitlines() or ["no message"])[-1]
        else:
            times[name] = json.loads(done.stdout.strip().splitlines()[-1])
    return times, reasons


def show(console: Console, kind: str, figures: dict[str, float], scale: float, unit: str) -> bool:
    """Prints one table; returns whether its promises are kept."""
    table = Table(title=f"{kind}: ResNet8, batch {BATCH}")
    for column, justify in (("network", "left"), (unit, "right"), ("to float32", "right"), ("goal", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    kept = True
    for name, figure in figures.items():
        ratio = figure / figures["float32"]
        goal = PROMISED[kind].get(name)
        kept = kept and (goal is None or ratio <= goal)
        table.add_row(name, f"{figure * scale:.1f}", f"{ratio:.2f}", "" if goal is None else f"{goal}")
    console.print(table)
    return kept


def main() -> int:
    """Prints the tables; 1 where a goal is missed."""
    console = Console(width=100)
    tasks: dict[str, tuple[Callable[[], dict[str, float]], float, str]] = {
        "eager": (partial(measure, False), 1e3, "ms"),
        "compiled": (partial(measure, True), 1e3, "ms"),
        "memory": (memory, 1.0, "MiB added"),
    }
    asked = [word for word in sys.argv[1:] if word in tasks] or list(tasks)
    kept = [show(console, kind, tasks[kind][0](), *tasks[kind][1:]) for kind in asked]
    times, reasons = peers()
    for name, found in times.items():
        milliseconds = {key: value * 1e3 for key, value in found.items()}
        console.print(
            f"{name}: {milliseconds['peer']:.1f} ms, {found['peer'] / found['float']:.2f} times its framework's float "
            f"step ({milliseconds['float']:.1f} ms)"
        )
    for name, reason in reasons.items():
        console.print(f"{name} is unavailable: {reason}", markup=False)
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
