"""A small trained-like network with a requantised output, shared by the verification tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import edgemat


class Small(nn.Module):
    """Two convolutions with a shortcut and a linear head: every kind of epilogue in a few nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1)
        self.fc = nn.Linear(4 * 9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv1(x))
        x = torch.relu(x + self.conv2(x))
        return self.fc(torch.flatten(self.pool(x), 1))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, torch.Tensor]:
    """The quantised module, its lowered file and some inputs."""
    torch.manual_seed(3)
    x = torch.randn(40, 1, 6, 6)
    recipe = edgemat.Recipe(input="fixed<8,2>", weights="fixed<6>", activations="fixed<6>", outputs="fixed<8>")
    module = edgemat.quantize(Small(), recipe)
    edgemat.calibrate(module, [x])
    module.eval()
    path = tmp_path_factory.mktemp("small") / "small.onnx"
    edgemat.to_onnx(module, x[:2], path)
    return module, path, x
