"""Keyword spotting with ternary weights: a CNN on spoken digits whose convolutions add and subtract.

    EDGEMAT_DATA=/path/to/data python examples/keyword_ternary.py [--quick] [--output build/keyword_ternary]

The folder EDGEMAT_DATA holds fsdd/fsdd_wav.zip; features and training are those of keyword_dscnn.py beside this file.
"""

import argparse
import os
from pathlib import Path

import torch
from keyword_dscnn import accuracy, load, train
from torch import nn

import edgemat


def make_network(channels):
    """Four convolutions, each with the batch norm and the ReLU that `edgemat.quantize` makes part of them."""

    def block(inputs, outputs, stride):
        return (nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())

    return nn.Sequential(
        *block(1, channels, 2),
        *block(channels, channels, 2),
        *block(channels, 2 * channels, 2),
        *block(2 * channels, 2 * channels, 1),
        nn.AvgPool2d((7, 2)),
        nn.Flatten(),
        nn.Linear(2 * channels, 10),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few batches of a narrower network")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("build/keyword_ternary"))
    options = parser.parse_args()
    if "EDGEMAT_DATA" not in os.environ:
        parser.error("set EDGEMAT_DATA to the folder that holds fsdd/fsdd_wav.zip")

    torch.manual_seed(0)
    x, y, x_test, y_test = load(os.environ["EDGEMAT_DATA"])
    if options.quick:
        options.epochs, options.channels = 1, 4
        x, y, x_test, y_test = x[::8], y[::8], x_test[::10], y_test[::10]

    model = make_network(options.channels)
    print("float32")
    train(model, x, y, options.epochs, lr=4e-3)

    # The first layer sees the features and the last makes the scores: eight bits there, trits between them.
    recipe = edgemat.Recipe(
        input="fixed<8,2>",
        weights="ternary",
        activations="fixed<8>",
        rules={"0": {"weights": "fixed<8>"}, "14": {"weights": "fixed<8>"}},
    )
    quantised = edgemat.quantize(model, recipe)
    edgemat.calibrate(quantised, x[:256].split(64))
    print("ternary")
    train(quantised, x, y, options.epochs, lr=4e-3)
    print(f"test accuracy: float {accuracy(model, x_test, y_test):.2%}, ", end="")
    print(f"ternary {accuracy(quantised, x_test, y_test):.2%}")

    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "keyword.onnx"
    edgemat.to_onnx(quantised, x_test[:1], file)
    edgemat.export(file, target="hls", output=options.output / "hls", io="stream")
    edgemat.export(file, target="mcu", output=options.output / "mcu")
    report = edgemat.verify(file, inputs=x_test[:20].numpy(), backends=("onnx", "mcu", "hls"), module=quantised)
    for backend, found in report.to_dict()["backends"].items():
        print(f"{backend}: {found['compared']} integers compared, {found['mismatches']} mismatches")
    print(f"written: {file}, {options.output / 'hls'}, {options.output / 'mcu'}")
    return 0 if report.ok else 3


if __name__ == "__main__":
    raise SystemExit(main())
