"""Time of a training step of a peer's 8-bit ResNet8 beside a float one in the same process; run by `bench_training`.

``python -m tests.benchmarks.peer_training brevitas|hgq2 THREADS BATCH ROUNDS`` prints seconds as JSON: of the peer's
step and of the float step of its own framework (torch eager for Brevitas, Keras on torch for HGQ2).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from tests.benchmarks.qat.protocol import NETWORKS, Job


def brevitas(batch: int) -> dict[str, Callable[[], object]]:
    """Per-channel float-scaled weights, per-tensor activations: Brevitas' own 8-bit quantisers."""
    from tests.benchmarks.qat.train_brevitas import Parts, ResNet8
    from tests.networks.models import ResNet8 as Float

    x, y = torch.rand(batch, 3, 32, 32) * 2 - 1, torch.randint(0, 10, (batch,))

    def stepper(model: torch.nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

        return step

    return {"float": stepper(Float()), "peer": stepper(ResNet8(Parts(8, "stats")))}


def hgq2(batch: int) -> dict[str, Callable[[], object]]:
    """Fixed 8-bit widths, as in the accuracy table, against the same network of plain Keras layers."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras
    from hgq.config import LayerConfigScope

    from tests.benchmarks.qat import train_hgq2

    job = Job("fixed", "hgq2", "resnet8", 8, 0, NETWORKS["resnet8"])
    with LayerConfigScope(enable_ebops=False):
        model = train_hgq2.resnet8(train_hgq2.Fixed(job))
    layers = keras.layers

    def stack(x: object, filters: int, stride: int) -> object:
        y = layers.Conv2D(filters, 3, stride, padding="same")(x)
        y = layers.BatchNormalization()(y)
        y = layers.Conv2D(filters, 3, padding="same")(layers.ReLU()(y))
        y = layers.BatchNormalization()(y)
        x = layers.Conv2D(filters, 1, stride)(x) if stride > 1 else x
        return layers.ReLU()(layers.Add()([x, y]))

    given = keras.Input((32, 32, 3))
    x = layers.Conv2D(16, 3, padding="same")(given)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    for filters, stride in ((16, 1), (32, 2), (64, 2)):
        x = stack(x, filters, stride)
    plain = keras.Model(given, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    data = np.random.rand(batch, 32, 32, 3).astype(np.float32) * 2 - 1
    labels = np.random.randint(0, 10, batch)
    for made in (plain, model):
        made.compile(optimizer=keras.optimizers.SGD(1e-3, momentum=0.9), loss=loss)
    return {"float": lambda: plain.train_on_batch(data, labels), "peer": lambda: model.train_on_batch(data, labels)}


def main() -> None:
    """Times both in turns and prints the fastest of each."""
    name, threads, batch, rounds = sys.argv[1], *map(int, sys.argv[2:5])
    torch.set_num_threads(threads)
    steps = {"brevitas": brevitas, "hgq2": hgq2}[name](batch)
    best = dict.fromkeys(steps, float("inf"))
    for turn in range(2 + rounds):
        for label, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 2:
                best[label] = min(best[label], time.perf_counter() - start)
    print(json.dumps(best))


if __name__ == "__main__":
    main()
