"""How a layer exports trits whose scale is not a binary point: constants that multiply its sums, and maybe its inputs.

``y = behind * (trits @ (before * x)) + b``, every step exact, by an `Affine` along axis 1. Where the channels of a
Linear lie on the last of three axes and more, that axis changes its place in front of the `Affine` and behind it.
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
    behind = scales.behind[0].expand(layer.outputs).contiguous().to(torch.int32)
    layer.register_buffer("scale_codes", behind)
    layer.register_buffer("no_bias", torch.zeros_like(behind))
    if scales.before is not None:
        before = scales.before[0].to(torch.int32)
        layer.register_buffer("input_scale_codes", before)
        layer.register_buffer("no_input_bias", torch.zeros_like(before))


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
    scales = layer._scales
    assert scales is not None
    name, stated = bias
    own: dict[str, Any] = {} if stated is None else {"b_format": stated}
    own |= {"khot": scales.khot} if scales.khot is not None else {}
    x = x.movedim(-1, 1) if last else x
    codes = getattr(layer, f"{scale[0]}_codes")
    y = emit("Affine", (x, codes, getattr(layer, name)), x.shape, a_format=str(scale[1]), **own)
    return y.movedim(1, -1) if last else y
