"""`ThermometerEncoding`: pixels as unary bipolar channels, so that a network's first layer may be binary, too.

FracBNN (Zhang et al., arXiv 2012.12206) replaces the multi-bit input of a binary network by a
thermometer: a channel of R levels becomes R channels, of which channel r says whether the pixel reaches threshold r. A
brighter pixel turns more channels to +1, none back.

**As exact operators.** A comparison is a subtraction and its sign, so the layer is one depthwise convolution of kernel
1 with weights +1 and the thresholds as negative biases, requantised to bipolar: ``sign(x - t_r)``. Thresholds are
integer codes on the input's grid, ``t_r = (2 r + 1) * 2**(bits - 1) / R`` for r = 0 .. R - 1: the middles of R equal
parts of the range, a pixel equal to a threshold reaching it. (32 levels of a byte have the thresholds 4, 12, ..., 252
of the authors' code.)

**Cost.** ``C * R * H * W`` subtractions and no multiplication; one sign and one bias for each channel; and R signs
instead of 8 bits for a value that is sent on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgemat.errors import FormatError, LoweringError
from edgemat.formats import Fixed
from edgemat.nn.bipolar import BipolarQuantizer
from edgemat.nn.emission import emit, exporting
from edgemat.nn.layer import QuantLayer, exact_arithmetic


class ThermometerEncoding(QuantLayer):
    """``[N, C, H, W]`` (or ``[N, C, L]``) real values to ``[N, C * levels, ...]`` bipolar ones, level r of channel c at
    channel ``c * levels + r``.

    Args:
        channels: C, the channels of the input.
        levels: R, a power of two and at most ``2**bits`` of the input.
        input: Format of the input, unsigned with a stated binary point; by default 8-bit pixels scaled to [0, 1).

    Raises:
        FormatError: if the levels do not divide the input's range, or its format is signed or learned.
    """

    def __init__(self, channels: int, levels: int = 8, *, input: str | Fixed = "ufixed<8,0>"):
        fmt = Fixed.parse(input) if isinstance(input, str) else input
        if fmt.signed or fmt.int_bits is None or fmt.per_channel:
            raise FormatError(
                f"a thermometer encoding of {fmt} was asked for, expected an unsigned format with one stated binary "
                "point, such as 'ufixed<8,0>' for pixels in [0, 1)"
            )
        if levels < 1 or levels & (levels - 1) or levels > 1 << (fmt.width - 1):
            raise FormatError(
                f"a thermometer of {levels} levels was asked for, expected a power of two from 1 to "
                f"{1 << (fmt.width - 1)}, half the codes of {fmt}"
            )
        super().__init__(fmt, BipolarQuantizer(role="requantize"))
        self.channels, self.levels = channels, levels
        codes = (2 * torch.arange(levels) + 1) * (1 << (fmt.width - 1)) // levels
        self.register_buffer("thresholds", codes.repeat(channels), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compares with every threshold; -1 below, else +1."""
        if x.dim() not in (3, 4) or x.shape[1] != self.channels:
            raise LoweringError(
                f"layer {self.path or type(self).__name__!r} got a tensor of shape {tuple(x.shape)}, expected [N, "
                f"{self.channels}, L] or [N, {self.channels}, H, W]"
            )
        x = self.enter(x)
        if exporting():
            return self.leave(self._emit(x))
        with exact_arithmetic(x):
            assert self.input_quantizer is not None
            shape = [1, -1] + [1] * (x.dim() - 2)
            steps = torch.ldexp(self.thresholds.to(x.dtype), -self.input_quantizer.exponents())
            return self.leave(x.repeat_interleave(self.levels, dim=1) - steps.view(shape))

    def freeze(self) -> None:
        """Stores weights and biases of the comparing convolution."""
        super().freeze()
        assert self.input_quantizer is not None
        for rank in (1, 2):
            ones = torch.ones(self.channels * self.levels, 1, *[1] * rank, dtype=torch.int32)
            self.register_buffer(f"weight_codes_{rank}d", ones)
        self.register_buffer("bias_codes", -self.thresholds.to(torch.int32))
        frac = self.input_quantizer.exponent()
        self._b_format = str(Fixed(self.input_quantizer.width + 1, 0).with_frac(frac))

    def _emit(self, x: Tensor) -> Tensor:
        self.check_frozen()
        rank, outputs = x.dim() - 2, self.channels * self.levels
        weight = getattr(self, f"weight_codes_{rank}d")
        attrs = {"strides": [1] * rank, "pads": [0] * 2 * rank, "dilations": [1] * rank, "groups": self.channels}
        formats = {"w_format": "bipolar", "b_format": self._b_format}
        return emit("Conv", (x, weight, self.bias_codes), [x.shape[0], outputs, *x.shape[2:]], **formats, **attrs)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.channels}, levels={self.levels}"
