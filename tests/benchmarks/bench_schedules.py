"""What the training helpers cost: parts of a step of ResNet8 (MLPerf Tiny), batch 64, eager, two threads.

Run: ``python -m tests.benchmarks schedules``. The project promises an oscillation tracker below 10 % of a step.
"""

from __future__ import annotations

import sys
import time

import torch
from torch.nn import functional as F

import edgemat
from tests.benchmarks.bench_training import BATCH, THREADS, WARM_UP, quantised

ROUNDS = 12
PROMISED = 0.10


def measure(rounds: int = ROUNDS) -> dict[str, tuple[float, float]]:
    """Seconds of the fastest training step, and of what each helper adds to one, taken in turns."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    x, y = torch.rand(BATCH, 3, 32, 32) * 2 - 1, torch.randint(0, 10, (BATCH,))
    variants = {
        "no helper": (lambda q: None, {}),
        "tracker, freezing": (lambda q: edgemat.OscillationTracker(q, momentum=0.1, threshold=0.05), {}),
        "tracker, cga": (lambda q: edgemat.OscillationTracker(q, mode="cga"), {}),
        "delay, all real": (lambda q: edgemat.QuantizationDelay(q, 10**6), {}),
        "points by statistics": (lambda q: None, {"points": "statistics"}),
    }
    parts = {}
    for name, (make, fields) in variants.items():
        q = quantised(x, **fields).train()
        groups = edgemat.parameter_groups(q, lr=1e-2, format_lr=1e-3, weight_decay=1e-4)
        parts[name] = q, torch.optim.SGD(groups, momentum=0.9), make(q)
    best = {name: (float("inf"), float("inf")) for name in parts}
    for turn in range(WARM_UP + rounds):
        for name, (q, optimizer, helper) in parts.items():
            start = time.perf_counter()
            optimizer.zero_grad()
            F.cross_entropy(q(x), y).backward()
            optimizer.step()
            between = time.perf_counter()
            if helper is not None:
                helper.step()
            end = time.perf_counter()
            if turn >= WARM_UP:
                best[name] = min(best[name][0], between - start), min(best[name][1], end - between)
    return best


def main() -> int:
    """Prints the table; exit code 1 where the promise is not kept."""
    best = measure()
    plain = best["no helper"][0]
    kept = True
    print(
        f"training step, ResNet8, batch {BATCH}, {THREADS} threads, fastest of {ROUNDS}; .step() as a share of a step"
    )
    for name, (step, helper) in best.items():
        share = helper / plain
        kept = kept and (not name.startswith("tracker") or share <= PROMISED)
        print(f"  {name:22s} {step * 1e3:7.1f} ms  {step / plain:5.2f}   .step() {helper * 1e3:6.2f} ms  {share:6.1%}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
