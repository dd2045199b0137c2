"""RMSNorm and LayerNorm over the last axis, in fixed point (docs/normalization.md).

Forward gives the deployed bits, in training and in eval mode alike. Gradients are those of the real norm, of the gain
and bias as they are deployed, and of the quantiser behind them, with which the norm is one autograd function
(`normalization_rows`).
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
from edgemat.nn.layer import QuantLayer, exact_arithmetic
from edgemat.nn.normalization_rows import NormQuantize, RowSetting
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.quantizers import WeightSpec, weight_quantizer, weight_spec
from edgemat.nn.rounding import Grid, QuantizeTensor

NORM_WIDTH = 16
_BIAS = Fixed(32, 0)
_BIAS_GRID = Grid.of(_BIAS)


def norm_format(features: int, width: int = NORM_WIDTH) -> Fixed:
    """The finest format of `width` bits that holds every normalised value of a row: none exceeds sqrt(features)."""
    whole = (math.isqrt(features) + 1).bit_length()
    return Fixed(width, whole + 1)


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
        return _BIAS.with_frac(self.norm.frac_bits + gains.exponent())

    def largest(self) -> int:
        """A bound of the normalised values in LSBs, before their overflow."""
        return math.isqrt(self.features << 2 * self.norm.frac_bits) + 2

    def result_carrier(self) -> torch.dtype:
        """What holds every product with the gain, plus the bias, exactly."""
        gains = self.gains
        assert gains is not None
        product = min(self.norm_grid.magnitude, self.largest()) * gains.grid.magnitude
        offset = 0
        if self.bias is not None:
            largest = torch.linalg.vector_norm(self.bias.detach(), math.inf).item()
            if not math.isfinite(largest):
                raise FormatError(
                    f"layer {self.path or type(self).__name__!r} has a bias of {largest}; training diverged"
                )
            frac = self.norm.frac_bits + gains.exponent()
            offset = min(math.ceil(math.ldexp(largest, frac)) + 1, 1 << 31)
        return self.carrier(product + offset)

    def parameters_on_grid(self) -> tuple[Tensor | None, Tensor | None]:
        """Gain and bias as deployed, with straight-through gradients."""
        gains = self.gains
        if gains is None:
            return None, None
        gain = gains(self.weight)
        if self.bias is None:
            return gain, None
        # A binary point of its own it has not: no gradient goes there.
        point, exponent = gains.frac.detach(), self.norm.frac_bits + gains.exponent()
        return gain, QuantizeTensor.apply(self.bias, point, _BIAS_GRID, exponent, False)

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
            y = NormQuantize.apply(x, gain, bias, frac, RowSetting(self, source, fused))
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
