"""A stage of a training step in single native passes: a layer's sums through every quantiser up to the next layer.

``sums -> Q1 -> a * q + b with the statistics of the batch -> Q2 -> ReLU -> Q3``, where Q1, the rounding of a, and ReLU
with Q3 may be missing. Nothing but the sums is kept for the backward pass, which computes the rest anew. The passes
walk both memory layouts, contiguous and channels last; for `torch.compile` the stage is one operator that takes the
layout the compiler has chosen.

Gradients are those of the quantisers (`rounding`) and of batch norm. With ``h`` the gradient of the affine's result and
``S1 = sum h``, ``S2 = sum h * (q - mean)`` by channel, those of the real factor and of beta are ``S2 + mean * S1`` and
``S1``; the binary points need ``<h, z> = sum_c a (S2 + mean S1) + b S1`` and the products that the passes sum.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgemat.errors import FormatError
from edgemat.nn import native
from edgemat.nn.compiled import compiling, quantize
from edgemat.nn.emission import exporting
from edgemat.nn.layer import Link
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.rounding import EXPONENT_LIMIT, Grid

_NUMBERS, _SUMS, _WIDE = 6, 4, 64  # as in native/stage.c
_ABOVE_HALF = float(np.nextafter(np.float32(0.5), np.float32(1.0)))
_ABSENT = [0, 0, 0, 0]


@dataclass(frozen=True)
class Stage:
    """The grids of a stage.

    Attributes:
        first: Of the sums, or None where they are taken as they are.
        factor: Of the affine's factor, or None where it is not rounded.
        result: Of the affine's result.
        relu: Whether a ReLU is part of the result's rounding.
        third: Behind a ReLU of its own, or None.
    """

    first: Grid | None
    factor: Grid | None
    result: Grid
    relu: bool
    third: Grid | None

    def flat(self) -> list[int]:
        """As integers, which operators can take."""
        grids = (self.first, self.factor, self.result, self.third)
        return [int(self.relu), *(n for grid in grids for n in (_ABSENT if grid is None else grid.numbers()))]

    @classmethod
    def read(cls, flat: Sequence[int]) -> Stage:
        """The stage that `flat` wrote."""
        first, factor, result, third = (
            Grid.from_numbers(*flat[i : i + 4]) if flat[i] else None for i in range(1, len(flat), len(_ABSENT))
        )
        assert result is not None
        return cls(first, factor, result, bool(flat[0]), third)


class _Passes(ctypes.Structure):
    """`EdgematStage` of native/stage.c."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("batch", "channels", "size")]
        + [(name, ctypes.c_int32) for name in ("last", "threads", "first", "third", "plain")]
        + [("points", ctypes.c_int64)]
        + [(name, ctypes.c_float) for name in ("a_low", "a_high", "twice1", "step1", "low1", "high1")]
        + [(name, ctypes.c_float) for name in ("scale2", "step2", "low2", "high2", "bottom2", "top2")]
        + [(name, ctypes.c_float) for name in ("scale3", "step3", "high3", "bottom3", "top3")]
    )


def available(x: Tensor) -> bool:
    """Whether a stage can take `x`: more than one float32 by channel, in main memory with the native passes at hand."""
    plain = x.dtype == torch.float32 and x.dim() >= 2 and x.numel() > x.shape[1]
    return plain and (compiling() or (x.is_cpu and at_hand()))


@torch.compiler.assume_constant_result
def at_hand() -> bool:
    """Whether the native passes are there."""
    return native.load() is not None


def _exponent(frac: Tensor) -> int:
    value = float(frac)
    if not -EXPONENT_LIMIT <= value <= EXPONENT_LIMIT:
        raise FormatError(
            f"a quantiser learned {value} fractional bits, expected within +-{EXPONENT_LIMIT}; lower the learning rate "
            "of the binary points"
        )
    return round(value)


