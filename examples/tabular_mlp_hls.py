"""A small MLP on tabular physics data, to HLS C++ twice: unrolled, and with every multiplier used four times.

    EDGEMAT_DATA=/path/to/data python examples/tabular_mlp_hls.py [--quick] [--output build/tabular_mlp]

The folder EDGEMAT_DATA holds magic_gamma/train.csv (ten numbers and a class, g or h, in each row).
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import edgemat


def load(folder):
    """Normalised features and labels (1: a gamma shower); the first fifth of a fixed shuffle is the test
    split.
    """
    rows = [line.split(",") for line in Path(folder, "magic_gamma", "train.csv").read_text().split()[1:]]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    x = np.array([row[:10] for row in rows], dtype=np.float32)
    y = torch.tensor([int(row[10] == "g") for row in rows])
    test = len(x) // 5
    x = torch.from_numpy((x - x[test:].mean(0)) / x[test:].std(0))
    return x[test:], y[test:], x[:test], y[:test]


def train(model, x, y, epochs, lr, batch=128):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def accuracy(model, x, y):
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one epoch, 50 samples compared")
    parser.add_argument("--output", type=Path, default=Path("build/tabular_mlp"))
    options = parser.parse_args()
    if "EDGEMAT_DATA" not in os.environ:
        parser.error("set EDGEMAT_DATA to the folder that holds magic_gamma/train.csv")

    torch.manual_seed(0)
    x, y, x_test, y_test = load(os.environ["EDGEMAT_DATA"])
    model = nn.Sequential(
        nn.Linear(10, 64),
        nn.ReLU(),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 2),
    )
    train(model, x, y, epochs=1 if options.quick else 15, lr=3e-3)

    recipe = edgemat.Recipe(input="fixed<8,4>", weights="fixed<6>", activations="fixed<6>", outputs="fixed<12>")
    quantised = edgemat.quantize(model, recipe)
    edgemat.calibrate(quantised, x[:1024].split(128))
    train(quantised, x, y, epochs=1 if options.quick else 5, lr=3e-4)
    print(f"test accuracy: float {accuracy(model, x_test, y_test):.2%}, ", end="")
    print(f"6 bits {accuracy(quantised, x_test, y_test):.2%}")

    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "mlp.onnx"
    edgemat.to_onnx(quantised, x_test[:1], file)
    edgemat.export(file, target="hls", output=options.output / "hls_unrolled", io="parallel")
    edgemat.export(file, target="hls", output=options.output / "hls_reuse4", io="parallel", reuse=4)

    samples = x_test[: 50 if options.quick else 1000].numpy()
    report = edgemat.verify(file, inputs=samples, backends=("onnx", "hls"), module=quantised)
    for backend, found in report.to_dict()["backends"].items():
        print(f"{backend}: {found['compared']} integers compared, {found['mismatches']} mismatches")
    print(f"written: {file}, {options.output / 'hls_unrolled'}, {options.output / 'hls_reuse4'}")
    print(f"modelled cost per layer: edgemat inspect {file} --target hls")
    return 0 if report.ok else 3


if __name__ == "__main__":
    raise SystemExit(main())
