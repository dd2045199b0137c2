"""LeNet on MNIST at 6 bits, trained with a plain PyTorch loop, to an ONNX file and an MCU C library.

    EDGEMAT_DATA=/path/to/data python examples/mnist_lenet.py [--quick] [--bits 6] [--output DIR]

The folder EDGEMAT_DATA holds mnist/mnist.npz (x_train, y_train, x_test, y_test as bytes).
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import edgemat


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc3(F.relu(self.fc2(x)))


def load(folder):
    """Images as values in 0..255/256, which the input format ufixed<8,0> holds exactly, and int64 labels."""
    with np.load(Path(folder, "mnist", "mnist.npz")) as z:
        images = [torch.from_numpy(z[key][:, None].astype(np.float32) / 256) for key in ("x_train", "x_test")]
        labels = [torch.from_numpy(z[key].astype(np.int64)) for key in ("y_train", "y_test")]
    return images[0], labels[0], images[1], labels[1]


def train(model, x, y, epochs, lr, batch=128):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs=epochs, steps_per_epoch=len(x) // batch)
    model.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"  epoch {epoch + 1}/{epochs}, loss {loss.item():.3f}")
    model.eval()


def accuracy(model, x, y):
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few batches only: shows the steps, trains nothing")
    parser.add_argument("--bits", type=int, default=6, help="width of weights and activations")
    parser.add_argument("--output", type=Path, default=Path("build/mnist_lenet"))
    options = parser.parse_args()
    if "EDGEMAT_DATA" not in os.environ:
        parser.error("set EDGEMAT_DATA to the folder that holds mnist/mnist.npz")

    torch.manual_seed(0)
    x, y, x_test, y_test = load(os.environ["EDGEMAT_DATA"])
    if options.quick:
        x, y, x_test, y_test = x[:1024], y[:1024], x_test[:50], y_test[:50]

    model = LeNet()
    print("float32")
    train(model, x, y, epochs=1 if options.quick else 3, lr=4e-3)

    # From here on the binary points are parameters like any other.
    recipe = edgemat.Recipe(input="ufixed<8,0>", weights=f"fixed<{options.bits}>", activations=f"fixed<{options.bits}>")
    quantised = edgemat.quantize(model, recipe)
    edgemat.calibrate(quantised, x[:256].split(64))
    print(f"{options.bits} bits")
    train(quantised, x, y, epochs=1, lr=8e-4)
    print(f"test accuracy: float {accuracy(model, x_test, y_test):.2%}, ", end="")
    print(f"{options.bits} bits {accuracy(quantised, x_test, y_test):.2%}")

    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "lenet.onnx"
    edgemat.to_onnx(quantised, x_test[:1], file)
    edgemat.export(file, target="mcu", output=options.output / "mcu")
    report = edgemat.verify(file, inputs=x_test.numpy(), backends=("onnx", "mcu"), module=quantised)
    for backend, found in report.to_dict()["backends"].items():
        print(f"{backend}: {found['compared']} integers compared, {found['mismatches']} mismatches")
    print(f"written: {file}, {options.output / 'mcu'}")
    return 0 if report.ok else 3


if __name__ == "__main__":
    raise SystemExit(main())
