"""The networks of the project's promise, as plain torch modules with names that :func:`edgemat.quantize`
keeps.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F


class Mlp(nn.Sequential):
    """The jet tagger's shape, ``[N, inputs]`` to ``[N, outputs]`` through 64, 32 and 32 ReLU units."""

    def __init__(self, inputs: int = 16, outputs: int = 5):
        super().__init__(
            nn.Linear(inputs, 64),
            nn.ReLU(),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, 32),
            nn.ReLU(),
            nn.Linear(32, outputs),
        )


class SmallCnn(nn.Module):
    """The benchmark network: ``[N, 1, 28, 28]``, conv 8, pool, conv 16, pool, conv 16, dense 10."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3)
        self.conv2 = nn.Conv2d(8, 16, 3)
        self.conv3 = nn.Conv2d(16, 16, 3)
        self.dense = nn.Linear(16 * 3 * 3, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.dense(F.relu(self.conv3(x)).flatten(1))


class LeNet(nn.Module):
    """LeNet-5 with ReLU and max pooling, ``[N, 1, 28, 28]`` to ``[N, 10]``."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.flatten(x, 1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class ResidualStack(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut (a strided 1x1 convolution where the shape
    changes).
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet8(nn.Module):
    """MLPerf Tiny's image classifier, ``[N, 3, 32, 32]`` to ``[N, 10]`` (12.5 M multiplies)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.stack1 = ResidualStack(16, 16, 1)
        self.stack2 = ResidualStack(16, 32, 2)
        self.stack3 = ResidualStack(32, 64, 2)
        self.pool = nn.AvgPool2d(8)
        self.dense = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = self.stack3(self.stack2(self.stack1(x)))
        return self.dense(self.pool(x).flatten(1))


class SeparableBlock(nn.Module):
    """A 3x3 depthwise and a pointwise convolution, each with batch norm and ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.depthwise(x)))
        return F.relu(self.bn2(self.pointwise(x)))


class DsCnn(nn.Module):
    """MLPerf Tiny's keyword spotter, ``[N, 1, 49, 10]`` to ``[N, outputs]``, 64 channels, four separable
    blocks.
    """

    def __init__(self, outputs: int = 10):
        super().__init__()
        self.pad = nn.ZeroPad2d((1, 1, 4, 5))
        self.conv = nn.Conv2d(1, 64, (10, 4), stride=2)
        self.bn = nn.BatchNorm2d(64)
        self.dropout1 = nn.Dropout(0.2)
        self.blocks = nn.Sequential(*(SeparableBlock(64) for _ in range(4)))
        self.dropout2 = nn.Dropout(0.4)
        self.pool = nn.AvgPool2d((25, 5))
        self.dense = nn.Linear(64, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout1(F.relu(self.bn(self.conv(self.pad(x)))))
        x = self.pool(self.dropout2(self.blocks(x)))
        return self.dense(torch.flatten(x, 1))


class EcgCnn(nn.Module):
    """A 1-D CNN on two ECG leads, ``[N, 2, 192]`` to ``[N, 2]``; strided, dilated and pooled convolutions."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv1d(2, 8, 7, stride=2, padding=3)
        self.bn1 = nn.BatchNorm1d(8)
        self.conv2 = nn.Conv1d(8, 16, 5, padding=4, dilation=2)
        self.bn2 = nn.BatchNorm1d(16)
        self.conv3 = nn.Conv1d(16, 16, 3)
        self.pool = nn.MaxPool1d(2)
        self.average = nn.AvgPool1d(3)
        self.dense = nn.Linear(16 * 7, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        x = self.pool(F.relu(self.bn2(self.conv2(x))))
        x = self.average(F.relu(self.conv3(x)))
        return self.dense(x.flatten(1))


class Autoencoder(nn.Sequential):
    """MLPerf Tiny's anomaly detector, 640-128-128-128-128-8-128-128-128-128-640, batch norm and ReLU
    between layers.
    """

    def __init__(self):
        sizes = [640, 128, 128, 128, 128, 8, 128, 128, 128, 128, 640]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes[:-1]):
            layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
        super().__init__(*layers, nn.Linear(sizes[-2], sizes[-1]))
