"""RMSNorm and LayerNorm over the last axis, in fixed point (docs/normalization.md).

Forward gives the deployed bits, in training and in eval mode alike: the scale of a row comes from integers, the rest
runs in the narrowest float carrier in which every step is exact. Gradients are those of the real norm, of the gain and
bias as they are deployed, and of the quantiser behind them.

With a quantiser behind it, norm and quantiser are one autograd function that keeps its input and its result (which the
next layer keeps as well): backward computes the normalised input once more instead of storing it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.nn.emission import emit, exporting
from edgemat.nn.layer import FLOAT64_EXACT, QuantLayer, exact_arithmetic
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.quantizers import WeightSpec, weight_quantizer, weight_spec
from edgemat.nn.rounding import LN2, Grid, QuantizeTensor, open_interval, quantize_codes

NORM_WIDTH = 16
_MANTISSA_BITS = 16
_LIMIT = 1 << 62


def norm_format(features: int, width: int = NORM_WIDTH) -> Fixed:
    """The finest format of `width` bits that holds every normalised value of a row: none exceeds sqrt(features)."""
    whole = (math.isqrt(features) + 1).bit_length()
    return Fixed(width, whole + 1)


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


class _Setting:
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
        ctx: Any, x: Tensor, gain: Tensor | None, bias: Tensor | None, frac: Tensor | None, setting: _Setting
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


def _tiny(setting: _Setting) -> float:
    """A quarter of the smallest mean square of a row that is not 0, so that a row of zeros has a finite gradient."""
    return math.ldexp(0.25 / setting.layer.features**2, -2 * setting.exponent)


class QuantRowNorm(QuantLayer):
    """What `QuantRMSNorm` and `QuantLayerNorm` share.

    Attributes:
        centred: Whether the mean is subtracted.
        norm: Format of the normalised values.

    Args:
        features: Length of the last axis.
        eps: Added to the mean square (variance); deployed as the nearest multiple of the square of the input's LSB.
        gain: Whether there is a learned gain, float32 ``[features]``.
        bias: Whether there is a learned bias, float32 ``[features]``; needs a gain.
        weights: Format of the gain, one binary point.
        norm: Format of the normalised values; by default `norm_format`, which never saturates.
        input: Format of an own input quantiser, or None where `link` names the producer.
        output: Format of the result, or None where the exact result leaves the layer.
    """

    centred = False
    stem = ""

    def __init__(
        self,
        features: int,
        eps: float,
        gain: bool,
        bias: bool,
        *,
        weights: str | Fixed | WeightSpec = "fixed<8>",
        norm: str | Fixed | None = None,
        input: str | Fixed | None = "fixed<8>",
        output: str | Fixed | FixedQuantizer | None = "fixed<8>",
    ):
        super().__init__(input, output)
        label = f"a {type(self).__name__}"
        if not isinstance(features, int) or isinstance(features, bool) or features < 1:
            raise FormatError(f"{label} is asked to normalise {features!r}, expected the length of the last axis alone")
        if not (math.isfinite(eps) and eps >= 0):
            raise FormatError(f"{label} has eps={eps}, expected a finite number of at least 0")
        if bias and not gain:
            raise FormatError(f"{label} has a bias and no gain, expected a gain with every bias; set gain=True")
        self.features, self.eps = features, float(eps)
        fmt = norm_format(features) if norm is None else Fixed.parse(norm) if isinstance(norm, str) else norm
        if fmt.bipolar or not isinstance(fmt.int_bits, int) or fmt.width > 31 or not 0 <= fmt.frac_bits <= 24:
            raise FormatError(
                f"{label} has normalised values of {fmt}, expected at most 31 bits, one stated binary point and 0 to "
                "24 fractional bits"
            )
        self.norm, self.norm_grid = fmt, Grid.of(fmt)
        self.weight = nn.Parameter(torch.ones(features)) if gain else None
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None
        spec = weight_spec(weights, False)
        if gain:
            self.weight_quantizer = weight_quantizer(spec, (features,), None, 0, label)
        self._attributes: dict[str, Any] = {}

    @property
    def gains(self) -> FixedQuantizer | None:
        """The quantiser of the gain, if there is one."""
        found = getattr(self, "weight_quantizer", None)
        assert found is None or isinstance(found, FixedQuantizer)
        return found

    def eps_code(self) -> int:
        """`eps` on the grid of the input's squares, rounded half to even."""
        return round(math.ldexp(self.eps, 2 * self.known_source().exponent()))

    def bias_format(self) -> Fixed:
        """Format of the bias: 32 bits on the grid of norm times gain."""
        gains = self.gains
        assert gains is not None
        return Fixed(32, 0).with_frac(self.norm.frac_bits + gains.exponent())

    def result_carrier(self) -> torch.dtype:
        """What holds every product with the gain, plus the bias, exactly."""
        gains = self.gains
        assert gains is not None
        reach = min(self.norm_grid.magnitude, math.isqrt(self.features << 2 * self.norm.frac_bits) + 2)
        product = reach * gains.grid.magnitude
        offset = 0
        if self.bias is not None:
            largest = self.bias.detach().abs().amax().item()
            if not math.isfinite(largest):
                raise FormatError(
                    f"layer {self.path or type(self).__name__!r} has a bias of {largest}; training diverged"
                )
            offset = min(math.ceil(math.ldexp(largest, self.bias_format().frac_bits)) + 1, 1 << 31)
        return self.carrier(product + offset)

    def parameters_on_grid(self) -> tuple[Tensor | None, Tensor | None]:
        """Gain and bias as deployed, with straight-through gradients."""
        gains = self.gains
        if gains is None:
            return None, None
        gain = gains(self.weight)
        if self.bias is None:
            return gain, None
        fmt = self.bias_format()
        point = gains.frac.detach()
        return gain, QuantizeTensor.apply(self.bias.double(), point, Grid.of(fmt), fmt.frac_bits, False)

    def real(self, x: Tensor) -> Tensor:
        """The float norm."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``[..., features]`` along the last axis."""
        x = self.enter(x)
        if exporting():
            self.check_frozen()
            codes = [c for c in (getattr(self, "gain_codes", None), getattr(self, "bias_codes", None)) if c is not None]
            return self.leave(emit(self.stem, (x, *codes), x.shape, **self._attributes))
        if x.shape[-1] != self.features:
            raise FormatError(
                f"layer {self.path or type(self).__name__!r} got {tuple(x.shape)}, expected a last axis of "
                f"{self.features}"
            )
        source = self.known_source()
        gains = self.gains
        if source.observing or not source.ready or (gains is not None and gains.observing):
            return self.leave(self.real(x.float()))
        with exact_arithmetic(x):
            gain, bias = self.parameters_on_grid()
            quantizer = self.output_quantizer
            fused = quantizer if self._fuses() else None
            frac = None if fused is None else fused.frac
            y = NormQuantize.apply(x, gain, bias, frac, _Setting(self, source, fused))
        return y if fused is not None else self.leave(y)

    def _fuses(self) -> bool:
        """Whether norm and quantiser are one function: a plain quantiser of one binary point that is set."""
        quantizer = self.output_quantizer
        return (
            type(quantizer) is FixedQuantizer
            and quantizer.ready
            and not quantizer.observing
            and not quantizer.per_channel
            and not quantizer.tracks
        )

    @torch.no_grad()
    def freeze(self) -> None:
        """Stores the codes of gain and bias and the formats."""
        super().freeze()
        self._attributes = {"eps": self.eps_code(), "norm_format": str(self.norm)}
        gains = self.gains
        if gains is None:
            return
        gains._check_ready()
        gain, bias = self.parameters_on_grid()
        assert gain is not None
        self.register_buffer("gain_codes", gains.codes(gain).to(torch.int32))
        self._attributes["w_format"] = str(gains.format)
        if bias is not None:
            fmt = self.bias_format()
            self.register_buffer("bias_codes", torch.ldexp(bias, torch.tensor(fmt.frac_bits)).to(torch.int32))
            self._attributes["b_format"] = str(fmt)

    def extra_repr(self) -> str:
        """Size and formats, for printing."""
        return f"{self.features}, eps={self.eps}, norm={self.norm}"


