"""The per-channel affine of a training batch norm, alone or together with the quantiser behind it.

``z = a * x + b`` where a and b contain the mean and the variance of x itself. Its gradient, through the statistics too,
is batch norm's own, so torch's fused kernel computes it: that kernel's gradient of its weight is ``sum g (x - mean) /
std`` and of its bias ``sum g``; those of a and b follow. The same sums give the larger part of the gradient of a binary
point: ``<inside, z> = sum_c a_c <inside, x>_c + b_c sum inside_c``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from edgemat.nn import native
from edgemat.nn.rounding import LN2, Grid, open_interval

_SHIFTED = 2


def _affine(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a * x + b`` by the transform of torch's batch norm, twice as fast as a broadcast addcmul."""
    zero = torch.zeros_like(a)
    return torch.native_batch_norm(x, a, b, zero, torch.ones_like(a), False, 0.0, 0.0)[0]


def _norm_gradients(
    g: Tensor, x: Tensor, a: Tensor, mean: Tensor, invstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of gamma and of beta, where ``a = gamma * invstd``."""
    return torch.ops.aten.native_batch_norm_backward(
        g, x, a / invstd, None, None, mean, invstd, True, eps, [True, True, True]
    )


class BatchAffine(torch.autograd.Function):
    """``a * x + b`` per channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, a, mean, var)
        ctx.eps = eps
        return _affine(x, a, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, mean, var = ctx.saved_tensors
        invstd = torch.rsqrt(var + ctx.eps)
        dx, dgamma, dbeta = _norm_gradients(grads[0], x, a, mean, invstd, ctx.eps)
        return dx, dgamma / invstd + mean * dbeta, dbeta, None, None, None


def _quantize_(shifted: Tensor, grid: Grid, exponent: int, relu: bool) -> Tensor:
    """Floor, saturate and scale back values in LSBs that one half was added to, in place."""
    low = max(grid.low, 0) if relu else grid.low
    passes = native.kernel(shifted)
    if passes is not None:
        step, threads = math.ldexp(1.0, -exponent), torch.get_num_threads()
        at = shifted.data_ptr()
        passes.edgemat_quantize(at, at, shifted.numel(), 1.0, step, low, grid.high, _SHIFTED, threads)
        return shifted
    return shifted.floor_().clamp_(low, grid.high).mul_(math.ldexp(1.0, -exponent))


def _inside_(g: Tensor, z: Tensor, grid: Grid, exponent: int, relu: bool) -> Tensor:
    """The gradient where `z` is in range, else 0; overwrites `z`."""
    low, high = open_interval(grid, exponent, relu, False)
    return torch.ops.aten.hardtanh_backward.grad_input(g, z, low, high, grad_input=z)


def _point_gradient(a: Tensor, b: Tensor, da: Tensor, db: Tensor, g: Tensor, y: Tensor) -> Tensor:
    """The gradient of the binary point, from the sums that batch norm's gradient leaves."""
    return LN2 * (torch.dot(a, da) + torch.dot(b, db) - torch.dot(g.reshape(-1), y.reshape(-1)))


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Batch, channels and the rest."""
    return x.shape[0], x.shape[1], x.numel() // max(x.shape[0] * x.shape[1], 1)


def batch_mean(x: Tensor) -> Tensor:
    """Mean per channel (axis 1) as torch's batch norm takes it: a float32 sum, divided."""
    axes = [d for d in range(x.dim()) if d != 1]
    return x.sum(axes) / (x.numel() // x.shape[1])


def batch_statistics(x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the batch per channel (axis 1); updates the running ones."""
    passes = native.kernel(x, running_mean, running_var)
    if passes is None:
        return torch.batch_norm_update_stats(x, running_mean, running_var, momentum)
    mean = batch_mean(x)
    var = torch.empty_like(mean)
    pointers = (t.data_ptr() for t in (var, running_mean, running_var, x, mean))
    passes.edgemat_statistics(*pointers, *_sizes(x), momentum, torch.get_num_threads())
    torch.autograd.graph.increment_version([running_mean, running_var])
    return mean, var


def _native_gradients(
    g: Tensor, x: Tensor, y: Tensor, a: Tensor, b: Tensor, mean: Tensor, invstd: Tensor, setting: Any
) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """Gradients of x, gamma and beta, and ``<g, y>``, in one native call; None where eager torch must do it."""
    passes = None if torch.is_grad_enabled() else native.kernel(g, x, y, a, b, mean, invstd)
    if passes is None:
        return None
    dx, dgamma, dbeta = torch.empty_like(x), torch.empty_like(a), torch.empty_like(a)
    low, high = open_interval(*setting, False)
    pointers = (t.data_ptr() for t in (dx, dgamma, dbeta, g, x, y, a, b, mean, invstd))
    values = passes.edgemat_affine_backward(*pointers, *_sizes(x), low, high, torch.get_num_threads())
    return dx, dgamma, dbeta, values


class QuantizedBatchAffine(torch.autograd.Function):
    """`BatchAffine` rounded half up and saturated to one binary point, without keeping the affine's result.

    Batch statistics are real numbers, so the affine is known to the carrier's precision only; the constant one half of
    the rounding joins b.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, statistics: tuple[Tensor, Tensor, float], frac: Tensor, setting: Any
    ) -> Tensor:
        mean, var, eps = statistics
        grid, exponent, relu = setting
        scale = math.ldexp(1.0, exponent)
        a_scaled, b_scaled = a * scale, b * scale + 0.5
        passes = native.kernel(x, a_scaled, b_scaled)
        if passes is not None:
            y, low = torch.empty_like(x), max(grid.low, 0) if relu else grid.low
            pointers = (t.data_ptr() for t in (y, x, a_scaled, b_scaled))
            passes.edgemat_affine(*pointers, *_sizes(x), 1.0 / scale, low, grid.high, torch.get_num_threads())
        else:
            y = _quantize_(_affine(x, a_scaled, b_scaled), grid, exponent, relu)
        ctx.setting, ctx.eps = setting, eps
        ctx.save_for_backward(x, a, b, mean, torch.rsqrt(var + eps), y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, mean, invstd, y = ctx.saved_tensors
        g = grads[0].to(x.dtype).contiguous()
        found = _native_gradients(g, x, y, a, b, mean, invstd, ctx.setting)
        if found is not None:
            dx, dgamma, db, values = found
            da = torch.addcmul(dgamma / invstd, mean, db)
            df = LN2 * (torch.dot(a, da) + torch.dot(b, db) - values) if ctx.needs_input_grad[4] else None
            return dx, da, db, None, df, None
        inside = _inside_(g, _affine(x, a, b), *ctx.setting)
        dx, dgamma, db = _norm_gradients(inside, x, a, mean, invstd, ctx.eps)
        da = dgamma / invstd + mean * db
        df = _point_gradient(a, b, da, db, g, y) if ctx.needs_input_grad[4] else None
        return dx, da, db, None, df, None


class QuantizedBatchNorm(torch.autograd.Function):
    """A training batch norm rounded half up and saturated to one binary point, in torch's one call for batch norm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, running: tuple[Any, ...], frac: Tensor, setting: Any
    ) -> Tensor:
        running_mean, running_var, momentum, eps = running
        grid, exponent, relu = setting
        scale = math.ldexp(1.0, exponent)
        shifted, mean, invstd = torch.native_batch_norm(
            x, gamma * scale, beta * scale + 0.5, running_mean, running_var, True, momentum, eps
        )
        y = _quantize_(shifted, grid, exponent, relu)
        ctx.setting, ctx.eps = setting, eps
        ctx.save_for_backward(x, gamma, beta, mean, invstd, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, mean, invstd, y = ctx.saved_tensors
        g = grads[0].to(x.dtype).contiguous()
        a = gamma * invstd
        b = torch.addcmul(beta, a, mean, value=-1.0)
        inside = _inside_(g, _affine(x, a, b), *ctx.setting)
        dx, dgamma, dbeta = _norm_gradients(inside, x, a, mean, invstd, ctx.eps)
        df = None
        if ctx.needs_input_grad[4]:
            # <inside, z> with z = gamma * (x - mean) * invstd + beta.
            df = _point_gradient(gamma, beta, dgamma, dbeta, g, y)
        return dx, dgamma, dbeta, None, df, None
