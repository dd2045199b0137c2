"""The quantisers as operators that `torch.compile` takes into its graph whole: tracing their Python would break it.

Each operator runs the same code as the eager layers (natively where possible) and hides what a tracer cannot follow:
the numbers read from binary points. So a compiled step has the bits of an eager one, up to the running statistics of
batch norms, which the compiler's own code updates. A layer with exact sums is compiled for the carrier that its widths
prove; if a bias ever pushes a sum beyond it, the operator refuses instead of rounding.
"""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from edgemat.errors import FormatError
from edgemat.formats import OVERFLOWS, ROUNDINGS, Fixed
from edgemat.nn import affine
from edgemat.nn.rounding import (
    EXPONENT_LIMIT,
    Grid,
    QuantizeChannels,
    QuantizeTensor,
    channel_factors,
    round_doubled_,
    rows_gradients,
)
from edgemat.nn.rounding import quantize_rows as native_rows


def compiling() -> bool:
    """Whether `torch.compile` is tracing; `torch.export`, which leads to ONNX, does not count."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


_LIBRARY = torch.library.Library("edgemat", "DEF")


def specification(grid: Grid, relu: bool = False) -> list[int]:
    """A grid and its ReLU as integers, which operators can take."""
    return [grid.width, int(grid.signed), ROUNDINGS.index(grid.rounding), OVERFLOWS.index(grid.overflow), int(relu)]


@lru_cache(maxsize=1024)
def _grid(width: int, signed: int, rounding: int, overflow: int) -> Grid:
    return Grid.of(Fixed(width, None, bool(signed), ROUNDINGS[rounding], OVERFLOWS[overflow]))


def _setting(spec: list[int], frac: Tensor) -> tuple[Grid, int, bool]:
    value = float(frac)
    if not -EXPONENT_LIMIT <= value <= EXPONENT_LIMIT:
        raise FormatError(
            f"a quantiser learned {value} fractional bits, expected within +-{EXPONENT_LIMIT}; lower the learning rate "
            "of the binary points"
        )
    return _grid(*spec[:4]), round(value), bool(spec[4])


def _define(schema: str, run: Any, fake: Any, backward: Any = None, keep: Any = None) -> Any:
    """Registers an operator; `backward` and `keep` (setup_context) make it differentiable."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"edgemat::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"edgemat::{name}", backward, setup_context=keep, lib=_LIBRARY)
    return getattr(torch.ops.edgemat, name)


# -- one tensor ---------------------------------------------------------------------------------------------------
def _quantize(x: Tensor, frac: Tensor, spec: list[int]) -> Tensor:
    context = SimpleNamespace(needs_input_grad=(True, True), save_for_backward=lambda *tensors: None)
    return QuantizeTensor.forward(context, x.contiguous(), frac, *_setting(spec, frac))


def _quantize_backward(g: Tensor, x: Tensor, y: Tensor, frac: Tensor, spec: list[int]) -> tuple[Tensor, Tensor]:
    saved = (x.contiguous(), y.contiguous())
    context = SimpleNamespace(needs_input_grad=(True, True), saved_tensors=saved, setting=_setting(spec, frac))
    dx, df = QuantizeTensor.backward(context, g)[:2]
    return dx, torch.zeros_like(frac) if df is None else df.to(frac.dtype)  # type: ignore[return-value, union-attr]


def _carried(x: Tensor, spec: list[int]) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32 if spec[0] <= 24 else torch.float64).contiguous()


_quantize_backward_op = _define(
    "quantize_backward(Tensor g, Tensor x, Tensor y, Tensor frac, int[] spec) -> (Tensor, Tensor)",
    _quantize_backward,
    lambda g, x, y, frac, spec: (torch.empty_like(x).contiguous(), torch.empty_like(frac)),
)


