"""The accuracy/cost front of a small MLP in one training: a width for each weight and each activation channel.

    EDGEMAT_DATA=/path/to/data python examples/tabular_front.py [--quick] [--output build/tabular_front]

The folder EDGEMAT_DATA holds magic_gamma/train.csv (ten numbers and a class, g or h, in each row). Beside the front the
script trains the same network at fixed widths, and exports and verifies the cheapest point that is as good as 4 bits.
"""

import argparse
import math
import os
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

import edgemat


def load(folder):
    """Normalised features and labels (1: a gamma shower) of a fixed shuffle: training, validation and test rows."""
    rows = [line.split(",") for line in Path(folder, "magic_gamma", "train.csv").read_text().split()[1:]]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    x = np.array([row[:10] for row in rows], dtype=np.float32)
    y = torch.tensor([int(row[10] == "g") for row in rows])
    test, train = len(x) // 5, len(x) // 5 * 2 - len(x) // 20
    x = torch.from_numpy((x - x[train:].mean(0)) / x[train:].std(0))
    return (x[train:], y[train:]), (x[test:train], y[test:train]), (x[:test], y[:test])


def accuracy(model, x, y):
    was = model.training
    model.eval()
    with torch.no_grad():
        right = (model(x).argmax(1) == y).float().mean().item()
    model.train(was)
    return right


def train(model, data, epochs, groups, batch=128, ramp=None, after_epoch=None):
    """Adam under a warm-up and half a cosine; `ramp` adds the cost."""
    x, y = data
    optimizer = torch.optim.Adam(groups)
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            if ramp is not None:
                loss = loss + ramp.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if ramp is not None:
                ramp.step()
        if after_epoch is not None:
            after_epoch()
    return steps


def fixed(model, bits, data, epochs):
    """The network at one width everywhere."""
    recipe = edgemat.Recipe(input="fixed<8,4>", weights=f"fixed<{bits}>", activations=f"fixed<{bits}>")
    q = edgemat.quantize(model, recipe)
    edgemat.calibrate(q, data[0][:1024].split(128), method="mse")
    train(q, data, epochs, edgemat.parameter_groups(q, lr=2e-3))
    return q.eval()


def trace(model, data, validation, folder, epochs):
    """The network of learned widths, and the front its training left in `folder`."""
    recipe = edgemat.Recipe(
        input="fixed<8,4>",
        weights="fixed<8>",
        activations="fixed<8>",
        learn_widths="all",
        weight_groups="weight",
        activation_groups="channel",
    )
    q = edgemat.quantize(model, recipe)
    edgemat.calibrate(q, data[0][:1024].split(128))
    front = edgemat.Front(folder)

    def after_epoch():
        reached = accuracy(q, *validation)
        front.offer(q, reached, edgemat.cost(q.eval(), "ebops"))
        q.train()

    ramp = edgemat.CostRamp(q, "ebops", start=1e-6, stop=1e-3, steps=epochs * (len(data[0]) // 128))
    # Widths move by whole bits: they bear half the learning rate of the weights.
    groups = edgemat.parameter_groups(q, lr=1e-2, format_lr=5e-3)
    train(q, data, epochs, groups, ramp=ramp, after_epoch=after_epoch)
    return q.eval(), front


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few epochs, 50 samples compared")
    parser.add_argument("--output", type=Path, default=Path("build/tabular_front"))
    options = parser.parse_args()
    if "EDGEMAT_DATA" not in os.environ:
        parser.error("set EDGEMAT_DATA to the folder that holds magic_gamma/train.csv")

    torch.manual_seed(0)
    data, validation, test = load(os.environ["EDGEMAT_DATA"])
    model = nn.Sequential(
        nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)
    )
    train(model, data, 1 if options.quick else 30, [{"params": model.parameters(), "lr": 5e-3}])
    print(f"float: {accuracy(model, *test):.2%} on the test rows")

    baselines = {}
    for bits in (6, 4, 3):
        q = fixed(model, bits, data, 1 if options.quick else 20)
        baselines[bits] = accuracy(q, *validation)
        print(f"{bits} bits everywhere: {accuracy(q, *test):.2%}, {edgemat.cost(q, 'ebops').item():,.0f} EBOPs")

    options.output.mkdir(parents=True, exist_ok=True)
    q, front = trace(model, data, validation, options.output / "front", 3 if options.quick else 60)
    Console().print(front.table())
    points = []
    for point in front.points:
        front.load(q, point)
        points.append((point, accuracy(q, *test)))
        costs = ", ".join(
            f"{edgemat.cost(q, name).item():,.0f} {unit}" for name, unit in (("lut", "LUT"), ("mcu", "B"))
        )
        print(f"{point.cost:8,.0f} EBOPs (modelled: {costs} of flash): {points[-1][1]:.2%} on the test rows")

    good = [point for point in front.points if point.accuracy >= baselines[4]]
    chosen = front.load(q, good[0] if good else front.points[-1])
    Console().print(edgemat.cost_table(q, "ebops").render())
    file = options.output / "mlp.onnx"
    edgemat.to_onnx(q, test[0][:1], file)
    samples = test[0][: 50 if options.quick else 1000].numpy()
    report = edgemat.verify(file, inputs=samples, backends=("onnx", "hls", "mcu"), module=q)
    for backend, found in report.to_dict()["backends"].items():
        print(f"{backend}: {found['compared']} integers compared, {found['mismatches']} mismatches")
    print(f"written: {file} with {chosen.cost:,.0f} EBOPs, {options.output / 'front'}")
    return 0 if report.ok else 3


if __name__ == "__main__":
    raise SystemExit(main())
