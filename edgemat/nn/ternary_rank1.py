"""`Rank1Quantizer`: OneBit's weights, the sign of W with a vector of scales at either end (arXiv 2402.11295).

``W`` becomes ``sign(W) * h[o] * g[i]``: the layer multiplies its inputs by g, adds and subtracts, and multiplies the
sums by h (equation 3 there). Both vectors are learned; they start as the rank-1 approximation of ``|W|`` by its largest
singular value (proposition 1 there: that approximation of ``|W|`` is as good as one of W with those signs).

Deployed, both vectors are powers of two, the nearest in the logarithm: h shifts the finished sums, g the inputs. The
inputs' shifts span at most `SPREAD` bits (smaller factors of g become the smallest of those), so that the sums grow by
no more.

Gradients pass to W as they are, and to g and h as if they were not rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgemat.errors import FormatError
from edgemat.formats import BIPOLAR, Fixed
from edgemat.nn.rounding import Grid
from edgemat.nn.ternary_quantizer import Scales, TernaryQuantizer, nearest_power
from edgemat.recipe import TERNARY

SPREAD = 7
"""Largest difference, in bits, between the deployed factors of two inputs."""


class _Rank1(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, g: Tensor, quantizer: Rank1Quantizer) -> Tensor:
        signs, rows, columns = quantizer.factors(x)
        ctx.save_for_backward(signs, rows, columns, h.sign(), g.sign())
        return signs * rows * columns

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        signs, rows, columns, h, g = ctx.saved_tensors
        signed = grads[0] * signs
        dh = (signed * columns).flatten(1).sum(1) * h
        dg = (signed * rows).transpose(0, 1).flatten(1).sum(1) * g
        return grads[0], dh, dg, None


class Rank1Quantizer(TernaryQuantizer):
    """Rounds weights ``[O, I, ...]`` to signs with a learned factor per output and per input.

    Attributes:
        output_scale: h, shape ``[O]``, positive.
        input_scale: g, shape ``[I]``, positive.

    Args:
        shape: Shape of the weights.
        axis: The axis of the outputs, 0.
        scale: ``"power_of_two"`` or ``"free"``.
        label: What a message calls the layer.

    Raises:
        FormatError: for another scale, or a transposed convolution.
    """

    def __init__(self, shape: Sequence[int], axis: int = 0, scale: str = "power_of_two", label: str = "a layer"):
        if axis != 0 or len(shape) < 2:
            raise FormatError(f"{label} has ternary='onebit', expected weights [outputs, inputs, ...]; use 'binary'")
        super().__init__("onebit", scale, int(shape[0]), 0)
        self.output_scale = nn.Parameter(torch.ones(shape[0]))
        self.input_scale = nn.Parameter(torch.ones(shape[1]))
        self.register_buffer("shifts", torch.zeros(shape[1]))
        self.register_buffer("started", torch.tensor(False))

    def deploy(self, scale: str) -> None:
        """Sets what is deployed: ``"power_of_two"``, or ``"free"`` for nothing.

        Raises:
            FormatError: for another text.
        """
        super().deploy(scale)
        if self.factor is not None:
            raise FormatError(f"onebit weights with scale {scale!r} were asked for, expected 'power_of_two' or 'free'")

    def _grid(self) -> Grid:
        return Grid.of(Fixed(SPREAD + 2, None, True, "RND", "SAT_SYM"))

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Sets both vectors to the rank-1 approximation of ``|x|`` (its mean over a kernel's taps)."""
        magnitude = x.detach().abs().double().flatten(2).mean(2) if x.dim() > 2 else x.detach().abs().double()
        left, value, right = torch.linalg.svd(magnitude, full_matrices=False)
        root = value[0].sqrt()
        self.output_scale.copy_(left[:, 0].abs() * root)
        self.input_scale.copy_(right[0].abs() * root)
        self.started.fill_(True)

    def fit(self, x: Tensor) -> None:
        """Starts the vectors from the weights where that was not done."""
        if not bool(self.started):
            self.start(x)

    def settle_vectors(self) -> None:
        """Sets the deployed powers of two, unless they are held."""
        if self._held:
            return
        powers = nearest_power(self.input_scale.detach().abs())
        powers = powers.clamp_min(int(powers.max()) - SPREAD)
        self.shifts.copy_(powers - powers.min())
        self.frac.copy_(-nearest_power(self.output_scale.detach().abs()) - powers.min())

    @torch.no_grad()
    def factors(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Signs, and both vectors as used, laid along the axes of `x`; float32."""
        self.fit(x)
        self.settle_vectors()
        signs = torch.where(x >= 0, 1.0, -1.0)
        rows, columns = torch.ldexp(torch.ones_like(self.frac), -self.frac), torch.exp2(self.shifts)
        if self.free or (self.training and self.blend < 1.0):
            blend = 0.0 if self.free else self.blend
            real = self.output_scale.abs(), self.input_scale.abs()
            rows, columns = (r ** (1.0 - blend) * d**blend for r, d in zip(real, (rows, columns), strict=True))
        tail = [1] * (x.dim() - 2)
        return signs, rows.float().view(-1, 1, *tail), columns.float().view(1, -1, *tail)

    def forward(self, x: Tensor) -> Tensor:
        """Quantises weights ``[O, I, ...]``; float32."""
        return _Rank1.apply(x if x.dtype == torch.float32 else x.float(), self.output_scale, self.input_scale, self)

    @property
    def scales(self) -> Scales:
        """Powers of two in front of the inputs and behind the sums."""
        before = torch.ldexp(torch.ones_like(self.shifts), self.shifts).to(torch.int64)
        behind = torch.ones_like(self.frac).to(torch.int64), TERNARY.with_frac(self.exponents().tolist())
        return Scales(BIPOLAR, behind, (before, Fixed(SPREAD + 2, SPREAD + 2)), khot=1)