class QuantRMSNorm(QuantRowNorm):
    """`torch.nn.RMSNorm` over the last axis in fixed point, ``x / sqrt(mean(x**2) + eps) * weight``.

    Args:
        features: Length of the last axis.
        eps: Added to the mean square; None for torch's default, the float32 epsilon.
        gain: Whether there is a learned `weight`.
        options: `weights`, `norm`, `input` and `output` of `QuantRowNorm`.
    """

    stem = "RmsNorm"

    def __init__(self, features: int, eps: float | None = None, gain: bool = True, **options: Any):
        eps = torch.finfo(torch.float32).eps if eps is None else eps
        super().__init__(features, eps, gain, False, **options)

    def real(self, x: Tensor) -> Tensor:
        """The float norm."""
        return F.rms_norm(x, (self.features,), self.weight, self.eps)


class QuantLayerNorm(QuantRowNorm):
    """`torch.nn.LayerNorm` over the last axis in fixed point, ``(x - mean) / sqrt(var + eps) * weight + bias``.

    Args:
        features: Length of the last axis.
        eps: Added to the variance.
        gain: Whether there is a learned `weight`.
        bias: Whether there is a learned `bias`.
        options: `weights`, `norm`, `input` and `output` of `QuantRowNorm`.
    """

    centred = True
    stem = "LayerNorm"

    def __init__(self, features: int, eps: float = 1e-5, gain: bool = True, bias: bool = True, **options: Any):
        super().__init__(features, eps, gain, bias, **options)

    def real(self, x: Tensor) -> Tensor:
        """The float norm."""
        return F.layer_norm(x, (self.features,), self.weight, self.bias, self.eps)


RMSNorm = QuantRMSNorm
LayerNorm = QuantLayerNorm
