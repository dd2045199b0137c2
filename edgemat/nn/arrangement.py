"""Operations that only move or select values, in a form whose export has constant shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemat.errors import LoweringError


class Split(nn.Module):
    """`torch.split` (`sizes`) or `torch.chunk` (`chunks`) along one axis; formats stay.

    Args:
        dim: Axis, not the batch.
        sizes: Length of each part, or one length for all but the last.
        chunks: Number of parts, instead of `sizes`.
    """

    def __init__(self, dim: int, sizes: int | Sequence[int] | None = None, chunks: int | None = None):
        super().__init__()
        self.dim, self.sizes, self.chunks = dim, sizes, chunks

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parts."""
        if self.dim % x.dim() == 0:
            raise LoweringError("a split along the batch axis was asked for, expected another axis")
        total = int(x.shape[self.dim])
        if self.chunks is not None:
            each = -(-total // self.chunks)
        elif isinstance(self.sizes, int):
            each = self.sizes
        else:
            each = 0
        sizes = [min(each, total - at) for at in range(0, total, each)] if each else list(self.sizes or ())
        if sum(sizes) != total:
            raise LoweringError(f"a split into {sizes} was asked for, expected sizes that add up to {total}")
        parts, at = [], 0
        for size in sizes:
            parts.append(x.narrow(self.dim, at, size))
            at += size
        return tuple(parts)

    def extra_repr(self) -> str:
        """The parts, for printing."""
        return f"dim={self.dim}, sizes={self.sizes}, chunks={self.chunks}"


class Stack(nn.Module):
    """`torch.stack`; formats are aligned like a concatenation's.

    Args:
        dim: The new axis.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        """The parts along a new axis."""
        return torch.cat([part.unsqueeze(self.dim) for part in parts], self.dim)


class GlobalMaxPool(nn.Module):
    """Maximum over all spatial axes of ``[N, C, ...]``, which stay with size 1."""

    def forward(self, x: Tensor) -> Tensor:
        """The maxima, ``[N, C, 1]`` or ``[N, C, 1, 1]``."""
        sizes = [int(n) for n in x.shape[2:]]
        return F.max_pool1d(x, sizes) if x.dim() == 3 else F.max_pool2d(x, sizes)
