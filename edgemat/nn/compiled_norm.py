"""The quantised training batch norms as operators that `torch.compile` takes into its graph whole; see `compiled`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from edgemat.nn import affine
from edgemat.nn.compiled import define, grid_of, setting_of
from edgemat.nn.rounding import QuantizeChannels


def _norm(
    x: Tensor, gamma: Tensor, beta: Tensor, frac: Tensor, eps: float, spec: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, mean, unbiased variance and ``1 / std`` of a quantised training batch norm."""
    mean, var = torch.zeros_like(gamma), torch.ones_like(gamma)
    kept: list[Tensor] = []
    context = SimpleNamespace(needs_input_grad=(True,) * 6, save_for_backward=lambda *tensors: kept.extend(tensors))
    running = mean, var, 1.0, eps
    y = affine.QuantizedBatchNorm.forward(context, x.contiguous(), gamma, beta, running, frac, setting_of(spec, frac))
    return y, mean, var, kept[4]


def _norm_backward(
    g: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, invstd: Tensor, y: Tensor, frac: Tensor,
    eps: float, spec: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    saved = (x.contiguous(), gamma, beta, mean, invstd, y)
    context = SimpleNamespace(
        needs_input_grad=(True,) * 6, saved_tensors=saved, setting=setting_of(spec, frac), eps=eps
    )
    dx, dgamma, dbeta, _, df, _ = affine.QuantizedBatchNorm.backward(context, g)
    assert dx is not None and dgamma is not None and dbeta is not None and df is not None
    # Results of one operator may not share memory.
    return dx, dgamma.clone(), dbeta.clone(), df.to(frac.dtype)


_norm_backward_op = define(
    "norm_backward(Tensor g, Tensor x, Tensor gamma, Tensor beta, Tensor mean, Tensor invstd, Tensor y, Tensor frac,"
    " float eps, int[] spec) -> (Tensor, Tensor, Tensor, Tensor)",
    _norm_backward,
    lambda g, x, gamma, beta, mean, invstd, y, frac, eps, spec: (
        torch.empty_like(x).contiguous(),
        torch.empty_like(gamma),
        torch.empty_like(beta),
        torch.empty_like(frac),
    ),
)


def _keep_norm(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    x, gamma, beta, frac, ctx.eps, ctx.spec = inputs
    y, mean, var, invstd = output
    ctx.save_for_backward(x, gamma, beta, mean, invstd, y, frac)
    ctx.mark_non_differentiable(mean, var, invstd)


norm = define(
    "norm(Tensor x, Tensor gamma, Tensor beta, Tensor frac, float eps, int[] spec) -> (Tensor, Tensor, Tensor, Tensor)",
    _norm,
    lambda x, gamma, beta, frac, eps, spec: (
        torch.empty_like(x).contiguous(),
        torch.empty_like(gamma),
        torch.empty_like(gamma),
        torch.empty_like(gamma),
    ),
    lambda ctx, g, *_: (*_norm_backward_op(g, *ctx.saved_tensors, ctx.eps, ctx.spec), None, None),
    _keep_norm,
)


def _norm_affine(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    points: Tensor,
    frac: Tensor,
    eps: float,
    spec: list[int],
    factors: list[int],
) -> tuple[Tensor, ...]:
    """Values, rounded factor, offset, ``1 / std``, mean and unbiased variance of a batch norm kept as an affine."""
    running = torch.zeros_like(gamma), torch.ones_like(gamma), 1.0, eps
    grid = grid_of(*factors[:4])
    setting = setting_of(spec, frac)
    with torch.enable_grad():
        given = x.detach().contiguous().requires_grad_()
        y = affine.norm_affine(given, gamma, beta, points, frac, running, (setting, grid))
    if y is not None:
        _, _, _, y, a, b, invstd, mean = y.grad_fn.saved_tensors  # type: ignore[union-attr]
        return y, a.clone(), b.clone(), invstd.clone(), mean, running[1]
    var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
    invstd = torch.rsqrt(var + eps)
    real = invstd * gamma
    b = torch.addcmul(beta, mean, real, value=-1.0)
    wide = points.expand(gamma.numel()).contiguous()
    a = QuantizeChannels.apply(real, wide, grid, wide, 0, False, None)
    scale = 2.0 ** setting[1]
    y = affine._quantize_(affine._affine(x.contiguous(), a * scale, b * scale + 0.5), *setting)
    count = x.numel() // gamma.numel()
    return y, a, b, invstd, mean, var * (count / (count - 1))


def _norm_affine_backward(
    g: Tensor,
    x: Tensor,
    gamma: Tensor,
    points: Tensor,
    kept: list[Tensor],
    frac: Tensor,
    spec: list[int],
    factors: list[int],
) -> tuple[Tensor, ...]:
    saved = (x.contiguous(), gamma, points, *kept)
    context = SimpleNamespace(saved_tensors=saved, setting=setting_of(spec, frac), factors=grid_of(*factors[:4]))
    found = affine.NormAffine.backward(context, g)[:5]
    return tuple(t.clone() for t in found)  # type: ignore[union-attr]


_norm_affine_backward_op = define(
    "norm_affine_backward(Tensor g, Tensor x, Tensor gamma, Tensor points, Tensor[] kept, Tensor frac, int[] spec,"
    " int[] factors) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _norm_affine_backward,
    lambda g, x, gamma, points, kept, frac, spec, factors: (
        torch.empty_like(x).contiguous(),
        torch.empty_like(gamma),
        torch.empty_like(gamma),
        torch.empty_like(points),
        torch.empty_like(frac),
    ),
)


def _keep_norm_affine(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    x, gamma, _, points, frac, _, ctx.spec, ctx.factors = inputs
    ctx.save_for_backward(x, gamma, points, frac, *output[:5])
    ctx.mark_non_differentiable(*output[1:])


def _norm_affine_gradients(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, gamma, points, frac, *kept = ctx.saved_tensors
    return (*_norm_affine_backward_op(g, x, gamma, points, kept, frac, ctx.spec, ctx.factors), None, None, None)


norm_affine = define(
    "norm_affine(Tensor x, Tensor gamma, Tensor beta, Tensor points, Tensor frac, float eps, int[] spec, int[] factors)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _norm_affine,
    lambda x, gamma, beta, points, frac, eps, spec, factors: (
        torch.empty_like(x).contiguous(),
        *(torch.empty_like(gamma) for _ in range(5)),
    ),
    _norm_affine_gradients,
    _keep_norm_affine,
)


def move_statistics(module: Any, mean: Tensor, var: Tensor) -> None:
    """Counts a batch and moves the running statistics of a compiled batch norm."""
    with torch.no_grad():
        module.num_batches_tracked.add_(1)
        momentum = module.momentum
        weight = momentum if momentum is not None else 1.0 / module.num_batches_tracked.to(mean.dtype)
        module.running_mean.lerp_(mean, weight)
        module.running_var.lerp_(var, weight)
