"""The training loop of everything that is a torch module: the float start, edgemat and Brevitas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tests.benchmarks.qat.protocol import Job, Split, learning_rate, order
from tests.networks import models

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: models.Mlp(10, 2),
    "lenet": models.LeNet,
    "resnet8": models.ResNet8,
}


def train(
    model: nn.Module,
    split: Split,
    job: Job,
    epochs: int,
    rate: float,
    groups: list[dict[str, Any]] | None = None,
    cycles: int = 1,
    penalty: Callable[[], torch.Tensor] | None = None,
    after_epoch: Callable[[int], None] | None = None,
    after_step: Callable[[], None] | None = None,
) -> None:
    """Adam on the cross entropy; every group keeps its ratio to the peak learning rate.

    Args:
        model: Trained in place, left in training mode.
        split: The samples.
        job: Says the batch size and the order.
        epochs: Passes over the samples.
        rate: Peak learning rate of groups without one.
        groups: Parameter groups, by default all parameters.
        cycles: Parts after which the learning rate restarts.
        penalty: Added to the loss.
        after_epoch: Called with the epoch that ended.
        after_step: Called after each of the optimiser's steps.
    """
    x, y = torch.from_numpy(split.x), torch.from_numpy(split.y)
    optimizer = torch.optim.Adam(groups or [{"params": list(model.parameters())}], lr=rate)
    peaks = [group["lr"] for group in optimizer.param_groups]
    steps, step = epochs * (len(x) // job.budget.batch), 0
    for epoch in range(epochs):
        model.train()
        for rows in torch.from_numpy(order(job, epoch, len(x))):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = learning_rate(step, steps, peak, cycles)
            loss = F.cross_entropy(model(x[rows]), y[rows])
            if penalty is not None:
                loss = loss + penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if after_step is not None:
                after_step()
            step += 1
        if after_epoch is not None:
            after_epoch(epoch)


def accuracy(model: nn.Module, x: np.ndarray, y: np.ndarray, batch: int = 500) -> float:
    """Part of the samples whose largest output is the label; the module is in eval mode meanwhile."""
    was, right = model.training, 0
    model.eval()
    with torch.no_grad():
        for i in range(0, len(x), batch):
            outputs = model(torch.from_numpy(x[i : i + batch]))
            right += int((outputs.argmax(1).numpy() == y[i : i + batch]).sum())
    model.train(was)
    return right / len(x)


def calibration_batches(split: Split, batches: int = 8, size: int = 128) -> list[torch.Tensor]:
    """The first training samples; what every method sets its ranges on before it trains."""
    rows = min(batches * size, len(split.x))
    return list(torch.from_numpy(split.x[:rows]).split(size))
