"""Rows over an integer root and the quantiser behind them, as one function that training differentiates.

Forward gives the deployed bits: the scale of a row comes from integers, the rest runs in the narrowest float carrier in
which every step is exact. Backward keeps the input and the result, which the neighbours keep as well, and computes the
normalised input once more instead of storing it.

On the CPU, rows of float32 take single native passes (native/norm_rows.c) where those are at hand: forward has the
same bits, backward sums in another order. The torch operations here do everything else, and are what the native passes
are compared with.
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgemat.errors import FormatError
from edgemat.formats import OVERFLOWS, ROUNDINGS
from edgemat.nn import native
from edgemat.nn.layer import FLOAT32_EXACT, FLOAT64_EXACT
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.rounding import LN2, open_interval, quantize_codes

if TYPE_CHECKING:
    from edgemat.nn.normalization import QuantRowNorm

_MANTISSA_BITS = 16
_LIMIT = 1 << 62
_POINT_LIMIT = 40  # binary points with which nothing leaves the range of a float32
_LANES = 64
_SMALL = 1 << 15
_DOUBLE_FLOAT, _DOUBLES = 1, 2  # as in native/norm_rows.c
_SATURATING = ("SAT", "SAT_SYM")


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
        self.point = 0 if quantizer is None else quantizer.exponent()
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

    def result(self, x: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
        """The exact result, quantised if there is a quantiser."""
        y, q = self.affine(x, gain, bias), self.quantizer
        if q is None:
            return y
        y = quantize_codes(y, q.grid, math.ldexp(1.0, self.point), q.relu).mul_(math.ldexp(1.0, -self.point))
        return y.to(q.grid.carrier)

    def carriers(self) -> tuple[torch.dtype, torch.dtype]:
        """What holds the product with the mantissa exactly, and that with the gain plus the bias."""
        layer = self.layer
        result = layer.norm_grid.carrier if layer.gains is None else layer.result_carrier()
        return layer.carrier(self.reach << _MANTISSA_BITS), result

    def interval(self) -> tuple[float, float]:
        """Where the real result must lie for a gradient to pass the quantiser, ends excluded."""
        q = self.quantizer
        if q is None or q.grid.overflow == "WRAP":
            return -math.inf, math.inf
        return open_interval(q.grid, self.point, q.relu, False)

    def real_eps(self) -> float:
        """What backward adds to the mean square: a row of zeros has a finite gradient.

        At least a quarter of the smallest mean square of a row that is not 0.
        """
        return max(self.layer.eps, math.ldexp(0.25 / self.layer.features**2, -2 * self.exponent))


class NormQuantize(torch.autograd.Function):
    """A norm's exact result, quantised if there is a quantiser; keeps its input, and of its results what leaves."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor | None, bias: Tensor | None, frac: Tensor | None, setting: RowSetting
    ) -> Tensor:
        ctx.passes = _passes(x, gain, setting)
        if ctx.passes is None:
            y = setting.result(x, gain, bias)
        else:
            y = native_forward(ctx.passes, x, gain, bias, setting)
        ctx.setting = setting
        ctx.save_for_backward(x, gain, bias, y if setting.quantizer is not None else None)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, bias, y = ctx.saved_tensors
        setting, df = ctx.setting, None
        if ctx.passes is not None and not torch.is_grad_enabled():
            point = y if ctx.needs_input_grad[3] else None
            return *native_backward(ctx.passes, grads[0], x, gain, bias, point, setting), None
        real, g = x.float(), grads[0].float()
        weight = None if gain is None else gain.float()
        once_more = _CentredRows if setting.layer.centred else _Rows
        norm = once_more(real, weight, None if bias is None else bias.float(), setting.real_eps())
        if y is not None:
            inside = g
            if setting.quantizer.grid.overflow != "WRAP":
                inside = torch.ops.aten.hardtanh_backward(g, norm.result, *setting.interval())
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


