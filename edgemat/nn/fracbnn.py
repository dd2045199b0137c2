"""FracBNN: binary networks with fractional activations (Zhang et al., arXiv 2012.12206), every step in fixed point.

**Fractional activation.** A feature x becomes two signs, ``h = sign(x)`` and ``l = sign(2 x - h)``; ``2 h + l`` in
{-3, -1, 1, 3} is four times x rounded to two bits with thresholds -1/2, 0, 1/2. (The authors' code has the levels -1,
-1/3, 1/3, 1 and the thresholds -2/3, 0, 2/3: all of them 4/3 of these, a factor that the batch norms take in.)

**Precision gating** (PG, Zhang et al., arXiv 2002.07136). With bipolar weights w and integer sums
``H = w * h`` and ``L = w * l``, an output is ``2 H + L`` where ``H > t`` and ``2 H`` elsewhere, t a threshold per
channel: the low sign counts only where the high one promises a large result. Here the gate is the code of
``Requantize(H - t -> ufixed<1,1,RND,SAT>)``, which is 1 for ``H - t >= 1`` and else 0, and multiplies L; hardware may
skip L's sums where it is 0.

**Block** (half a `BasicBlock` of the authors' code). ``y = PG(x)``; batch norm; RPReLU ``p(y - a) + b`` with slopes per
channel (ReActNet, arXiv 2003.03488); ``+ x``, or where the map shrinks the concatenation of the 2x2 averages of x with
themselves; second batch norm. The formats of all steps are in docs/binary.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.nn.batch_norm import QuantBatchNorm
from edgemat.nn.bipolar import BipolarQuantizer
from edgemat.nn.convolution import QuantConv2d
from edgemat.nn.emission import emit, exporting
from edgemat.nn.join import QuantAdd
from edgemat.nn.layer import QuantLayer, exact_arithmetic
from edgemat.nn.linear import QuantLinear
from edgemat.nn.pooling import QuantAdaptiveAvgPool, QuantAvgPool
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.thermometer import ThermometerEncoding

FEATURES = "fixed<16,9>"
PARAMETERS = "fixed<12,4>"
_GATE_SHARPNESS = 5.0


class Gate(torch.autograd.Function):
    """1 where z > 0, else 0; the gradient of a sigmoid of steepness `_GATE_SHARPNESS`, as in PG."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        s = torch.sigmoid(_GATE_SHARPNESS * z)
        return grads[0] * _GATE_SHARPNESS * s * (1.0 - s)


