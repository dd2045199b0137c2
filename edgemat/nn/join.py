"""Joins of two tensors: exact and aligned, then quantised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgemat.formats import Fixed
from edgemat.nn import compiled, stage
from edgemat.nn.emission import exporting
from edgemat.nn.layer import Link, QuantLayer, exact_arithmetic
from edgemat.nn.quantizer import FixedQuantizer


class QuantJoin(QuantLayer):
    """Base of the joins: the exact result of two operands, in float64 where float32 could round, then a quantiser.

    Args:
        output: Format of the result, or None for the exact, widened grid.
        relu: Whether a ReLU precedes the output quantiser.
    """

    sign = 0
    """Of the second operand in a sum; 0 where the join is none."""

    def __init__(self, output: str | Fixed | FixedQuantizer | None = "fixed<8>", *, relu: bool = False):
        super().__init__(None, output, relu)
        self._relu = Link()

    def reach(self, relu: QuantLayer) -> None:
        """Names the ReLU, with a quantiser of its own, that may join this sum's pass: nobody else takes the sum."""
        self._relu = Link(relu)

    @property
    def _chain(self) -> tuple[FixedQuantizer, FixedQuantizer] | None:
        """The quantisers of the sum and of the ReLU behind it where a training step takes both in one pass."""
        own, third = self.output_quantizer, stage.joining(self._relu)
        if third is None or not (self.training and stage.possible()):
            return None
        return (own, third) if type(own) is FixedQuantizer and own.takes_affine else None

    @property
    def reaches_relu(self) -> bool:
        """Whether this layer's pass contains the ReLU behind it and that ReLU's quantiser."""
        return self._chain is not None

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        """The float operator."""
        raise NotImplementedError

    def bound(self, x: FixedQuantizer, y: FixedQuantizer, a: Tensor, b: Tensor) -> int:
        """An upper bound of the result's codes on the aligned grid."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Joins two tensors, broadcasting like torch."""
        if exporting():
            return self.leave(self.combine(x, y))
        a, b = self.source(0), self.source(1)
        if a is not None and b is not None and (a.observing or b.observing):
            return self.leave(self.combine(x.float(), y.float()))
        with exact_arithmetic(x):
            if a is None or b is None:
                joined = self.combine(x.double(), y.double())
            elif compiled.compiling() and self.sign and x.shape == y.shape and x.dtype == y.dtype == torch.float32:
                joined = compiled.aligned_sum(x, y, a.frac, b.frac, a.grid.magnitude + b.grid.magnitude, self.sign)
            else:
                # A stage adds half an LSB of its result, which float32 must hold as well.
                carrier = self.carrier(self.bound(a, b, x, y) << self.reaches_relu)
                joined = self.combine(x.to(carrier), y.to(carrier))
        return self.leave(joined)

    def leave(self, y: Tensor) -> Tensor:
        """Applies the output quantiser, and that of a ReLU that has left it to this layer."""
        chain = self._chain
        if chain is None:
            return super().leave(y)
        own, third = chain
        if not stage.available(y):
            return third(own(y))
        grids = stage.Stage(None, None, own.grid, False, third.grid)
        return stage.apply(y, None, None, None, (None, own.frac, third.frac), 0.0, grids)[0]


def aligned_bound(x: FixedQuantizer, y: FixedQuantizer) -> int:
    """Largest sum of two codes after alignment to the finer grid."""
    (coarse_x, fine_x), (coarse_y, fine_y) = _points(x), _points(y)
    finest = max(fine_x, fine_y)
    return (x.grid.magnitude << (finest - coarse_x)) + (y.grid.magnitude << (finest - coarse_y))


def _points(x: FixedQuantizer) -> tuple[int, int]:
    """Fewest and most fractional bits of a quantiser's channels."""
    if not x.per_channel:
        return x.exponent(), x.exponent()
    low, high = torch.aminmax(x.exponents())
    return int(low.item()), int(high.item())


class QuantAdd(QuantJoin):
    """``x + y``, aligned to the finer grid, then quantised."""

    sign = 1

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum."""
        return x + y

    def bound(self, x: FixedQuantizer, y: FixedQuantizer, a: Tensor, b: Tensor) -> int:
        """Of the aligned sum."""
        return aligned_bound(x, y)


class QuantSub(QuantJoin):
    """``x - y``, aligned to the finer grid, then quantised."""

    sign = -1

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        """The difference."""
        return x - y

    def bound(self, x: FixedQuantizer, y: FixedQuantizer, a: Tensor, b: Tensor) -> int:
        """Of the aligned difference."""
        return aligned_bound(x, y)


class QuantMul(QuantJoin):
    """``x * y``, exact, then quantised."""

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        """The product."""
        return x * y

    def bound(self, x: FixedQuantizer, y: FixedQuantizer, a: Tensor, b: Tensor) -> int:
        """Of the product."""
        return x.grid.magnitude * y.grid.magnitude


class QuantMatMul(QuantJoin):
    """``x @ y`` of two variable operands, ``[..., m, k]`` and ``[..., k, n]``, exact, then quantised."""

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        """The matrix product."""
        return torch.matmul(x, y)

    def bound(self, x: FixedQuantizer, y: FixedQuantizer, a: Tensor, b: Tensor) -> int:
        """Of every partial sum over k."""
        return int(a.shape[-1]) * x.grid.magnitude * y.grid.magnitude


class QuantConcat(QuantLayer):
    """Concatenation along an axis, aligned to the finest grid, then quantised.

    Args:
        dim: Axis.
        output: Format of the result, or None for the exact, widened grid.
    """

    def __init__(self, dim: int = 1, output: str | Fixed | FixedQuantizer | None = "fixed<8>"):
        super().__init__(None, output)
        self.dim = dim

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        """Joins tensors that agree on every other axis."""
        return self.leave(torch.cat(list(tensors), self.dim))
