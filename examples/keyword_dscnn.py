"""Keyword spotting: a DS-CNN on spoken digits, one ONNX file, HLS C++ and MCU C, the same integers on both.

    EDGEMAT_DATA=/path/to/data python examples/keyword_dscnn.py [--quick] [--output build/keyword_dscnn]

The folder EDGEMAT_DATA holds fsdd/fsdd_wav.zip: 8 kHz recordings called {digit}_{speaker}_{index}.wav.
"""

import argparse
import io
import os
import wave
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import edgemat

RATE_HZ = 8000


def mfcc(signals, bands=40, coefficients=10):
    """[N, 8000] in -1..1 to [N, 49, 10]: 40 ms frames every 20 ms, 40 mel bands, the first ten cosine
    terms.
    """
    emphasised = np.concatenate([signals[:, :1], signals[:, 1:] - 0.97 * signals[:, :-1]], axis=1)
    frames = np.lib.stride_tricks.sliding_window_view(emphasised, 320, axis=1)[:, ::160]
    power = np.abs(np.fft.rfft(frames * np.hanning(320), 512)) ** 2
    mel_edges = np.linspace(2595 * np.log10(1 + 20 / 700), 2595 * np.log10(1 + 4000 / 700), bands + 2)
    edges = 700 * (10 ** (mel_edges / 2595) - 1)
    bins = np.fft.rfftfreq(512, 1 / RATE_HZ)
    filters = np.stack([np.interp(bins, edges[b : b + 3], [0, 1, 0]) for b in range(bands)])
    cosines = np.cos(np.pi * np.arange(coefficients)[:, None] * (np.arange(bands) + 0.5) / bands)
    return np.log(power @ filters.T + 1e-6) @ cosines.T


def load(folder):
    """Normalised features [N, 1, 49, 10] and digits; recordings 0 to 4 of each speaker are the test split."""
    signals, digits, test = [], [], []
    with zipfile.ZipFile(Path(folder, "fsdd", "fsdd_wav.zip")) as archive:
        for name in sorted(archive.namelist()):
            with wave.open(io.BytesIO(archive.read(name))) as recording:
                samples = np.frombuffer(recording.readframes(RATE_HZ), dtype="<i2") / 32768
            digit, _, index = Path(name).stem.split("_")
            signals.append(np.pad(samples, (0, RATE_HZ - len(samples))))
            digits.append(int(digit))
            test.append(int(index) <= 4)
    test = np.array(test)
    features = mfcc(np.stack(signals))
    features = (features - features[~test].mean((0, 1))) / (2 * features[~test].std((0, 1)))
    x, y = torch.from_numpy(features[:, None].astype(np.float32)), torch.tensor(digits)
    return x[~test], y[~test], x[test], y[test]


def separable(channels):
    """A depthwise and a pointwise convolution; batch norm is folded into the weights by edgemat.quantize."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


def make_network(channels=64):
    return nn.Sequential(
        nn.Conv2d(1, channels, (10, 4), stride=2, padding=(5, 1)),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        *(separable(channels) for _ in range(4)),
        nn.Dropout(0.4),
        nn.AvgPool2d((25, 5)),
        nn.Flatten(),
        nn.Linear(channels, 10),
    )


def train(model, x, y, epochs, lr, batch=32):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    steps = len(x) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs=epochs, steps_per_epoch=steps)
    model.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(x))[: steps * batch].split(batch):
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
    parser.add_argument("--quick", action="store_true", help="a few batches of a narrower network")
    parser.add_argument("--output", type=Path, default=Path("build/keyword_dscnn"))
    options = parser.parse_args()
    if "EDGEMAT_DATA" not in os.environ:
        parser.error("set EDGEMAT_DATA to the folder that holds fsdd/fsdd_wav.zip")

    torch.manual_seed(0)
    x, y, x_test, y_test = load(os.environ["EDGEMAT_DATA"])
    if options.quick:
        x, y, x_test, y_test = x[::8], y[::8], x_test[::10], y_test[::10]

    model = make_network(16 if options.quick else 64)
    print("float32")
    train(model, x, y, epochs=1 if options.quick else 8, lr=4e-3)

    # Eight bits everywhere, four for the pointwise weights, which hold most of the parameters.
    recipe = edgemat.Recipe(
        input="fixed<8,2>",
        weights="fixed<8>",
        activations="fixed<8>",
        rules={f"{block}.3": {"weights": "fixed<4>"} for block in range(3, 7)},
    )
    quantised = edgemat.quantize(model, recipe)
    edgemat.calibrate(quantised, x[:256].split(64))
    print("fixed point")
    train(quantised, x, y, epochs=1 if options.quick else 4, lr=8e-4)
    print(f"test accuracy: float {accuracy(model, x_test, y_test):.2%}, ", end="")
    print(f"fixed point {accuracy(quantised, x_test, y_test):.2%}")

    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "dscnn.onnx"
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