class Floor(torch.autograd.Function):
    """Floor with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.floor()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def sum_scale(fan_in: int, factor: int = 1) -> int:
    """s of the power of two ``2**-s`` that brings sums of `fan_in` signs (times `factor`) near one.

    Args:
        fan_in: Terms of a sum, each +-1 and independent.
        factor: Mean square of what a term is multiplied by.
    """
    return round(0.5 * math.log2(fan_in * factor))


def sum_norm(channels: int, parameters: Fixed, scale: int, source: FixedQuantizer, output: str | Fixed) -> Any:
    """The batch norm of integer sums: `parameters` of the sums times ``2**-scale``, which costs nothing.

    Its factors are the codes of `parameters`, their binary point moved by `scale`.
    """
    assert isinstance(parameters.int_bits, int)
    weights = parameters.with_frac(parameters.fracs[0] + scale)
    made = QuantBatchNorm(channels, weights=weights, bias_format=bias_of(parameters, weights, source), input=None)
    made.output_quantizer = FixedQuantizer(output, role="requantize")
    made.link(source)
    return made


def bias_of(parameters: Fixed, weights: Fixed, source: FixedQuantizer) -> Fixed:
    """A bias of as many integer bits as `parameters` on the grid of the product."""
    assert isinstance(parameters.int_bits, int)
    return Fixed(parameters.int_bits + weights.fracs[0] + source.exponent())


class FractionalConv2d(QuantLayer):
    """The gated convolution of a fractional activation, ``[N, C, H, W]`` to ``[N, O, H', W']`` integer sums.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: Side of the kernel.
        stride: Step.
        padding: Zeros around the map: taps that add nothing.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, padding: int = 1):
        fan_in = in_channels * kernel_size**2
        super().__init__(None, FixedQuantizer(Fixed((3 * fan_in).bit_length() + 1).with_frac(0), role="requantize"))
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.stride, self.padding = stride, padding
        self.scale = sum_scale(fan_in)
        self.threshold = nn.Parameter(torch.zeros(out_channels))
        self.weight_quantizer = BipolarQuantizer(role="weights")
        self.high = BipolarQuantizer(role="requantize")
        self.low = BipolarQuantizer(role="requantize")
        self.gate = FixedQuantizer("ufixed<1,1>", role="requantize")
        self.fan_in = fan_in
        self.register_buffer("opened", torch.zeros(()), persistent=False)

    def thresholds(self) -> Tensor:
        """t as deployed: whole numbers, shape ``[O]``."""
        return Floor.apply(self.threshold * 2.0**self.scale)

    def gate_penalty(self, target: float = 1.0) -> Tensor:
        """Mean squared distance of the thresholds (in units of ``2**scale``) from `target`, PG's way.

        Added to the loss it drives thresholds up, so that fewer low sums count.
        """
        return (self.threshold - target).square().mean()

    def forward(self, x: Tensor) -> Tensor:
        """The gated sums; x is a feature map on a fixed-point grid."""
        x = self.enter(x)
        if exporting():
            return self.leave(self._emit(x))
        with exact_arithmetic(x):
            high = self.high(x)
            low = self.low(x + x - high.detach())
            self.carrier(3 * self.fan_in + 1)
            weight = self.weight_quantizer(self.weight)
            both = F.conv2d(torch.cat([high, low]).float(), weight, None, self.stride, self.padding)
            top, bottom = both.chunk(2)
            reach = top - self.thresholds().view(1, -1, 1, 1)
            gate = Gate.apply(reach * 2.0**-self.scale)
            if self.training:
                self.opened = gate.detach().mean()
            return self.leave(top + top + gate * bottom)

    @torch.no_grad()
    def freeze(self) -> None:
        """Stores weight and threshold codes."""
        super().freeze()
        signs = self.weight_quantizer.codes(self.weight_quantizer(self.weight))
        self.register_buffer("weight_codes", signs.to(torch.int32))
        codes = self.thresholds().clamp(-self.fan_in - 1, self.fan_in)  # beyond, the gate is always open or shut
        self.register_buffer("threshold_codes", codes.to(torch.int32).view(-1, 1, 1))
        width = (self.fan_in + 1).bit_length() + 1
        self._threshold_format = str(Fixed(width, width))

    def _emit(self, x: Tensor) -> Tensor:
        self.check_frozen()
        high = self.high(x)
        low = self.low(x + x - high)
        top, bottom = self._sums(high), self._sums(low)
        codes = self.threshold_codes
        level = emit("Constant", (codes,), codes.shape, y_format=self._threshold_format)
        return top + top + self.gate(top - level) * bottom

    def _sums(self, signs: Tensor) -> Tensor:
        outputs, _, *kernel = self.weight.shape
        sizes = [(n + 2 * self.padding - k) // self.stride + 1 for n, k in zip(signs.shape[2:], kernel, strict=True)]
        attrs = {"strides": [self.stride] * 2, "pads": [self.padding] * 4, "dilations": [1, 1], "groups": 1}
        shape = [signs.shape[0], outputs, *sizes]
        return emit("Conv", (signs, self.weight_codes), shape, w_format="bipolar", **attrs)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        outputs, inputs, kernel, _ = self.weight.shape
        return f"{inputs}, {outputs}, kernel_size={kernel}, stride={self.stride}, scale=2**-{self.scale}"


class QuantRPReLU(QuantLayer):
    """``p(x - before) + after`` per channel (axis 1), p a PReLU (ReActNet, arXiv 2003.03488).

    Args:
        channels: Number of channels.
        parameters: Format of both shifts and of the slopes, its binary point stated.
        output: Format of the result.
        input: Format of an own input quantiser, or None where `link` names the producer.
    """

    def __init__(
        self,
        channels: int,
        *,
        parameters: str | Fixed = PARAMETERS,
        output: str | Fixed = FEATURES,
        input: str | Fixed | None = None,
    ):
        super().__init__(input, output)
        self.before, self.after = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), 0.25))
        self.quantizer = FixedQuantizer(parameters, role="weights")

    def forward(self, x: Tensor) -> Tensor:
        """Shift, slope, shift; any shape with channels on axis 1."""
        x = self.enter(x)
        shape = [1, -1] + [1] * (x.dim() - 2)
        if exporting():
            self.check_frozen()
            low, high = (self._constant(codes, shape) for codes in (self.before_codes, self.after_codes))
            moved = x - low
            bent = emit("PRelu", (moved, self.slope_codes), x.shape, slope_format=self._format)
            return self.leave(bent + high)
        before, slope, after = (self.quantizer(p).double().view(shape) for p in (self.before, self.slope, self.after))
        source = self.source()
        with exact_arithmetic(x):
            if source is not None and not source.observing:
                self._check_reach(source)
            moved = x.double() - before
            return self.leave(torch.where(moved >= 0, moved, moved * slope) + after)

    def _check_reach(self, source: FixedQuantizer) -> None:
        """Refuses formats whose exact result a float64 may round."""
        own, given = self.quantizer, source
        up = max(own.exponent() - given.exponent(), 0)
        shifted = (given.grid.magnitude << up) + (own.grid.magnitude << max(given.exponent() - own.exponent(), 0))
        self.carrier(shifted * max(own.grid.magnitude, 1 << max(own.exponent(), 0)) * 2)

    def _constant(self, codes: Tensor, shape: list[int]) -> Tensor:
        laid = codes.view(shape[1:])
        return emit("Constant", (laid,), laid.shape, y_format=self._format)

    @torch.no_grad()
    def freeze(self) -> None:
        """Stores the codes of shifts and slopes."""
        super().freeze()
        self._format = str(self.quantizer.format)
        for name in ("before", "slope", "after"):
            codes = self.quantizer.codes(self.quantizer(getattr(self, name)))
            self.register_buffer(f"{name}_codes", codes.to(torch.int32))

    def extra_repr(self) -> str:
        """Size, for printing."""
        return f"{self.slope.numel()}"


