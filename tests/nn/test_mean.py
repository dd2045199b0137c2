"""The mean over one spatial axis is the exact rational, rounded once, in torch and in the file."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import edgemat
from edgemat.errors import LoweringError


class Mean(nn.Module):
    """The mean over `dim`."""

    def __init__(self, dim: int, keepdim: bool = False) -> None:
        super().__init__()
        self.dim, self.keepdim = dim, keepdim

    def forward(self, x):
        return x.mean(self.dim, self.keepdim)


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize(("dim", "shape"), [(3, (6, 2, 3, 7)), (-1, (6, 2, 3, 7)), (2, (6, 2, 5, 4)), (2, (6, 2, 9))])
def test_one_axis_is_the_exact_mean_in_torch_and_in_the_file(dim, shape, keepdim, tmp_path) -> None:
    torch.manual_seed(0)
    codes = torch.randint(-128, 128, shape)
    x = codes / 16
    q = edgemat.quantize(Mean(dim, keepdim), edgemat.Recipe(input="fixed<8,4>", outputs="fixed<9,4,RND,SAT>")).eval()
    y = q(x)
    # Round half up of sum / count in units of 2**-5, in integers.
    total, count = codes.sum(dim, keepdim=keepdim) * 2, shape[dim]
    expected = torch.div(2 * total + count, 2 * count, rounding_mode="floor")
    assert torch.equal(y.double() * 32, expected.double())
    truncated = torch.div(total, count, rounding_mode="floor")
    assert not torch.equal(y.double() * 32, truncated.double())
    edgemat.to_onnx(q, x, tmp_path / "mean.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "mean.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert found.shape == tuple(y.shape) and np.array_equal(found, y.numpy())


def test_the_mean_over_channels_is_refused_by_its_axes() -> None:
    q = edgemat.quantize(Mean(1))
    with pytest.raises(LoweringError, match=r"axes \[1\] of a tensor of 4 axes, expected axes from 2 on"):
        edgemat.calibrate(q, [torch.randn(2, 3, 4, 5)])
