"""How a layer exports trits whose scale is not a binary point: constants that multiply its sums, and maybe its inputs.

``y = behind * (trits @ (before * x)) + b``, every step exact: an `Affine` along axis 1, or, where the outputs of a
Linear lie on the last of three axes and more, a multiplication by a constant and an addition of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgemat.formats import Fixed
from edgemat.nn.emission import emit
from edgemat.nn.ternary_quantizer import Scales

if TYPE_CHECKING:
    from edgemat.nn.weighted_layer import WeightedLayer


def freeze_scales(layer: WeightedLayer, scales: Scales, codes: Tensor) -> None:
    """Stores the trits and the codes of the scales as buffers of the layer.

    Args:
        layer: The layer being frozen; its bias codes and formats are there already.
        scales: What to export beside the trits.
        codes: int64 codes of the scaled weights.
    """
    trits = torch.where(codes < 0, -1, 1) if scales.trits.bipolar else codes.sign()
    layer.register_buffer("weight_codes", trits.to(torch.int32))
    behind = scales.behind[0].expand(layer.outputs).contiguous()
    stated = layer._formats.get("b_format")
    parts = {"scale": (behind, scales.behind[1])}
    if stated is not None:
        parts["bias"] = layer.bias_codes, Fixed.parse(stated)
    if scales.before is not None:
        parts["input_scale"] = scales.before
        layer.register_buffer("no_input_bias", torch.zeros_like(scales.before[0], dtype=torch.int32))
    layer.register_buffer("no_bias", torch.zeros_like(behind, dtype=torch.int32))
    for name, (values, fmt) in parts.items():
        layer.register_buffer(f"{name}_codes", values.to(torch.int32))
        wide, text = _aligned(values, fmt)
        layer.register_buffer(f"{name}_constant", wide)
        layer._formats[f"{name}_constant"] = text


def _aligned(codes: Tensor, fmt: Fixed) -> tuple[Tensor, str]:
    """A constant operand with one binary point, the finest of its channels', and its format."""
    fracs = torch.tensor(fmt.fracs).expand(codes.shape)
    wide = codes.to(torch.int64) << (fmt.finest - fracs)
    width = min(64, max(fmt.width, int(wide.abs().max()).bit_length() + 1))
    return wide if width > 32 else wide.to(torch.int32), str(Fixed(width, width - fmt.finest))


def emit_scaled(layer: WeightedLayer, scales: Scales, x: Tensor, formats: dict[str, Any]) -> Tensor:
    """Writes the nodes of a frozen layer with scales.

    Args:
        layer: The layer.
        scales: What stands beside its trits.
        x: Its input.
        formats: The texts that freezing stored.
    """
    op, shape, attrs = layer.node(x)
    last = op == "Linear" and x.dim() > 2
    if scales.before is not None:
        x = _multiply(layer, x, ("input_scale", scales.before[1]), ("no_input_bias", None), last)
    y = emit(op, (x, layer.weight_codes), shape, w_format=formats["w_format"], **attrs)
    stated = formats.get("b_format")
    bias = ("no_bias", None) if stated is None else ("bias_codes", stated)
    return _multiply(layer, y, ("scale", scales.behind[1]), bias, last)


def _multiply(
    layer: WeightedLayer, x: Tensor, scale: tuple[str, Fixed], bias: tuple[str, str | None], last: bool
) -> Tensor:
    """``scale * x + bias`` along axis 1, or along the last axis of three and more where `last` says so."""
    scales, formats = layer._scales, layer._formats
    assert scales is not None
    name, stated = bias
    if not last:
        own: dict[str, Any] = {} if stated is None else {"b_format": stated}
        own |= {"khot": scales.khot} if scales.khot is not None else {}
        codes = getattr(layer, f"{scale[0]}_codes")
        return emit("Affine", (x, codes, getattr(layer, name)), x.shape, a_format=str(scale[1]), **own)
    y = x * _constant(layer, f"{scale[0]}_constant", formats)
    return y if stated is None else y + _constant(layer, "bias_constant", formats)


def _constant(layer: WeightedLayer, name: str, formats: dict[str, Any]) -> Tensor:
    codes = getattr(layer, name)
    return emit("Constant", (codes,), codes.shape, y_format=formats[name])