class FracBNNBlock(QuantLayer):
    """One block of FracBNN, ``[N, C, H, W]`` features to ``[N, O, H / stride, W / stride]`` features.

    Args:
        in_channels: C.
        out_channels: O: C with stride 1, 2 C with stride 2.
        stride: 1 or 2; 2 needs even H and W.
        features: Format of every map between the steps, its binary point stated.
        parameters: Format of batch norms (times the sums' power of two), slopes and shifts.

    Raises:
        FormatError: if the channels do not fit the stride, or a format's binary point is to be learned.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        features: str | Fixed = FEATURES,
        parameters: str | Fixed = PARAMETERS,
    ):
        if stride not in (1, 2) or out_channels != stride * in_channels:
            raise FormatError(
                f"a FracBNNBlock of {in_channels} to {out_channels} channels with stride {stride} was asked for, "
                "expected as many channels with stride 1 or twice as many with stride 2"
            )
        carried, constants = _stated(features, "features"), _stated(parameters, "parameters")
        super().__init__(FixedQuantizer(carried, role="requantize"), FixedQuantizer(carried, role="requantize"))
        assert self.input_quantizer is not None
        self.conv = FractionalConv2d(in_channels, out_channels, 3, stride)
        self.conv.link(self.input_quantizer)
        sums = self.conv.output_quantizer
        assert sums is not None
        # A term's mean square is 4 + 1/2: the low sign counts at half of the places.
        self.norm1 = sum_norm(out_channels, constants, sum_scale(self.conv.fan_in, 4), sums, carried)
        self.activation = QuantRPReLU(out_channels, parameters=constants, output=carried)
        self.activation.link(self.norm1.output_quantizer)
        self.pool = QuantAvgPool(2, output=carried) if stride == 2 else None
        if self.pool is not None:
            self.pool.link(self.input_quantizer)
        self.add = QuantAdd(carried)
        shortcut = self.input_quantizer if self.pool is None else self.pool.output_quantizer
        self.add.link(self.activation.output_quantizer, shortcut)
        added = self.add.output_quantizer
        assert added is not None
        bias = bias_of(constants, constants, added)
        self.norm2 = QuantBatchNorm(out_channels, weights=constants, bias_format=bias, input=None, output=None)
        self.norm2.link(added)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the block."""
        x = self.enter(x)
        y = self.activation(self.norm1(self.conv(x)))
        if self.pool is not None:
            x = self.pool(x)
            x = torch.cat([x, x], 1)
        return self.leave(self.norm2(self.add(y, x)))


