"""Rows over an integer root and the quantiser behind them, as one function that training differentiates.

Forward gives the deployed bits: the scale of a row comes from integers, the rest runs in the narrowest float carrier in
which every step is exact. Backward keeps the input and the result, which the neighbours keep as well, and computes the
normalised input once more instead of storing it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgemat.errors import FormatError
from edgemat.nn.layer import FLOAT64_EXACT
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.rounding import LN2, open_interval, quantize_codes

if TYPE_CHECKING:
    from edgemat.nn.normalization import QuantRowNorm

_MANTISSA_BITS = 16
_LIMIT = 1 << 62


def reciprocal_root(totals: Tensor, root: int) -> tuple[Tensor, Tensor]:
    """`edgemat.ops.reciprocal_root.reciprocal_root` of an int64 tensor, on its device."""
    from edgemat.ops.reciprocal_root import TABLE

    totals = totals.clamp_min(1)
    exponent = torch.zeros_like(totals)
    for j in range(31):
        exponent += totals >= (1 << 2 * j)
    u = (totals << (30 - 2 * exponent).clamp_min(0)) >> (2 * exponent - 30).clamp_min(0)
    a = torch.from_numpy(TABLE).to(totals.device)[(u >> 22) - 64]
    t = (a * a * u) >> 30
    b = (a * ((3 << 30) - t)) >> 16
    product = b * root
    doubled = (product >= 1 << 61).to(torch.int64)
    return product >> (45 + doubled), exponent - doubled


class RowSetting:
    """What one call of a norm fixes: formats, the constants of its rows, and the quantiser behind it."""

    def __init__(self, layer: QuantRowNorm, source: FixedQuantizer, quantizer: FixedQuantizer | None):
        from edgemat.ops.reciprocal_root import UNIT_BITS, root_of

        self.layer = layer
        self.exponent = source.exponent()
        self.magnitude = source.grid.magnitude
        self.quantizer = quantizer
        self.eps = layer.eps_code()
        self.root, half = root_of(1 if layer.centred else layer.features)
        self.first_shift = UNIT_BITS - half - layer.norm.frac_bits
        span = source.grid.high - source.grid.low
        self.reach = (layer.features - 1) * span if layer.centred else self.magnitude
        features = layer.features
        square = (features * self.magnitude) ** 2 if layer.centred else features * self.magnitude**2
        self.offset = self.eps * (features**2 if layer.centred else features)
        self.total = square + self.offset
        if self.total >= _LIMIT:
            raise FormatError(
                f"layer {layer.path or type(layer).__name__!r} has sums of squares of up to {self.total}, expected "
                "less than 2**62; narrow its input"
            )

    def codes(self, x: Tensor) -> Tensor:
        """Integers of x in a carrier that holds the squares' sum, int64 where no float does."""
        if self.total < 1 << 24:
            return x.float() * math.ldexp(1.0, self.exponent)
        codes = x.double() * math.ldexp(1.0, self.exponent)
        return codes if self.total < FLOAT64_EXACT else codes.round_().to(torch.int64)

    def normalized(self, x: Tensor) -> Tensor:
        """z in LSBs of the norm's format: integral floats, exact."""
        layer, codes = self.layer, self.codes(x)
        if layer.centred:
            total = codes.sum(-1, keepdim=True)
            spread = layer.features * (codes * codes).sum(-1, keepdim=True) - total * total
        else:
            spread = (codes * codes).sum(-1, keepdim=True)
        mantissa, exponent = reciprocal_root(spread.to(torch.int64) + self.offset, self.root)
        carrier = layer.carrier(self.reach << _MANTISSA_BITS)
        # The factor times the code is exact: 16 bits of mantissa and a power of two.
        factor = torch.ldexp(mantissa.double(), (-self.first_shift - exponent).to(torch.int32)).to(carrier)
        if layer.centred:
            numerators = (codes * layer.features - total).to(carrier)
        else:
            numerators = codes.to(carrier)
        return quantize_codes(numerators * factor, layer.norm_grid, 1.0, False)

    def affine(self, x: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
        """The exact result in front of the quantiser."""
        z = self.normalized(x)
        step = math.ldexp(1.0, -self.layer.norm.frac_bits)
        if gain is None:
            return (z * step).to(self.layer.norm_grid.carrier)
        carrier = self.layer.result_carrier()
        y = (z.to(carrier) * step).mul_(gain.to(carrier))
        return y if bias is None else y.add_(bias.to(carrier))


class NormQuantize(torch.autograd.Function):
    """A norm's exact result, quantised if there is a quantiser; keeps its input, and of its results what leaves."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor | None, bias: Tensor | None, frac: Tensor | None, setting: RowSetting
    ) -> Tensor:
        y = setting.affine(x, gain, bias)
        if setting.quantizer is not None:
            q = setting.quantizer
            y = quantize_codes(y, q.grid, math.ldexp(1.0, q.exponent()), q.relu).mul_(math.ldexp(1.0, -q.exponent()))
            y = y.to(q.grid.carrier)
        ctx.setting = setting
        ctx.point = None if setting.quantizer is None else setting.quantizer.exponent()
        ctx.save_for_backward(x, gain, bias, y if setting.quantizer is not None else None)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, bias, y = ctx.saved_tensors
        setting, df = ctx.setting, None
        real, g = x.float(), grads[0].float()
        weight = None if gain is None else gain.float()
        once_more = _CentredRows if setting.layer.centred else _Rows
        norm = once_more(real, weight, None if bias is None else bias.float(), max(setting.layer.eps, _tiny(setting)))
        if ctx.point is not None:
            q, inside = setting.quantizer, g
            if q.grid.overflow != "WRAP":
                low, high = open_interval(q.grid, ctx.point, q.relu, False)
                inside = torch.ops.aten.hardtanh_backward(g, norm.result, low, high)
            if ctx.needs_input_grad[3]:
                df = LN2 * (_dot(inside, norm.result) - _dot(g, y.float()))
            g = inside
        dx, dgain, dbias = norm.gradients(g)
        return dx.to(x.dtype), dgain, dbias, df, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))


class _Rows:
    """The float RMS norm of rows once more, and its gradients."""

    def __init__(self, x: Tensor, gain: Tensor | None, bias: Tensor | None, eps: float):
        self.x, self.gain = x, gain
        power = torch.linalg.vecdot(x, x, dim=-1).unsqueeze(-1).div_(x.shape[-1])
        self.rstd = power.add_(eps).rsqrt_()
        self.normal = x * self.rstd
        self.result = self.normal if gain is None else self.normal * gain

    def gradients(self, g: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of x, gain and bias."""
        dgain = None if self.gain is None else (g * self.normal).reshape(-1, g.shape[-1]).sum(0)
        scaled = g if self.gain is None else g * self.gain
        along = torch.linalg.vecdot(scaled, self.normal, dim=-1).unsqueeze(-1).div_(g.shape[-1])
        return torch.addcmul(scaled, self.normal, along, value=-1.0).mul_(self.rstd), dgain, None


class _CentredRows:
    """The float layer norm of rows once more, and its gradients, in torch's own two calls."""

    def __init__(self, x: Tensor, gain: Tensor | None, bias: Tensor | None, eps: float):
        self.fixed = x, [x.shape[-1]]
        self.result, *self.statistics = torch.native_layer_norm(x, [x.shape[-1]], gain, bias, eps)
        self.given = gain, bias

    def gradients(self, g: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of x, gain and bias."""
        wanted = [True, *(t is not None for t in self.given)]
        return torch.ops.aten.native_layer_norm_backward(g, *self.fixed, *self.statistics, *self.given, wanted)


def _tiny(setting: RowSetting) -> float:
    """A quarter of the smallest mean square of a row that is not 0, so that a row of zeros has a finite gradient."""
    return math.ldexp(0.25 / setting.layer.features**2, -2 * setting.exponent)
