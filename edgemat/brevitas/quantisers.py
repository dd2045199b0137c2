"""edgemat's learned binary points as quantisers of Brevitas layers.

``qnn.QuantLinear(8, 4, weight_quant=QFXWeight, weight_bit_width=4)`` and
``qnn.QuantReLU(act_quant=QFXActivation, bit_width=6)``: the width is chosen as Brevitas users choose it, the scale is
``2**-f`` with a learned f (`edgemat.nn.quantizer.FixedQuantizer`; docs/numerics.md, straight-through gradients). They
round halves to even, as Brevitas does, so that Brevitas' own exports of such a model say the truth.
"""

from __future__ import annotations

from typing import Any

import torch
from brevitas.inject import ExtendedInjector, value
from brevitas.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector
from torch import Tensor, nn

from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.rounding import power_of_two

_NEVER_NEGATIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid)


class _View(nn.Module):
    """What Brevitas asks a quantiser for that may regroup its input: this one does not."""

    def __init__(self) -> None:
        super().__init__()
        self.input_view_impl = nn.Identity()


class LearnedPoint(nn.Module):
    """A `FixedQuantizer` that answers as Brevitas' ``tensor_quant`` do: value, scale, zero point, bit width.

    Attributes:
        points: The quantiser; its parameter `frac` is learned.

    Args:
        fmt: Format without a binary point.
        channels: Channels with a binary point each, or None for one.
        axis: The channel axis.
        role: ``"weights"`` or ``"requantize"``.
        rank: Axes of the tensor, where the scale differs by channel.
    """

    def __init__(self, fmt: Fixed, channels: int | None, axis: int, role: str, rank: int = 0) -> None:
        super().__init__()
        self.points = FixedQuantizer(fmt, channels=channels, axis=axis, role=role)
        self.int_quant = _View()
        self._shape = () if channels is None else tuple(-1 if i == axis else 1 for i in range(rank))
        self.register_buffer("_zero", torch.tensor(0.0), persistent=False)
        self.register_buffer("_width", torch.tensor(float(fmt.width)), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Any, Any, Any]:
        """The rounded values of x and what they mean."""
        y = self.points(x)
        return y, power_of_two(-self.points.exponents()).reshape(self._shape), self._zero, self._width


class WeightPoints(LearnedPoint):
    """Quantises weights; the binary points start at the finest that hold them.

    Args:
        bit_width: Bits of a weight, 1 to 24.
        narrow_range: Whether the smallest code is left out.
        scaling_per_output_channel: Whether each output channel has a binary point.
        module: The layer, or a tuple of layers that share the quantiser.
    """

    def __init__(self, bit_width: int, narrow_range: bool, scaling_per_output_channel: bool, module: Any) -> None:
        layer = module[0] if isinstance(module, tuple) else module
        channels = int(layer.out_channels) if scaling_per_output_channel else None
        axis = int(layer.output_channel_dim)
        super().__init__(_format(bit_width, True, narrow_range), channels, axis, "weights", layer.weight.dim())

    def forward(self, x: Tensor) -> tuple[Tensor, Any, Any, Any]:
        """The rounded weights and what they mean."""
        if not self.points.ready:
            self.points.fit(x)
        return super().forward(x)


class ActivationPoints(LearnedPoint):
    """Quantises activations; the first training batch, or `edgemat.calibrate`, sets the binary point.

    Args:
        bit_width: Bits of a code, 1 to 24.
        signed: Whether codes are two's complement.
        narrow_range: Whether the smallest code is left out.
    """

    def __init__(self, bit_width: int, signed: bool, narrow_range: bool) -> None:
        super().__init__(_format(bit_width, signed, narrow_range), None, 1, "requantize")


def _format(bit_width: int, signed: bool, narrow: bool) -> Fixed:
    if bit_width != int(bit_width) or not (2 if signed and narrow else 1) <= bit_width <= 24:
        raise FormatError(
            f"bit_width is {bit_width}, expected a whole number up to 24; set weight_bit_width or bit_width"
        )
    if narrow and not signed:
        raise FormatError("narrow_range is set for unsigned codes, expected it for signed ones only; leave it out")
    return Fixed(int(bit_width), None, bool(signed), "RND_CONV", "SAT_SYM" if narrow else "SAT")


class QFXWeight(ExtendedInjector):
    """Weights with learned binary points: ``weight_quant=QFXWeight``.

    Settings, as keyword arguments of the layer with the prefix ``weight_`` or as attributes of a subclass: `bit_width`
    (8), `narrow_range` (False), `scaling_per_output_channel` (False).
    """

    proxy_class = WeightQuantProxyFromInjector
    tensor_quant = WeightPoints
    bit_width = 8
    signed = True
    narrow_range = False
    scaling_per_output_channel = False
    float_to_int_impl_type = "ROUND"


class QFXActivation(ExtendedInjector):
    """Activations with a learned binary point: ``act_quant=``, ``input_quant=`` or ``output_quant=QFXActivation``.

    Codes are unsigned behind a ReLU or a sigmoid, else signed. Settings: `bit_width` (8), `signed`, `narrow_range`
    (False), as keyword arguments of the layer (prefix ``input_`` and ``output_`` where they apply) or as attributes of
    a subclass.
    """

    proxy_class = ActQuantProxyFromInjector
    tensor_quant = ActivationPoints
    bit_width = 8
    narrow_range = False
    float_to_int_impl_type = "ROUND"

    @value
    def signed(act_impl=None):  # type: ignore[no-untyped-def]
        """Whether anything negative can arrive."""
        return not isinstance(act_impl, _NEVER_NEGATIVE)