def _stated(format: str | Fixed, label: str) -> Fixed:
    fmt = Fixed.parse(format) if isinstance(format, str) else format
    if not isinstance(fmt.int_bits, int) or not fmt.signed or fmt.width > 22:
        raise FormatError(f"{label} is {fmt}, expected a signed format of at most 22 bits such as {FEATURES!r}")
    return fmt


class FracBNN(nn.Module):
    """A small FracBNN: thermometer, binary stem, blocks, global average, one layer of 8-bit weights.

    Args:
        classes: Number of outputs.
        width: Channels of the stem; each stage after the first doubles them and halves the map.
        blocks: Blocks of each stage.
        channels: Channels of the images, whose values lie in [0, 1).
        levels: Levels of the thermometer.
        features: Format of the maps between the steps.
        parameters: Format of batch norms, slopes and shifts.
    """

    def __init__(
        self,
        classes: int = 10,
        width: int = 16,
        blocks: tuple[int, ...] = (1, 1, 1),
        channels: int = 3,
        levels: int = 8,
        *,
        features: str | Fixed = FEATURES,
        parameters: str | Fixed = PARAMETERS,
    ):
        super().__init__()
        carried, constants = _stated(features, "features"), _stated(parameters, "parameters")
        fan_in = 9 * channels * levels
        self.encoding = ThermometerEncoding(channels, levels)
        sums = FixedQuantizer(Fixed(fan_in.bit_length() + 1).with_frac(0), role="requantize")
        options: dict[str, Any] = {"weights": "bipolar", "input": None, "output": sums}
        self.stem = QuantConv2d(channels * levels, width, 3, padding=1, bias=False, **options)
        self.stem.link(self.encoding.output_quantizer)
        self.norm = sum_norm(width, constants, sum_scale(fan_in), sums, carried)
        made = []
        for stage, count in enumerate(blocks):
            for index in range(count):
                stride = 2 if stage and not index else 1
                made.append(FracBNNBlock(width, width * stride, stride, features=carried, parameters=constants))
                width *= stride
        self.blocks = nn.Sequential(*made)
        self.pool = QuantAdaptiveAvgPool(1, output=carried)
        self.pool.link(made[-1].output_quantizer if made else self.norm.output_quantizer)
        self.classifier = QuantLinear(width, classes, weights="fixed<8>", input=None)
        self.classifier.link(self.pool.output_quantizer)
        self.classifier.final = True

    def gate_penalty(self, target: float = 1.0) -> Tensor:
        """Mean of the blocks' `FractionalConv2d.gate_penalty`."""
        parts = [part.gate_penalty(target) for part in self.modules() if isinstance(part, FractionalConv2d)]
        return torch.stack(parts).mean()

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, channels, H, W]`` in [0, 1) to ``[N, classes]``."""
        x = self.blocks(self.norm(self.stem(self.encoding(x))))
        return self.classifier(self.pool(x).flatten(1))
