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
    from edgemat.nn.linear import WeightedLayer


def freeze_scales(layer: WeightedLayer, scales: Scales, codes: Tensor) -> None:
    """Stores the trits and the codes of the scales as buffers of the layer.

    Args:
        layer: The layer being frozen; its bias codes and formats are there already.
        scales: What to export beside the trits.
        codes: int64 codes of the scaled weights.
    """
    trits = torch.where(codes < 0, -1, 1) if scales.trits.bipolar else codes.sign()
    layer.register_buffer("weight_codes", trits.to(torch.int32))
    behind = scales.behind[0].expand(layer.outputs).to(torch.int32).contiguous()
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
        formats: Attributes of its node; ``b_format`` where it has a bias.
    """
    rest = {"khot": scales.khot} if scales.khot is not None else {}
    op, shape, attrs = layer.node(x)
    last = op == "Linear"
    if scales.before is not None:
        codes, fmt = layer.input_scale_codes, scales.before[1]
        x = _multiply(x, codes, fmt, layer.no_input_bias, None, rest, last)
    own = {key: value for key, value in formats.items() if key != "b_format"}
    y = emit(op, (x, layer.weight_codes), shape, **own, **attrs)
    stated = formats.get("b_format")
    bias = layer.no_bias if stated is None else layer.bias_codes
    return _multiply(y, layer.scale_codes, scales.behind[1], bias, stated, rest, last)


def _multiply(
    x: Tensor, codes: Tensor, fmt: Fixed, bias: Tensor, stated: str | None, rest: dict[str, Any], last: bool
) -> Tensor:
    """``codes * x + bias`` along axis 1, or along the last axis of three and more where `last` says so.

    `stated` is the format of the bias; without it the bias is 0.
    """
    if x.dim() == 2 or not last:
        own = {} if stated is None else {"b_format": stated}
        return emit("Affine", (x, codes, bias), x.shape, a_format=str(fmt), **own, **rest)
    y = x * _constant(codes, fmt)
    return y if stated is None else y + _constant(bias, Fixed.parse(stated))


def _constant(codes: Tensor, fmt: Fixed) -> Tensor:
    """A constant operand; channels of different binary points are brought to the finest."""
    fracs = torch.tensor(fmt.fracs).expand(codes.shape)
    wide = codes.to(torch.int64) << (fmt.finest - fracs)
    largest = int(wide.abs().max())
    width = min(64, max(fmt.width, largest.bit_length() + 1))
    kept = wide if width > 32 else wide.to(torch.int32)
    return emit("Constant", (kept,), kept.shape, y_format=str(Fixed(width, width - fmt.finest)))
