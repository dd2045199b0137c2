"""Time of a quantised training step against float32's: ResNet8 (MLPerf Tiny), batch 64, eager, two threads.

Run: ``python -m tests.benchmarks.bench_training``. Prints the ratios the project promises: weights and activations
quantised at most 1.2 times, every element-wise layer quantised at most 1.6 times a float32 step.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

import edgemat
from tests.networks.models import ResNet8

BATCH, THREADS, ROUNDS, WARM_UP = 64, 2, 15, 2
PROMISED = {"weights and activations": 1.2, "every element-wise layer": 1.6}


def stepper(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """One training step of `model` as a function."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def quantised(x: torch.Tensor, **fields: object) -> torch.nn.Module:
    """A calibrated quantised ResNet8."""
    torch.manual_seed(0)
    module = edgemat.quantize(
        ResNet8(), edgemat.Recipe(input="fixed<8,1>", weights="fixed<8>", activations="fixed<8>", **fields)
    )
    edgemat.calibrate(module, [x])
    return module


def measure(rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds of the fastest step of each variant, taken in turns so that all see the same machine."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    x, y = torch.rand(BATCH, 3, 32, 32) * 2 - 1, torch.randint(0, 10, (BATCH,))
    steps = {
        "float32": stepper(ResNet8(), x, y),
        "weights and activations": stepper(quantised(x), x, y),
        "batch norm as an affine": stepper(quantised(x, batch_norm="affine"), x, y),
        "every element-wise layer": stepper(quantised(x, batch_norm="affine", every_layer=True), x, y),
    }
    best = dict.fromkeys(steps, float("inf"))
    for turn in range(WARM_UP + rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= WARM_UP:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> int:
    """Prints the table; exit code 1 where a promise is not kept."""
    best = measure()
    kept = True
    print(f"training step, ResNet8, batch {BATCH}, {THREADS} threads, fastest of {ROUNDS}")
    for name, seconds in best.items():
        ratio = seconds / best["float32"]
        promised = PROMISED.get(name)
        kept = kept and (promised is None or ratio <= promised)
        print(f"  {name:26s} {seconds * 1e3:8.1f} ms  {ratio:5.2f}" + (f"  (promised {promised})" if promised else ""))
    if "--json" in sys.argv:
        print(json.dumps(best))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