def _passes(
    x: Tensor, stage: Stage, fracs: Sequence[Tensor | None], gamma: Tensor | None, points: Tensor | None
) -> tuple[Any, Any]:
    """The settings of the native passes over `x`, and their room to work in."""
    first, result, third = (None if f is None else _exponent(f) for f in fracs)
    assert result is not None
    channels, count = x.shape[1], x.numel() // x.shape[1]
    threads = torch.get_num_threads() if x.numel() > 1 << 15 else 1
    high = stage.result.high
    found = _Passes(x.shape[0], channels, count // x.shape[0], not x.is_contiguous(), threads)
    found.plain = gamma is None
    if first is not None and stage.first is not None:
        found.first, found.low1, found.high1 = 1, stage.first.low, stage.first.high
        found.twice1, found.step1 = math.ldexp(2.0, first), math.ldexp(1.0, -first)
    if points is not None and stage.factor is not None:
        found.points, found.a_low, found.a_high = points.numel(), stage.factor.low, stage.factor.high
    found.scale2, found.step2 = math.ldexp(1.0, result), math.ldexp(1.0, -result)
    found.low2, found.high2, found.top2 = max(stage.result.low, 0) if stage.relu else stage.result.low, high, high + 1
    # A ReLU gives nothing to what is 0 or less before rounding.
    found.bottom2 = _ABOVE_HALF if stage.relu else found.low2
    if third is not None and stage.third is not None:
        found.third, found.high3, found.bottom3 = 1, stage.third.high, 1.0
        found.scale3, found.step3 = math.ldexp(1.0, third), math.ldexp(1.0, -third)
        # The smallest code of the result that saturates behind the ReLU, if there is one.
        top = math.ceil(math.ldexp(stage.third.high + 0.5, result - third))
        found.top3 = top if top <= high else math.inf
    floats = (2 * _NUMBERS + threads * _SUMS) * max(channels, _WIDE)
    return found, ctypes.create_string_buffer(8 * (threads + 1) * _SUMS * channels + 4 * floats + 8)


def _laid(x: Tensor) -> Tensor:
    """`x` in one of the two layouts that the passes walk."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if last else x.contiguous()


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]


def forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    points: Tensor | None,
    fracs: Sequence[Tensor | None],
    eps: float,
    stage: Stage,
) -> tuple[Tensor, Tensor]:
    """Values, and five numbers by channel: mean, unbiased variance, ``1 / std``, a and b.

    Args:
        x: The sums, ``[batch, channels, ...]``.
        gamma: Weights of the norm; None where there is none, and the affine is the identity.
        beta: Biases of the norm, or None.
        points: Fractional bits of the factor, one or one per channel; None where it is not rounded.
        fracs: Fractional bits of Q1, Q2 and Q3; None where there is none.
        eps: Added to the variance.
        stage: The grids.

    Raises:
        FormatError: if a binary point is out of range.
    """
    x = _laid(x.detach())
    passes, room = _passes(x, stage, fracs, gamma, points)
    y, numbers = torch.empty_like(x), torch.empty(5, x.shape[1])
    places = _pointers(y, numbers, x, gamma, beta, points)
    if not _library().edgemat_stage_forward(ctypes.addressof(passes), *places, eps, ctypes.addressof(room)):
        assert points is not None
        raise FormatError(
            f"fractional bits from {points.min():g} to {points.max():g} were learned, expected within "
            f"+-{EXPONENT_LIMIT}; lower the learning rate of the binary points"
        )
    return y, numbers


def backward(
    g: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    points: Tensor | None,
    numbers: Tensor,
    fracs: Sequence[Tensor | None],
    stage: Stage,
) -> tuple[Tensor, Tensor]:
    """Gradients of the sums, and behind each other those of gamma, beta, the factor's points by channel, Q1, Q2, Q3.

    Args:
        g: Gradient of the values.
        x: The sums.
        gamma: Weights of the norm, or None.
        points: Fractional bits of the factor.
        numbers: What `forward` gave by channel.
        fracs: Fractional bits of Q1, Q2 and Q3.
        stage: The grids.
    """
    x = _laid(x)
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    g = g.to(torch.float32).contiguous(memory_format=layout)
    passes, room = _passes(x, stage, fracs, gamma, points)
    dx, found = torch.empty_like(x), torch.empty(3 * x.shape[1] + 3)
    places = _pointers(dx, found, g, x, gamma, points, numbers)
    _library().edgemat_stage_backward(ctypes.addressof(passes), *places, ctypes.addressof(room))
    return dx, found


def _library() -> ctypes.CDLL:
    library = native.load()
    assert library is not None, "a stage runs natively only"
    return library


def split(
    flat: Tensor, gamma: Tensor | None, points: Tensor | None, fracs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of gamma, beta, points and the three binary points from what `backward` gave."""
    channels = flat.numel() // 3 - 1
    dpoints = None
    if points is not None:
        dpoints = flat[2 * channels : 3 * channels]
        dpoints = dpoints if points.dim() else dpoints.sum()
    tail = [None if f is None else flat[3 * channels + i].reshape(f.shape) for i, f in enumerate(fracs)]
    affine = [None, None] if gamma is None else [flat[:channels], flat[channels : 2 * channels]]
    return [*affine, dpoints, *tail]


def plain(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    points: Tensor | None,
    fracs: Sequence[Tensor | None],
    eps: float,
    stage: Stage,
) -> tuple[Tensor, Tensor, Tensor]:
    """`apply` in plain operations, differentiable as often as wanted: for compilers, and for second derivatives."""
    first, result, third = fracs
    assert result is not None
    q = x if first is None or stage.first is None else quantize(x, first, stage.first)
    if gamma is None or beta is None:
        y = quantize(q, result, stage.result, stage.relu)
        y = y if third is None or stage.third is None else quantize(y, third, stage.third, True)
        return y, x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
    var, mean = torch.var_mean(q, [d for d in range(x.dim()) if d != 1], correction=0)
    real = torch.rsqrt(var + eps) * gamma
    a = real
    if points is not None and stage.factor is not None:
        a = quantize(real, points, stage.factor, axis=0 if points.dim() else None)
    shape = [1, -1] + [1] * (x.dim() - 2)
    y = quantize(q * a.view(shape) + (beta - mean * real).view(shape), result, stage.result, stage.relu)
    if third is not None and stage.third is not None:
        y = quantize(y, third, stage.third, True)
    count = x.numel() // x.shape[1]
    return y, mean.detach(), var.detach() * (count / max(count - 1, 1))


class StagePass(torch.autograd.Function):
    """A stage in eager training; arguments as in `forward`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        points, first, second, third, ctx.eps, ctx.stage = rest
        y, numbers = forward(x, gamma, beta, points, (first, second, third), ctx.eps, ctx.stage)
        ctx.save_for_backward(x, gamma, beta, points, numbers, first, second, third)
        ctx.mark_non_differentiable(numbers)
        return y, numbers

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, points, numbers, *fracs = ctx.saved_tensors
        if torch.is_grad_enabled():
            y = plain(x, gamma, beta, points, fracs, ctx.eps, ctx.stage)[0]
            given = [x, gamma, beta, points, *fracs]
            asked = [i for i, t in enumerate(given) if t is not None and ctx.needs_input_grad[i]]
            found: list[Tensor | None] = [None] * (len(given) + 2)
            for i, part in zip(
                asked, torch.autograd.grad(y, [given[i] for i in asked], grads[0], create_graph=True), strict=True
            ):
                found[i] = part
            return tuple(found)
        dx, flat = backward(grads[0], x, gamma, points, numbers, fracs, ctx.stage)
        return dx, *split(flat, gamma, points, fracs), None, None


# -- for torch.compile --------------------------------------------------------------------------------------------
_LIBRARY = torch.library.Library("edgemat", "FRAGMENT")
_NAMES = "Tensor? points, Tensor? first, Tensor second, Tensor? third"


def _define(schema: str, run: Any, fake: Any) -> Any:
    """An operator that takes its inputs in any memory layout."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.flexible_layout,))
    _LIBRARY.impl(name, run, "CPU")
    torch.library.register_fake(f"edgemat::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.edgemat, name)


_backward = _define(
    f"stage_backward(Tensor g, Tensor x, Tensor? gamma, Tensor numbers, {_NAMES}, int[] spec) -> (Tensor, Tensor)",
    lambda g, x, gamma, numbers, points, first, second, third, spec: backward(
        g, x, gamma, points, numbers, (first, second, third), Stage.read(spec)
    ),
    lambda g, x, *rest: (torch.empty_like(x), x.new_empty(3 * x.shape[1] + 3)),
)


def _gradients(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, gamma, points, numbers, *fracs = ctx.saved_tensors
    dx, flat = _backward(g, x, gamma, numbers, points, *fracs, ctx.spec)
    return dx, *split(flat, gamma, points, fracs), None, None


def _keep(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    x, gamma, _, points, first, second, third, _, ctx.spec = inputs
    ctx.save_for_backward(x, gamma, points, output[1], first, second, third)
    ctx.mark_non_differentiable(output[1])


_compiled = _define(
    f"stage(Tensor x, Tensor? gamma, Tensor? beta, {_NAMES}, float eps, int[] spec) -> (Tensor, Tensor)",
    lambda x, gamma, beta, points, first, second, third, eps, spec: forward(
        x, gamma, beta, points, (first, second, third), eps, Stage.read(spec)
    ),
    lambda x, *rest: (torch.empty_like(x), x.new_empty(5, x.shape[1])),
)
torch.library.register_autograd("edgemat::stage", _gradients, setup_context=_keep, lib=_LIBRARY)


def apply(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    points: Tensor | None,
    fracs: Sequence[Tensor | None],
    eps: float,
    stage: Stage,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values of a stage (arguments as in `forward`), the mean and the unbiased variance of the batch."""
    if compiling() and not (x.is_cpu and at_hand()):
        return plain(x, gamma, beta, points, fracs, eps, stage)
    if compiling():
        y, numbers = _compiled(x, gamma, beta, points, *fracs, eps, stage.flat())
    else:
        y, numbers = StagePass.apply(x, gamma, beta, points, *fracs, eps, stage)
    return y, numbers[0], numbers[1]


# -- which layers join one ----------------------------------------------------------------------------------------
def possible() -> bool:
    """Whether a step that keeps gradients may go through a stage, as far as is known without its tensors."""
    return torch.is_grad_enabled() and not exporting() and (compiling() or at_hand())


def joining(link: Link) -> FixedQuantizer | None:
    """The output quantiser of a linked layer, if there is one and a stage can contain it."""
    quantizer = link.modules[0].output_quantizer if link.modules else None  # type: ignore[union-attr]
    return quantizer if type(quantizer) is FixedQuantizer and quantizer.takes_affine else None
