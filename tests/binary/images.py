"""Real images for FracBNN: CIFAR-10 JPEG copies, 2x2 (or more) pixels averaged to whole bytes, a byte b as b / 256."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from edgemat.nn import FracBNN, calibrate
from tests.networks import data


def images(train_per_class: int, test_per_class: int, side: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels; images ``[N, 3, side, side]``, exact in ``ufixed<8,0>``."""
    split = data.cifar10_jpeg(train_per_class, test_per_class)
    made = []
    for x, y in ((split.x_train, split.y_train), (split.x_test, split.y_test)):
        step = 32 // side
        means = x.reshape(len(x), 3, side, step, side, step).mean((3, 5)) * 128 + 128
        made += [torch.from_numpy(np.floor(means + 0.5).clip(0, 255).astype(np.float32) / 256), torch.from_numpy(y)]
    return tuple(made)  # type: ignore[return-value]


def trained(net: FracBNN, x: Tensor, y: Tensor, epochs: int, rate: float = 1e-2, batch: int = 64) -> list[float]:
    """Mean loss of every epoch of a short training with Adam and a cosine rate."""
    calibrate(net, [x[:batch]])
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(epochs):
        net.train()
        total = 0.0
        for at in torch.randperm(len(x), generator=generator)[: len(x) // batch * batch].split(batch):
            loss = nn.functional.cross_entropy(net(x[at]), y[at])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(at)
        losses.append(total / (len(x) // batch * batch))
    net.eval()
    return losses


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right classes."""
    return float((net(x).argmax(1) == y).float().mean())
