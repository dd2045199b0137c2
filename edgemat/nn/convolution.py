"""Convolutions with quantised weights; what they compute exactly, and how batch norm folds, is in `linear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edgemat.errors import FormatError, LoweringError
from edgemat.formats import Fixed
from edgemat.nn.batch_norm import BatchNorm
from edgemat.nn.layer import pair
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.weighted_layer import WeightedLayer
from edgemat.recipe import WeightSpec


class _Convolution(WeightedLayer):
    """Base of the 1-D and 2-D convolutions."""

    rank = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        weights: str | Fixed | WeightSpec = "fixed<8>",
        bias_format: str | Fixed = "fixed<32>",
        input: str | Fixed | None = "fixed<8>",
        output: str | Fixed | FixedQuantizer | None = None,
        relu: bool = False,
        per_channel: bool = True,
    ):
        kernel = pair(kernel_size, self.rank)
        if in_channels % groups or out_channels % groups:
            raise FormatError(f"{groups} groups do not divide {in_channels} inputs and {out_channels} outputs")
        shape = (out_channels, in_channels // groups, *kernel)
        super().__init__(shape, out_channels, bias, weights, bias_format, input, output, relu, per_channel)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = kernel
        self.stride, self.dilation = pair(stride, self.rank), pair(dilation, self.rank)
        self.begins, self.ends = self._paddings(padding)

    def _paddings(self, padding: int | str | Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if padding == "valid":
            padding = 0
        if padding == "same":
            if any(s != 1 for s in self.stride):
                raise FormatError("padding='same' is defined for stride 1 only, expected numbers")
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
        if isinstance(padding, str):
            raise FormatError(f"padding is {padding!r}, expected numbers, 'same' or 'valid'")
        both = pair(padding, self.rank)
        return both, both

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution; unequal padding is written out as zeros first."""
        padding = self.begins
        if self.begins != self.ends:
            widths = [w for b, e in zip(reversed(self.begins), reversed(self.ends), strict=True) for w in (b, e)]
            x, padding = F.pad(x, widths), (0,) * self.rank
        convolve = F.conv1d if self.rank == 1 else F.conv2d
        return convolve(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def node(self, x: Tensor) -> tuple[str, list[Any], dict[str, Any]]:
        """``Conv``."""
        if x.dim() != self.rank + 2:
            raise LoweringError(
                f"layer {self.path or type(self).__name__!r} got a tensor of {x.dim()} axes, expected {self.rank + 2}: "
                "the batch, the channels and the map; an example input has its batch on axis 0"
            )
        sizes = [
            (n + b + e - d * (k - 1) - 1) // s + 1
            for n, b, e, d, k, s in zip(
                x.shape[2:], self.begins, self.ends, self.dilation, self.kernel_size, self.stride, strict=True
            )
        ]
        attrs = {
            "strides": list(self.stride),
            "pads": [*self.begins, *self.ends],
            "dilations": list(self.dilation),
            "groups": self.groups,
        }
        return "Conv", [x.shape[0], self.out_channels, *sizes], attrs

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"


class QuantConv1d(_Convolution):
    """`torch.nn.Conv1d` with quantised weights, ``[N, C, L]`` to ``[N, O, L']``; arguments as `QuantConv2d`."""

    rank = 1


class QuantConv2d(_Convolution):
    """`torch.nn.Conv2d` with quantised weights, ``[N, C, H, W]`` to ``[N, O, H', W']``.

    The first eight arguments are those of `torch.nn.Conv2d` (zero padding), the rest those of `QuantLinear`.
    """

    rank = 2


class QuantConvTranspose2d(WeightedLayer):
    """`torch.nn.ConvTranspose2d` with quantised weights, weight ``[I, O / groups, kH, kW]``.

    The first nine arguments are those of the torch layer, the rest those of `QuantLinear`. With groups, learned
    weights share one binary point.
    """

    out_axis = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        *,
        weights: str | Fixed | WeightSpec = "fixed<8>",
        bias_format: str | Fixed = "fixed<32>",
        input: str | Fixed | None = "fixed<8>",
        output: str | Fixed | FixedQuantizer | None = None,
        relu: bool = False,
        per_channel: bool = True,
    ):
        shape = (in_channels, out_channels // groups, *pair(kernel_size, 2))
        super().__init__(
            shape, out_channels, bias, weights, bias_format, input, output, relu, per_channel and groups == 1
        )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = pair(kernel_size, 2), pair(stride, 2), pair(dilation, 2)
        self.padding, self.output_padding = pair(padding, 2), pair(output_padding, 2)

    def fold(self, norm: BatchNorm) -> None:
        """Folds a batch norm; refused with groups, where weight channels are shared by groups."""
        if self.groups != 1:
            raise LoweringError(
                f"layer {self.path!r}: batch norm after a grouped transposed convolution cannot be folded"
            )
        super().fold(norm)

    @torch.no_grad()
    def bound(self, weight: Tensor, bias: Tensor | None) -> int:
        """As for the other layers; every kernel tap is counted, though a stride uses fewer."""
        offset = 0
        if bias is not None:
            offset = int(torch.ldexp(bias, self.accumulator_exponents()).abs().amax().item())
        codes = self.weight_quantizer.codes(weight).abs()
        codes = codes.view(self.groups, -1, *codes.shape[1:])
        return int(codes.sum((1, 3, 4)).amax().item()) * self.aligned_source().reach() + offset

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The transposed convolution."""
        return F.conv_transpose2d(
            x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )

    def node(self, x: Tensor) -> tuple[str, list[Any], dict[str, Any]]:
        """``ConvTranspose``."""
        if x.dim() != 4:
            raise LoweringError(
                f"layer {self.path or type(self).__name__!r} got a tensor of {x.dim()} axes, expected [N, C, H, W]; an "
                "example input has its batch on axis 0"
            )
        sizes = [
            (n - 1) * s - 2 * p + d * (k - 1) + o + 1
            for n, s, p, d, k, o in zip(
                x.shape[2:],
                self.stride,
                self.padding,
                self.dilation,
                self.kernel_size,
                self.output_padding,
                strict=True,
            )
        ]
        attrs = {
            "strides": list(self.stride),
            "pads": [*self.padding, *self.padding],
            "dilations": list(self.dilation),
            "groups": self.groups,
            "output_padding": list(self.output_padding),
        }
        return "ConvTranspose", [x.shape[0], self.out_channels, *sizes], attrs
