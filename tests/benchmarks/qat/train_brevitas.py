"""Brevitas at a stated width, in the peers' environment.

Weights: symmetric, a float scale for each output channel from the weights themselves (`Int8WeightPerChannelFloat`).
Activations: a learned float scale for each tensor (`Uint8ActPerTensorFloat`, `Int8ActPerTensorFloat`), started in
calibration mode. The inputs keep their 8 bits; biases and batch norms stay in float, which favours Brevitas.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import brevitas.nn as qnn
import torch
from brevitas import config
from brevitas.graph.calibrate import calibration_mode
from brevitas.quant import (
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerChannelFloatMSE,
    Uint8ActPerTensorFloat,
)
from torch import nn
from torch.nn import functional as F

from tests.benchmarks.qat import float_start, loop
from tests.benchmarks.qat.protocol import Job, load

config.IGNORE_MISSING_KEYS = True
WEIGHTS = {"stats": Int8WeightPerChannelFloat, "mse": Int8WeightPerChannelFloatMSE}


class Parts:
    """Makes the layers of one width."""

    def __init__(self, bits: int, weights: str):
        self.bits, self.weights = bits, {"weight_quant": WEIGHTS[weights], "weight_bit_width": bits}

    def dense(self, inputs: int, outputs: int) -> nn.Module:
        """A dense layer."""
        return qnn.QuantLinear(inputs, outputs, bias=True, **self.weights)

    def conv(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> nn.Module:
        """A convolution."""
        return qnn.QuantConv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=True, **self.weights)

    def relu(self) -> nn.Module:
        """A ReLU with unsigned codes."""
        return qnn.QuantReLU(act_quant=Uint8ActPerTensorFloat, bit_width=self.bits)

    def identity(self, bits: int = 0) -> nn.Module:
        """A requantisation to signed codes."""
        return qnn.QuantIdentity(act_quant=Int8ActPerTensorFloat, bit_width=bits or self.bits)


class Mlp(nn.Sequential):
    """`tests.networks.models.Mlp`, parameter names kept."""

    def __init__(self, parts: Parts):
        super().__init__(
            parts.dense(10, 64),
            parts.relu(),
            parts.dense(64, 32),
            parts.relu(),
            parts.dense(32, 32),
            parts.relu(),
            parts.dense(32, 2),
        )


class LeNet(nn.Module):
    """`tests.networks.models.LeNet`, parameter names kept."""

    def __init__(self, parts: Parts):
        super().__init__()
        self.conv1, self.conv2 = parts.conv(1, 6, 5, padding=2), parts.conv(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = parts.dense(400, 120), parts.dense(120, 84), parts.dense(84, 10)
        self.relus = nn.ModuleList(parts.relu() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(self.relus[0](self.conv1(x)), 2)
        x = F.max_pool2d(self.relus[1](self.conv2(x)), 2).flatten(1)
        return self.fc3(self.relus[3](self.fc2(self.relus[2](self.fc1(x)))))


class Stack(nn.Module):
    """`tests.networks.models.ResidualStack`; both operands of the sum are quantised."""

    def __init__(self, parts: Parts, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = parts.conv(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = parts.conv(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else parts.conv(inputs, outputs, 1, stride)
        self.relu1, self.relu2, self.main = parts.relu(), parts.relu(), parts.identity()
        self.side = nn.Identity() if same else parts.identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.main(self.bn2(self.conv2(y))) + self.side(self.shortcut(x)))


class ResNet8(nn.Module):
    """`tests.networks.models.ResNet8`, parameter names kept."""

    def __init__(self, parts: Parts):
        super().__init__()
        self.conv, self.bn, self.relu = parts.conv(3, 16, 3, 1, 1), nn.BatchNorm2d(16), parts.relu()
        self.stack1, self.stack2, self.stack3 = (
            Stack(parts, 16, 16, 1),
            Stack(parts, 16, 32, 2),
            Stack(parts, 32, 64, 2),
        )
        self.average, self.dense = parts.relu(), parts.dense(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn(self.conv(x)))
        x = self.stack3(self.stack2(self.stack1(x)))
        return self.dense(self.average(F.avg_pool2d(x, 8)).flatten(1))


NETWORKS = {"mlp": Mlp, "lenet": LeNet, "resnet8": ResNet8}


def run(job: Job, folder: Path) -> dict[str, Any]:
    """Trains one point."""
    split = load(job)
    q = NETWORKS[job.network](Parts(job.bits, str(job.option("weights", "stats"))))
    state = {name: torch.from_numpy(value) for name, value in float_start.arrays(job, folder).items()}
    missing = q.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys
    q.eval()
    with torch.no_grad(), calibration_mode(q):
        for batch in loop.calibration_batches(split):
            q(batch)
    loop.train(q, split, job, job.budget.epochs, float(job.option("rate", job.budget.rate)))
    q.eval()
    return {
        "validation": loop.accuracy(q, split.x_validation, split.y_validation),
        "test": loop.accuracy(q, split.x_test, split.y_test),
    }
