"""Accuracy and work of multiplier-free weights on the demonstration's digits.

``python -m tests.benchmarks.bench_khot`` trains the network of `edgemat.demo` in float32 once, then quantised with any
weights and with sums of 1, 2 and 3 signed powers of two (the same epochs, batches and seed), and prints the table of
docs/multiplier-free.md. Scales stay fixed-point affines, so every row's batch norms are K-hot, too.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

import torch

import edgemat
from edgemat import demo
from edgemat.report import inspect
from edgemat.verification.verify import verify

FLOAT_EPOCHS, EPOCHS = 15, 10


def main() -> int:
    """Print the table."""
    split = demo.load_digits()
    network = demo.make_network()
    demo.train(network, split, FLOAT_EPOCHS, 1e-2, lambda _: None)
    print(f"float32 {demo.accuracy(network, split):.2%}")
    print("| weights | accuracy | multiplies | additions | shift-adds |\n|---|---|---|---|---|")
    for weights in ("fixed<8>", "fixed<5>"):
        for khot in (None, 3, 2, 1):
            recipe = edgemat.Recipe(**{**demo.RECIPE, "weights": weights}, khot=khot, batch_norm="affine")
            q = edgemat.quantize(copy.deepcopy(network), recipe)
            edgemat.calibrate(q, torch.from_numpy(split.x_train[:256]).split(64), method="mse")
            demo.train(q, split, EPOCHS, 2e-3, lambda _: None)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "digits.onnx"
                edgemat.to_onnx(q, torch.from_numpy(split.x_test[:2]), path)
                totals = inspect(path).totals
                if not verify(path, split.x_test, module=q, backends=["onnx", "mcu"]).ok:
                    print(f"{weights}, khot={khot}: a backend differs")
                    return 3
            label = f"`{weights}`" + ("" if khot is None else f", `khot={khot}`")
            figures = " | ".join(f"{totals[key]:,}" for key in ("multiplies", "additions", "shift_adds"))
            print(f"| {label} | {demo.accuracy(q, split):.2%} | {figures} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