# -- native passes ------------------------------------------------------------------------------------------------
class _Passes(ctypes.Structure):
    """`EdgematRows` of native/norm_rows.c."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("rows", "features", "block", "largest", "offset", "root")]
        + [(name, ctypes.c_int32) for name in ("threads", "centred", "shift", "wide", "common", "quantised", "relu")]
        + [(name, ctypes.c_int32) for name in ("norm_rounding", "norm_overflow", "rounding", "overflow")]
        + [(name, ctypes.c_double) for name in ("scale", "norm_low", "norm_high", "low", "high", "step")]
    )


def _moderate(setting: RowSetting) -> bool:
    """Whether no binary point is so far from 0 that float32 and float64 could differ in range."""
    gains = setting.layer.gains
    points = (setting.exponent, setting.point, 0 if gains is None else gains.exponent())
    return max(map(abs, points)) <= _POINT_LIMIT


def _passes(x: Tensor, gain: Tensor | None, setting: RowSetting) -> _Passes | None:
    """The settings of the native passes over `x`; None where torch must do it."""
    x = x.contiguous() if x.is_cpu else x
    if native.kernel(x, *(() if gain is None else (gain,))) is None or not _moderate(setting):
        return None
    product, carrier = setting.carriers()
    layer, q, features, grid = setting.layer, setting.quantizer, setting.layer.features, setting.layer.norm_grid
    if (carrier if q is None else q.grid.carrier) != torch.float32:
        return None
    made = _Passes(x.numel() // features, features)
    square = setting.magnitude**2
    made.block = (FLOAT32_EXACT - 1) // square // _LANES * _LANES
    if made.block == 0 and features * square >= FLOAT64_EXACT:
        made.block = -1
    made.largest, made.offset, made.root = setting.magnitude, setting.offset, setting.root
    made.threads = torch.get_num_threads() if x.numel() > _SMALL else 1
    made.centred, made.shift, made.scale = layer.centred, setting.first_shift, math.ldexp(1.0, setting.exponent)
    made.norm_low, made.norm_high = grid.low, grid.high
    made.norm_rounding, made.norm_overflow = ROUNDINGS.index(grid.rounding), OVERFLOWS.index(grid.overflow)
    widest = setting.reach << _MANTISSA_BITS
    common = grid.rounding == "RND" and grid.overflow in _SATURATING and 2 * widest <= FLOAT64_EXACT
    if q is not None:
        made.quantised, made.relu, made.step = 1, q.relu, math.ldexp(1.0, -setting.point)
        clamps = q.grid.overflow in _SATURATING
        made.low, made.high = max(q.grid.low, 0) if q.relu and clamps else q.grid.low, q.grid.high
        made.rounding, made.overflow = ROUNDINGS.index(q.grid.rounding), OVERFLOWS.index(q.grid.overflow)
        common = common and q.grid.rounding == "RND" and clamps
    made.common = common
    if carrier == torch.float64 or not common:
        made.wide = _DOUBLES
    elif product == torch.float64 or layer.centred or 2 * max(widest, layer.largest()) > FLOAT32_EXACT:
        made.wide = _DOUBLE_FLOAT
    return made


def native_forward(passes: _Passes, x: Tensor, gain: Tensor | None, bias: Tensor | None, setting: RowSetting) -> Tensor:
    """`RowSetting.result` in one native pass."""
    from edgemat.ops.reciprocal_root import TABLE

    x = x.contiguous()
    carrier = torch.float64 if passes.wide == _DOUBLES else torch.float32
    # Twice the quantiser's codes: what its rounding starts from.
    step = 2.0 / passes.step if passes.quantised else 1.0
    gains = torch.ones(passes.features, dtype=carrier) if gain is None else gain.to(carrier)
    gains = gains * math.ldexp(step, -setting.layer.norm.frac_bits)
    biases = torch.zeros_like(gains) if bias is None else (bias * step).to(carrier)
    y = torch.empty_like(x)
    places = (t.data_ptr() for t in (y, x, gains, biases))
    _library().edgemat_rows_forward(ctypes.addressof(passes), *places, TABLE.ctypes.data)
    return y


def native_backward(
    passes: _Passes,
    g: Tensor,
    x: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    setting: RowSetting,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, gain, bias and (where y is given) the quantiser's binary point, in one native pass.

    Args:
        passes: What forward was done with.
        g: Gradient of the result.
        x: The rows.
        gain: As deployed, or None.
        bias: As deployed, or None.
        y: The result, or None.
        setting: That of forward.
    """
    g, x, n = g.to(torch.float32).contiguous(), x.contiguous(), passes.features
    gains = torch.ones(n) if gain is None else gain
    biases = torch.zeros(n) if bias is None else bias.float()
    dx, found = torch.empty_like(x), torch.empty(2 * n + 1)
    room = ctypes.create_string_buffer(passes.threads * 2 * n * 12)
    places = (None if t is None else t.data_ptr() for t in (dx, found, g, x, y, gains, biases))
    numbers = setting.real_eps(), *setting.interval()
    _library().edgemat_rows_backward(ctypes.addressof(passes), *places, *numbers, ctypes.addressof(room))
    dgain, dbias = (None if t is None else found[i * n : (i + 1) * n] for i, t in enumerate((gain, bias)))
    return dx, dgain, dbias, None if y is None else found[2 * n].reshape(())


def _library() -> ctypes.CDLL:
    library = native.load()
    assert library is not None, "who made the settings has seen it"
    return library
