"""Layers with ternary or binary weights: `QuantLinear` and the convolutions with the weights of `ternary_quantizer`.

They need no multiplication by a weight: each input is added, subtracted or skipped. What the codes are, and how the
scale is deployed, is in `edgemat.nn.ternary_quantizer` and docs/ternary.md.
"""

from __future__ import annotations

from typing import Any

from edgemat.formats import BIPOLAR
from edgemat.nn import arguments
from edgemat.nn.convolution import QuantConv1d, QuantConv2d
from edgemat.nn.linear import QuantLinear
from edgemat.recipe import TERNARY, WeightSpec, checked_ternary


def ternary_weights(ternary: str, scale: str, per_channel: bool) -> WeightSpec:
    """The weights of a layer.

    Args:
        ternary: ``"absmean"``, ``"learned"``, ``"b1.58"``, ``"binary"`` or ``"onebit"``.
        scale: ``"power_of_two"``, ``"fixed<W>"`` or ``"free"``.
        per_channel: Whether each output has a scale of its own; ``b1.58`` has one for the tensor in any case.

    Raises:
        FormatError: for another kind.
    """
    kind, binary = checked_ternary(ternary)
    groups = "channel" if per_channel and kind != "b1.58" else "tensor"
    return WeightSpec(BIPOLAR if binary else TERNARY, groups, ternary=kind, scale=scale)


def _check_sizes(kind: str, shape: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Refuses channels and kernel sizes below 1."""
    for name, value in {
        **dict(zip(("in_channels", "out_channels", "kernel_size"), shape, strict=False)),
        **options,
    }.items():
        if name in ("in_channels", "out_channels", "kernel_size"):
            for size in value if isinstance(value, list | tuple) else (value,):
                arguments.whole(f"a {kind}'s {name}", size, 1)


class TernaryLinear(QuantLinear):
    """`torch.nn.Linear` with weights -1, 0, +1 (or -1, +1), ``[..., in_features]`` to ``[..., out_features]``.

    The latent weights `weight` are float32 ``[out_features, in_features]``.

    Args:
        in_features: Size of the last input axis.
        out_features: Size of the last output axis.
        bias: Whether there is a bias; published ternary layers have none.
        ternary: How trits are made: ``"absmean"``, ``"learned"``, ``"b1.58"``, ``"binary"`` or ``"onebit"``.
        scale: How the scale is deployed: ``"power_of_two"``, ``"fixed<W>"``, or ``"free"`` for training alone.
        per_channel: Whether each output has a scale of its own.
        options: `input`, `output`, `relu`, `bias_format`, `tokens` and `token_scale` of `QuantLinear`.

    Raises:
        FormatError: for sizes below 1, another kind or scale.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        ternary: str = "absmean",
        scale: str = "power_of_two",
        per_channel: bool = True,
        **options: Any,
    ):
        weights = ternary_weights(ternary, scale, per_channel)
        in_features = arguments.whole("a TernaryLinear's in_features", in_features, 1)
        out_features = arguments.whole("a TernaryLinear's out_features", out_features, 1)
        super().__init__(in_features, out_features, bias, weights=weights, **options)

    def extra_repr(self) -> str:
        """Sizes and kind, for printing."""
        return f"{super().extra_repr()}, {self.weight_quantizer.kind}"


class TernaryConv1d(QuantConv1d):
    """`torch.nn.Conv1d` with ternary weights, ``[N, C, L]`` to ``[N, O, L']``; arguments as `TernaryConv2d`."""

    def __init__(
        self,
        *shape: Any,
        bias: bool = False,
        ternary: str = "absmean",
        scale: str = "power_of_two",
        per_channel: bool = True,
        **options: Any,
    ):
        _check_sizes("TernaryConv1d", shape, options)
        super().__init__(*shape, bias=bias, weights=ternary_weights(ternary, scale, per_channel), **options)


class TernaryConv2d(QuantConv2d):
    """`torch.nn.Conv2d` with ternary weights, ``[N, C, H, W]`` to ``[N, O, H', W']``.

    Args:
        shape: `in_channels`, `out_channels`, `kernel_size`, and maybe `stride`, `padding`, `dilation` and `groups`.
        bias: Whether there is a bias.
        ternary: As for `TernaryLinear`; `scale` and `per_channel` as well.
        options: `stride`, `padding`, `dilation`, `groups` by name; `input`, `output`, `relu` and `bias_format`.

    Raises:
        FormatError: for sizes below 1, another kind or scale.
    """

    def __init__(
        self,
        *shape: Any,
        bias: bool = False,
        ternary: str = "absmean",
        scale: str = "power_of_two",
        per_channel: bool = True,
        **options: Any,
    ):
        _check_sizes("TernaryConv2d", shape, options)
        super().__init__(*shape, bias=bias, weights=ternary_weights(ternary, scale, per_channel), **options)
