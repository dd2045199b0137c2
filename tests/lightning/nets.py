"""Small quantised LightningModules, their data, and trainers that stay quiet."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

import edgemat

RECIPE = edgemat.Recipe(input="fixed<8,3>", weights="fixed<3>", activations="fixed<5>")

LEARNED = edgemat.Recipe(
    input="fixed<8,3>", weights="fixed<6>", activations="fixed<6>", learn_widths="all", weight_groups="weight"
)


def data(samples: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(samples, 1, 6, 6, generator=generator)
    return x, torch.randint(0, 3, (samples,), generator=generator)


def network(recipe: edgemat.Recipe = RECIPE, norm: bool = True, calibrated: bool = True) -> Any:
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 4, 3), *([nn.BatchNorm2d(4)] if norm else []), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    net = edgemat.quantize(nn.Sequential(*layers, nn.Linear(16, 3)), recipe)
    return edgemat.calibrate(net, [data()[0]]) if calibrated else net


class Lit(L.LightningModule):
    """A classifier around a quantised network."""

    def __init__(self, net: nn.Module | None = None, lr: float = 0.05, kind: type = torch.optim.Adam):
        super().__init__()
        self.net = network() if net is None else net
        self.lr, self.kind = lr, kind

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.kind(self.parameters(), lr=self.lr)


class EpochSampler(Sampler[int]):
    """A shuffle that depends on the epoch alone, so that a resumed training sees it again."""

    def __init__(self, count: int):
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        return iter(torch.randperm(self.count, generator=torch.Generator().manual_seed(self.epoch)).tolist())


def loader(batch: int = 12, shuffle: bool = True) -> DataLoader:
    pairs = TensorDataset(*data())
    return DataLoader(pairs, batch, sampler=EpochSampler(len(pairs)) if shuffle else None)


def batches(epochs: int, batch: int = 12) -> list[Any]:
    """What `loader` gives in the first epochs."""
    found = []
    for epoch in range(epochs):
        made = loader(batch)
        made.sampler.set_epoch(epoch)
        found += list(made)
    return found


def trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0}
    return L.Trainer(**(quiet | options))


def same(a: Any, b: Any) -> bool:
    """Whether two nests of dicts, lists, tensors and numbers agree to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b or (a != a and b != b))