def _keep_quantize(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, frac, ctx.spec = inputs
    ctx.save_for_backward(x, output, frac)


quantize_tensor = _define(
    "quantize(Tensor x, Tensor frac, int[] spec) -> Tensor",
    _quantize,
    lambda x, frac, spec: _carried(x, spec),
    lambda ctx, g: (*_quantize_backward_op(g, *ctx.saved_tensors, ctx.spec), None),
    _keep_quantize,
)


# -- channels -----------------------------------------------------------------------------------------------------
def _channels(x: Tensor, frac: Tensor, spec: list[int], axis: int) -> Tensor:
    grid, relu = _grid(*spec[:4]), bool(spec[4])
    return QuantizeChannels.apply(x.detach(), frac.detach(), grid, frac.detach(), axis, relu, None)


def _channels_backward(g: Tensor, x: Tensor, frac: Tensor, spec: list[int], axis: int) -> tuple[Tensor, Tensor]:
    grid, relu = _grid(*spec[:4]), bool(spec[4])
    with torch.enable_grad():
        given, points = x.detach().requires_grad_(), frac.detach().requires_grad_()
        y = QuantizeChannels.apply(given, points, grid, points, axis, relu, None)
    dx, df = torch.autograd.grad(y, (given, points), g.to(y.dtype), allow_unused=True)
    return dx.contiguous(), torch.zeros_like(frac) if df is None else df


_channels_backward_op = _define(
    "channels_backward(Tensor g, Tensor x, Tensor frac, int[] spec, int axis) -> (Tensor, Tensor)",
    _channels_backward,
    lambda g, x, frac, spec, axis: (torch.empty_like(x).contiguous(), torch.empty_like(frac)),
)


def _keep_channels(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, frac, ctx.spec, ctx.axis = inputs
    ctx.save_for_backward(x, frac)


quantize_channels = _define(
    "channels(Tensor x, Tensor frac, int[] spec, int axis) -> Tensor",
    lambda x, frac, spec, axis: _channels(x, frac, spec, axis).contiguous(),
    lambda x, frac, spec, axis: _carried(x, spec),
    lambda ctx, g: (*_channels_backward_op(g, *ctx.saved_tensors, ctx.spec, ctx.axis), None, None),
    _keep_channels,
)


# -- weights ------------------------------------------------------------------------------------------------------
def _rows(
    x: Tensor, frac: Tensor, gamma: Tensor | None, var: Tensor | None, eps: float, grid: Grid
) -> tuple[Tensor, Tensor, float]:
    """`quantize_rows`, natively or by eager torch."""
    found = native_rows(x, frac, grid, gamma, var, eps)
    if found is not None:
        return found
    scale = None
    if var is not None:
        scale = torch.rsqrt(var.double() + eps)
        scale = (scale if gamma is None else scale * gamma.double()).float()
        scale.masked_fill_(scale == 0.0, 1.0)
    twice, step = channel_factors(frac, x, 0, scale)
    codes = round_doubled_(x * twice, grid.rounding).clamp_(grid.low, grid.high)
    most = codes.abs().reshape(x.shape[0], -1).sum(1, dtype=torch.float64).amax().item()
    return codes.mul_(step), twice.reshape(-1).contiguous(), most


def _fold(
    x: Tensor, frac: Tensor, gamma: Tensor | None, var: Tensor | None, eps: float, spec: list[int]
) -> tuple[Tensor, Tensor]:
    return _rows(x.contiguous(), frac, gamma, var, eps, _grid(*spec[:4]))[:2]


_rows_backward_op = _define(
    "rows_backward(Tensor g, Tensor x, Tensor y, Tensor twice, int[] spec) -> (Tensor, Tensor)",
    lambda g, x, y, twice, spec: rows_gradients(
        g.to(x.dtype).contiguous(), x.contiguous(), y.contiguous(), twice, _grid(*spec[:4])
    ),
    lambda g, x, y, twice, spec: (torch.empty_like(x).contiguous(), torch.empty_like(twice)),
)


def _keep_fold(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    x, _, _, _, _, ctx.spec = inputs
    ctx.save_for_backward(x, *output)
    ctx.mark_non_differentiable(output[1])


fold = _define(
    "fold(Tensor x, Tensor frac, Tensor? gamma, Tensor? var, float eps, int[] spec) -> (Tensor, Tensor)",
    _fold,
    lambda x, frac, gamma, var, eps, spec: (torch.empty_like(x).contiguous(), torch.empty_like(frac)),
    lambda ctx, g, _: (*_rows_backward_op(g, *ctx.saved_tensors, ctx.spec), None, None, None, None),
    _keep_fold,
)


def _parameters(
    x: Tensor, frac: Tensor, bias: Tensor | None, source: Tensor, spec: list[int], bias_width: int, reach: int, top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, biases and `twice`; refuses sums of more than `top` LSBs."""
    w, twice, most = _rows(x.contiguous(), frac, None, None, 0.0, _grid(*spec[:4]))
    kind = torch.float32 if top == 1 << 24 else torch.float64
    offset = 0.0
    b = torch.empty(0, dtype=kind)
    if bias is not None:
        exponents = frac.round() + source.round()
        codes = torch.floor(torch.ldexp(bias.double(), exponents + 1)).mul_(0.5).ceil_()
        limit = float(1 << (bias_width - 1))
        codes.clamp_(-limit, limit - 1)
        offset = codes.abs().amax().item()
        b = torch.ldexp(codes, -exponents).to(kind)
    if not most * reach + offset < top:
        raise FormatError(
            f"a compiled layer has partial sums of up to {most * reach + offset:.0f} LSBs, expected less than {top}, "
            "which its carrier holds exactly; run this model without torch.compile, or narrow the input or the weights"
        )
    return w.to(kind), b, twice


def _keep_parameters(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, bias, _, ctx.spec, *_ = inputs
    ctx.biased = bias is not None
    ctx.save_for_backward(x, output[0], output[2])
    ctx.mark_non_differentiable(output[2])


def _parameters_backward(ctx: Any, g: Tensor, db: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, y, twice = ctx.saved_tensors
    dx, df = _rows_backward_op(g, x, y.to(x.dtype), twice, ctx.spec)
    return dx, df, db.to(x.dtype) if ctx.biased else None, None, None, None, None, None


parameters = _define(
    "parameters(Tensor x, Tensor frac, Tensor? bias, Tensor source, int[] spec, int bias_width, int reach, int top)"
    " -> (Tensor, Tensor, Tensor)",
    _parameters,
    lambda x, frac, bias, source, spec, bias_width, reach, top: (
        torch.empty_like(x, dtype=torch.float32 if top == 1 << 24 else torch.float64).contiguous(),
        x.new_empty(0 if bias is None else bias.shape[0], dtype=torch.float32 if top == 1 << 24 else torch.float64),
        torch.empty_like(frac),
    ),
    _parameters_backward,
    _keep_parameters,
)


# -- batch norm ---------------------------------------------------------------------------------------------------
def _norm(
    x: Tensor, gamma: Tensor, beta: Tensor, frac: Tensor, eps: float, spec: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, mean, unbiased variance and ``1 / std`` of a quantised training batch norm."""
    mean, var = torch.zeros_like(gamma), torch.ones_like(gamma)
    kept: list[Tensor] = []
    context = SimpleNamespace(needs_input_grad=(True,) * 6, save_for_backward=lambda *tensors: kept.extend(tensors))
    running = mean, var, 1.0, eps
    y = affine.QuantizedBatchNorm.forward(context, x.contiguous(), gamma, beta, running, frac, _setting(spec, frac))
    return y, mean, var, kept[4]


def _norm_backward(
    g: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, invstd: Tensor, y: Tensor, frac: Tensor,
    eps: float, spec: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    saved = (x.contiguous(), gamma, beta, mean, invstd, y)
    context = SimpleNamespace(needs_input_grad=(True,) * 6, saved_tensors=saved, setting=_setting(spec, frac), eps=eps)
    dx, dgamma, dbeta, _, df, _ = affine.QuantizedBatchNorm.backward(context, g)
    assert dx is not None and dgamma is not None and dbeta is not None and df is not None
    # Results of one operator may not share memory.
    return dx, dgamma.clone(), dbeta.clone(), df.to(frac.dtype)


_norm_backward_op = _define(
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


norm = _define(
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
    grid = _grid(*factors[:4])
    setting = _setting(spec, frac)
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
    context = SimpleNamespace(saved_tensors=saved, setting=_setting(spec, frac), factors=_grid(*factors[:4]))
    found = affine.NormAffine.backward(context, g)[:5]
    return tuple(t.clone() for t in found)  # type: ignore[union-attr]


_norm_affine_backward_op = _define(
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


norm_affine = _define(
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


# -- sums of two tensors ------------------------------------------------------------------------------------------
def _aligned_sum(x: Tensor, y: Tensor, fx: Tensor, fy: Tensor, mx: int, my: int, sign: int) -> Tensor:
    low, high = (int(v) for v in torch.aminmax(torch.cat([fx.reshape(-1), fy.reshape(-1)]).round()))
    if (mx + my) << (high - low) >= 1 << 24:
        raise FormatError(
            f"a compiled sum of two tensors with {low} and {high} fractional bits reaches {(mx + my) << (high - low)} "
            "LSBs, expected less than 2**24; run this model without torch.compile, or give its operands nearer formats"
        )
    return torch.add(x, y, alpha=sign)


def _keep_sum(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.sign = inputs[-1]


aligned_sum = _define(
    "aligned_sum(Tensor x, Tensor y, Tensor fx, Tensor fy, int mx, int my, int sign) -> Tensor",
    _aligned_sum,
    lambda x, y, fx, fy, mx, my, sign: torch.empty_like(x),
    lambda ctx, g: (g, g * ctx.sign if ctx.sign != 1 else g, None, None, None, None, None),
    _keep_sum,
)


def move_statistics(module: Any, mean: Tensor, var: Tensor) -> None:
    """Counts a batch and moves the running statistics of a compiled batch norm."""
    with torch.no_grad():
        module.num_batches_tracked.add_(1)
        momentum = module.momentum
        weight = momentum if momentum is not None else 1.0 / module.num_batches_tracked.to(mean.dtype)
        module.running_mean.lerp_(mean, weight)
        module.running_var.lerp_(var, weight)


def carrier_top(fan_in: int, reach: int, magnitude: int) -> int:
    """The first LSB that the carrier of a compiled layer does not hold: ``2**24`` or ``2**53``."""
    return 1 << 24 if fan_in * reach * magnitude < 1 << 24 else 1 << 53


__all__ = [
    "aligned_sum",
    "carrier_top", "compiling", "fold", "move_statistics", "norm", "parameters", "quantize_channels", "quantize_tensor",
    "specification",
]  # fmt: skip
