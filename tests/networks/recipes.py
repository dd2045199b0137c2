"""How each network is trained: a few float epochs, then a few quantised ones, deterministic, minutes at most
on two cores.

`train` is an ordinary PyTorch loop and nothing else; `build` runs it twice and writes the lowered file.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import edgemat

from . import data, models

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def classify(outputs: torch.Tensor, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of logits ``[N, C]``."""
    return F.cross_entropy(outputs, labels)


def classify_rare(outputs: torch.Tensor, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy where class 1 is rare and counts ten times."""
    return F.cross_entropy(outputs, labels, weight=torch.tensor([1.0, 10.0]))


def reconstruct(outputs: torch.Tensor, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean squared error against the input itself."""
    return F.mse_loss(outputs, inputs)


@dataclass(frozen=True)
class Network:
    """One network of the test set and its schedule.

    Attributes:
        model: Makes the float module.
        load: Loads its data set.
        recipe: Keyword arguments of ``edgemat.Recipe``.
        float_epochs: Passes over the training split before quantisation.
        quantised_epochs: Passes after it.
        batch: Samples of one step.
        lr: Peak learning rate of the float epochs (one-cycle, AdamW); the quantised epochs take a fifth of
        it.
        loss: Of outputs, inputs and labels.
        hls_samples: Samples the HLS C simulation is compared on.
        base: Network whose float training this one starts from, or "" for its own.
    """

    model: Callable[[], nn.Module]
    load: Callable[[], data.DataSet]
    recipe: dict[str, str] = field(default_factory=dict)
    float_epochs: int = 3
    quantised_epochs: int = 2
    batch: int = 64
    lr: float = 5e-3
    loss: Loss = classify
    hls_samples: int = 1_000
    base: str = ""


def _formats(input_format: str, width: int) -> dict[str, str]:
    return {"input": input_format, "weights": f"fixed<{width}>", "activations": f"fixed<{width}>"}


_LENET = partial(Network, models.LeNet, data.mnist, float_epochs=3, quantised_epochs=1, batch=128, lr=4e-3)

NETWORKS: dict[str, Network] = {
    "mlp": Network(partial(models.Mlp, 10, 2), data.magic_gamma, _formats("fixed<8,4>", 6), 10, 4, batch=128, lr=5e-3),
    "lenet": _LENET(_formats("ufixed<8,0>", 6)),
    "lenet8": _LENET(_formats("ufixed<8,0>", 8), base="lenet"),
    "resnet8": Network(
        models.ResNet8,
        partial(data.cifar10_jpeg, 600),
        _formats("fixed<8,1>", 8),
        float_epochs=2,
        quantised_epochs=1,
        lr=1e-2,
        hls_samples=200,
    ),
    "dscnn": Network(models.DsCnn, data.fsdd, _formats("fixed<8,2>", 8), 8, 3, batch=32, lr=4e-3),
    "ecg": Network(
        models.EcgCnn,
        data.ecg_mitdb100,
        _formats("fixed<8,2>", 6),
        20,
        8,
        batch=32,
        lr=5e-3,
        loss=classify_rare,
    ),
    "autoencoder": Network(
        models.Autoencoder, data.fsdd_windows, _formats("fixed<8,2>", 8), 8, 3, lr=3e-3, loss=reconstruct
    ),
}


@dataclass(frozen=True)
class Score:
    """What a training reached; accuracies in 0..1 (for the autoencoder: the explained part of the
    variance).
    """

    float_score: float
    quantised_score: float
    seconds: float


def train(model: nn.Module, split: data.DataSet, network: Network, epochs: int, lr: float) -> nn.Module:
    """Trains in place with AdamW on a one-cycle schedule and leaves the module in eval mode."""
    torch.manual_seed(0)
    x, y = torch.from_numpy(split.x_train), torch.from_numpy(split.y_train)
    steps = len(x) // network.batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: steps * network.batch].split(network.batch):
            loss = network.loss(model(x[rows]), x[rows], y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def outputs(model: nn.Module, x: np.ndarray, batch: int = 500) -> np.ndarray:
    """Outputs of the module in eval mode, in batches."""
    with torch.no_grad():
        return np.concatenate(
            [model(torch.from_numpy(part)).numpy() for part in np.split(x, range(batch, len(x), batch))]
        )


def score(y: np.ndarray, split: data.DataSet, network: Network) -> float:
    """Accuracy of the logits `y` on the test split, or the explained variance of a reconstruction."""
    if network.loss is reconstruct:
        return float(1 - np.mean((y - split.x_test) ** 2) / np.var(split.x_test))
    return float(np.mean(y.argmax(axis=1) == split.y_test))


def pretrain(network: Network, split: data.DataSet) -> nn.Module:
    """The float network after its float epochs, in eval mode."""
    torch.manual_seed(0)
    return train(network.model(), split, network, network.float_epochs, network.lr)


def quantise(network: Network, split: data.DataSet, model: nn.Module) -> nn.Module:
    """Quantises, calibrates on 256 training samples and trains the quantised epochs; the float `model` is
    left alone.
    """
    quantised = edgemat.quantize(model, edgemat.Recipe(**network.recipe))
    edgemat.calibrate(quantised, [torch.from_numpy(split.x_train[i : i + 64]) for i in range(0, 256, 64)])
    return train(quantised, split, network, network.quantised_epochs, network.lr / 5)


def lower(quantised: nn.Module, split: data.DataSet, folder: Path) -> None:
    """Writes ``net.onnx``; a reader sees the old file or the new one, never a part."""
    written = folder / f"net-{os.getpid()}.onnx"
    edgemat.to_onnx(quantised, torch.from_numpy(split.x_test[:2]), written)
    os.replace(written, folder / "net.onnx")


def build(name: str, folder: Path, base: Path | None = None) -> Score:
    """Trains the network `name` and writes ``net.onnx``, ``score.json`` and two ``state_dict`` into `folder`:
    ``float.pt`` and ``module.pt``, the quantised one. `base` is the folder of the network it starts from.
    """
    start = time.perf_counter()
    network = NETWORKS[name]
    split = network.load()
    if base:
        model = network.model().eval()
        model.load_state_dict(torch.load(base / "float.pt", weights_only=True))
    else:
        model = pretrain(network, split)
    torch.save(model.state_dict(), folder / "float.pt")
    quantised = quantise(network, split, model)
    torch.save(quantised.state_dict(), folder / "module.pt")
    lower(quantised, split, folder)
    reached = Score(
        score(outputs(model, split.x_test), split, network),
        score(outputs(quantised, split.x_test), split, network),
        time.perf_counter() - start,
    )
    (folder / "score.json").write_text(json.dumps(asdict(reached)))
    return reached


def load_module(name: str, path: Path) -> nn.Module:
    """The trained quantised module, in eval mode, from its ``state_dict``."""
    network = NETWORKS[name]
    quantised = edgemat.quantize(network.model(), edgemat.Recipe(**network.recipe))
    quantised.load_state_dict(torch.load(path, weights_only=True))
    return quantised.eval()
