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
def grid_of(width: int, signed: int, rounding: int, overflow: int) -> Grid:
    return Grid.of(Fixed(width, None, bool(signed), ROUNDINGS[rounding], OVERFLOWS[overflow]))


def setting_of(spec: list[int], frac: Tensor) -> tuple[Grid, int, bool]:
    value = float(frac)
    if not -EXPONENT_LIMIT <= value <= EXPONENT_LIMIT:
        raise FormatError(
            f"a quantiser learned {value} fractional bits, expected within +-{EXPONENT_LIMIT}; lower the learning rate "
            "of the binary points"
        )
    return grid_of(*spec[:4]), round(value), bool(spec[4])


def define(schema: str, run: Any, fake: Any, backward: Any = None, keep: Any = None) -> Any:
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
    return QuantizeTensor.forward(context, x.contiguous(), frac, *setting_of(spec, frac))


def _quantize_backward(g: Tensor, x: Tensor, y: Tensor, frac: Tensor, spec: list[int]) -> tuple[Tensor, Tensor]:
    saved = (x.contiguous(), y.contiguous())
    context = SimpleNamespace(needs_input_grad=(True, True), saved_tensors=saved, setting=setting_of(spec, frac))
    dx, df = QuantizeTensor.backward(context, g)[:2]
    return dx, torch.zeros_like(frac) if df is None else df.to(frac.dtype)  # type: ignore[return-value, union-attr]


def _carried(x: Tensor, spec: list[int]) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32 if spec[0] <= 24 else torch.float64).contiguous()


_quantize_backward_op = define(
    "quantize_backward(Tensor g, Tensor x, Tensor y, Tensor frac, int[] spec) -> (Tensor, Tensor)",
    _quantize_backward,
    lambda g, x, y, frac, spec: (torch.empty_like(x).contiguous(), torch.empty_like(frac)),
)


def _keep_quantize(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, frac, ctx.spec = inputs
    ctx.save_for_backward(x, output, frac)


quantize_tensor = define(
    "quantize(Tensor x, Tensor frac, int[] spec) -> Tensor",
    _quantize,
    lambda x, frac, spec: _carried(x, spec),
    lambda ctx, g: (*_quantize_backward_op(g, *ctx.saved_tensors, ctx.spec), None),
    _keep_quantize,
)


# -- channels -----------------------------------------------------------------------------------------------------
def _channels(x: Tensor, frac: Tensor, spec: list[int], axis: int) -> Tensor:
    grid, relu = grid_of(*spec[:4]), bool(spec[4])
    return QuantizeChannels.apply(x.detach(), frac.detach(), grid, frac.detach(), axis, relu, None)


def _channels_backward(g: Tensor, x: Tensor, frac: Tensor, spec: list[int], axis: int) -> tuple[Tensor, Tensor]:
    grid, relu = grid_of(*spec[:4]), bool(spec[4])
    with torch.enable_grad():
        given, points = x.detach().requires_grad_(), frac.detach().requires_grad_()
        y = QuantizeChannels.apply(given, points, grid, points, axis, relu, None)
    dx, df = torch.autograd.grad(y, (given, points), g.to(y.dtype), allow_unused=True)
    return dx.contiguous(), torch.zeros_like(frac) if df is None else df


_channels_backward_op = define(
    "channels_backward(Tensor g, Tensor x, Tensor frac, int[] spec, int axis) -> (Tensor, Tensor)",
    _channels_backward,
    lambda g, x, frac, spec, axis: (torch.empty_like(x).contiguous(), torch.empty_like(frac)),
)


def _keep_channels(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, frac, ctx.spec, ctx.axis = inputs
    ctx.save_for_backward(x, frac)


quantize_channels = define(
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
    return _rows(x.contiguous(), frac, gamma, var, eps, grid_of(*spec[:4]))[:2]


_rows_backward_op = define(
    "rows_backward(Tensor g, Tensor x, Tensor y, Tensor twice, int[] spec) -> (Tensor, Tensor)",
    lambda g, x, y, twice, spec: rows_gradients(
        g.to(x.dtype).contiguous(), x.contiguous(), y.contiguous(), twice, grid_of(*spec[:4])
    ),
    lambda g, x, y, twice, spec: (torch.empty_like(x).contiguous(), torch.empty_like(twice)),
)


def _keep_fold(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    x, _, _, _, _, ctx.spec = inputs
    ctx.save_for_backward(x, *output)
    ctx.mark_non_differentiable(output[1])


fold = define(
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
    w, twice, most = _rows(x.contiguous(), frac, None, None, 0.0, grid_of(*spec[:4]))
    kind = torch.float32 if top == 1 << 24 else torch.float64
    offset = 0.0
    b = torch.empty(0, dtype=kind)
    if bias is not None:
        exponents = frac.round() + source.round()
        codes = torch.floor(torch.ldexp(bias.double(), exponents + 1)).mul_(0.5).ceil_()
        limit = float(1 << (bias_width - 1))
        codes.clamp_(-limit, limit - 1)
        offset = codes.abs().amax().item()
        if offset >= limit - 1:
            raise FormatError(
                f"a compiled layer has a bias that saturates its {bias_width} bits, where it has no gradient, expected "
                "one within them; run this model without torch.compile, or widen the bias"
            )
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


parameters = define(
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


aligned_sum = define(
    "aligned_sum(Tensor x, Tensor y, Tensor fx, Tensor fy, int mx, int my, int sign) -> Tensor",
    _aligned_sum,
    lambda x, y, fx, fy, mx, my, sign: torch.empty_like(x),
    lambda ctx, g: (g, g * ctx.sign if ctx.sign != 1 else g, None, None, None, None, None),
    _keep_sum,
)


def carrier_top(fan_in: int, reach: int, magnitude: int) -> int:
    """The first LSB that the carrier of a compiled layer does not hold: ``2**24`` or ``2**53``."""
    return 1 << 24 if fan_in * reach * magnitude < 1 << 24 else 1 << 53


__all__ = [
    "aligned_sum",
    "carrier_top",
    "compiling",
    "define",
    "fold",
    "grid_of",
    "parameters",
    "quantize_channels",
    "quantize_tensor",
    "setting_of",
    "specification",
]
