"""`StatisticsQuantizer` (StatsQ): the binary point of weights follows their statistics instead of a gradient.

StatsQ (Liu et al., OFQ, arXiv 2302.02210, section 4.1, equation 7) takes the scale of a row of weights as
``s = 2 * mean|w|``, the range ``[-s, s)`` that the codes of n bits fill: ``2**(n - 1)`` steps of ``s / 2**(n - 1)``. A
learned scale is drawn into the oscillations of the weights near a threshold; a mean hardly notices them.

A deployed grid has a power of two as its step, so s is rounded to the nearest power of two, in the logarithm (from
``sqrt(1/2)`` to ``sqrt(2)`` times the power; the lower end counts): ``frac = n - 1 - log2(s)``. The paper's levels lie
half a step off zero (no code for 0); here they are the format's own, with 0 among them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgemat.errors import FormatError
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.rounding import EXPONENT_LIMIT

_SQRT_HALF = 0.5**0.5


class StatisticsQuantizer(FixedQuantizer):
    """A quantiser of weights with ``frac = width - 1 - round(log2(2 * mean|w|))``, taken anew in every pass.

    `frac` is a buffer, so an optimiser never sees it, and a checkpoint keeps it. Means are taken in float64. Gradients
    of the weights are straight-through, with the scale as a constant. Rows of zeros get the range [-1, 1).

    Args:
        format: A signed format without ``int_bits``, or its text.
        channels: Number of rows with a binary point each, or None for one of all weights.
        axis: The row axis.
        role: ``"weights"``.

    Raises:
        FormatError: for a stated binary point, an unsigned format or another role.
    """

    def __init__(self, format: Any = "fixed<8>", channels: int | None = None, axis: int = 0, role: str = "weights"):
        super().__init__(format, channels=channels, axis=axis, role=role)
        if self.stated or not self.signed or role != "weights":
            raise FormatError(
                f"points by statistics were asked for {format} in role {role!r}, expected a signed format of weights "
                "whose binary point is left open, such as 'fixed<4>'"
            )
        start = self.frac.detach().clone()
        del self.frac
        self.register_buffer("frac", start)
        self.tracks = True  # as for WRAP: the point is set from the weights in every pass, in eval mode, too

    def fit(self, x: Tensor) -> None:
        """Sets the binary point(s) from the mean magnitude of `x`."""
        rows = self._rows(x.detach()) if self.per_channel else x.detach().reshape(1, -1)
        mean = rows.double().abs().mean(1) if rows.shape[1] else rows.new_zeros(len(rows), dtype=torch.float64)
        mantissa, exponent = torch.frexp(2.0 * mean)  # mantissa from 0.5 up to 1, or 0
        nearest = torch.where(mantissa >= _SQRT_HALF, exponent, exponent - 1)
        nearest = torch.where(mean > 0, nearest, 0)
        frac = (self.width - 1 - nearest).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).to(self.frac.dtype)
        self.set_frac(frac if self.per_channel else frac[0])

    def extra_repr(self) -> str:
        """The format, for printing."""
        return super().extra_repr().replace(", learned", ", from statistics")
