"""Brevitas quantisers that write QONNX nodes while torch exports the model they are part of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from edgemat.brevitas.recording import Call, Meaning
from edgemat.brevitas.rounding import float_thresholds, integers_of, rails, rounding_of
from edgemat.errors import UnsupportedOpError

DOMAIN = "qonnx.custom_op.general"


def replace_quantisers(
    model: nn.Module, quantisers: Mapping[str, nn.Module], calls: Mapping[nn.Module, list[Call]]
) -> None:
    """Gives every quantiser of `model` (a copy: it is spoilt for anything but export) a forward that emits nodes.

    Weights and biases become the quantised constants that the recorded pass saw, behind a Quant that states their
    scale; activations keep their activation function and end in a Quant; a truncation is written out.

    Raises:
        UnsupportedOpError: where a quantiser does something no Quant can say.
    """
    from brevitas.proxy.parameter_quant import ParameterQuantProxyFromInjector
    from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase, TruncQuantProxyFromInjector

    for name, part in quantisers.items():
        seen = calls.get(part)
        if seen is None:
            continue
        if isinstance(part, ParameterQuantProxyFromInjector):
            forward = _constant(part, seen)
        elif isinstance(part, ActQuantProxyFromInjectorBase):
            forward = _activation(name, part, seen[0].result)
        elif isinstance(part, TruncQuantProxyFromInjector):
            forward = _truncation(name, part, seen[0])
        else:
            forward = _clamp(seen[0].result)
        part.forward = MethodType(forward, part)
    _plain_tensors(model)


def _plain_tensors(model: nn.Module) -> None:
    """Layers hand plain tensors on: torch.export knows no others."""
    from brevitas.nn import QuantUpsample, QuantUpsamplingNearest2d, TruncAdaptiveAvgPool2d, TruncAvgPool2d

    for part in model.modules():
        if hasattr(part, "return_quant_tensor"):
            setattr(part, "return_quant_tensor", False)  # noqa: B010 (torch types every attribute as a module)
        for pool, plain in ((TruncAvgPool2d, nn.AvgPool2d), (TruncAdaptiveAvgPool2d, nn.AdaptiveAvgPool2d)):
            if isinstance(part, pool) and part.is_trunc_quant_enabled:
                part.forward = MethodType(_pooled(plain), part)
        if isinstance(part, (QuantUpsample, QuantUpsamplingNearest2d)) and part.mode == "nearest":
            part.forward = MethodType(nn.Upsample.forward, part)


def _pooled(plain: type[nn.Module]) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        result: Tensor = self.trunc_quant(plain.forward(self, x))
        return result

    return forward


def emit_quant(x: Tensor, meaning: Meaning, narrow: bool, rounding: str) -> Tensor:
    """One QONNX Quant node; float32 to the tracer."""
    attributes: dict[str, Any] = {"signed": int(meaning.signed), "narrow": int(narrow), "rounding_mode": rounding}
    given = (x, meaning.scale, meaning.zero_point, meaning.bit_width)
    made: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::Quant", given, attributes, dtype=torch.float32, shape=list(x.shape), version=1
    )
    return made


def _constant(part: Any, calls: list[Call]) -> Callable[..., Tensor]:
    """The quantised constants of the recorded calls in turn: a bias has one scale for each use of a shared layer."""
    narrow = bool(part.is_narrow_range)
    results = [call.result for call in calls]
    turn = [0]

    def forward(self: Any, x: Tensor, *rest: object) -> Tensor:
        meaning = results[turn[0] % len(results)]
        turn[0] += 1
        return emit_quant(meaning.value, meaning, narrow, "ROUND")

    return forward


def _activation(name: str, part: Any, meaning: Meaning) -> Callable[..., Tensor]:
    fused = part.fused_activation_quant_proxy
    narrow = bool(part.is_narrow_range) and not (meaning.signed and int(meaning.bit_width) == 1)
    mode = rounding_of(name, fused.tensor_quant, meaning, narrow)
    curve = fused.activation_impl
    if isinstance(curve, (nn.Sigmoid, nn.Tanh)) and meaning.scale.numel() == 1 and int(meaning.bit_width) <= 12:
        return _staircase(fused, meaning, narrow)

    def forward(self: Any, x: Tensor) -> Tensor:
        return emit_quant(fused.activation_impl(x), meaning, narrow, mode)

    return forward


def _staircase(fused: nn.Module, meaning: Meaning, narrow: bool) -> Callable[..., Tensor]:
    """A rising curve and its quantiser as thresholds: where torch's own function reaches each code."""
    low, high = rails(meaning, narrow)
    zero = int(meaning.zero_point)
    found = float_thresholds(fused, meaning, range(low - zero + 1, high - zero + 1))
    scale = float(meaning.scale)
    attributes: dict[str, Any] = {"out_scale": scale, "out_bias": (low - zero) * scale, "out_dtype": "FLOAT32"}

    def forward(self: Any, x: Tensor) -> Tensor:
        made: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::MultiThreshold", (x, found), attributes, dtype=torch.float32, shape=list(x.shape), version=1
        )
        return made

    return forward


def _truncation(name: str, part: Any, call: Call) -> Callable[..., Tensor]:
    """``(clamp(f(round(x / s + z) / t)) - z / t) * s * t`` in Brevitas' order of float32 operations."""
    before, after = call.source, call.result
    assert before is not None
    narrow = bool(part.is_narrow_range)
    integers = getattr(torch, integers_of(name, part.tensor_quant.float_to_int_impl))
    shift = torch.log2(after.scale / before.scale)
    factor = torch.exp2(torch.round(shift))
    if not bool((shift - torch.round(shift)).abs().max() < 1e-4):
        raise UnsupportedOpError(
            f"quantiser {name!r} truncates by {(after.scale / before.scale).reshape(-1)[0]:.6g}, expected a power of "
            "two; set restrict_scaling_type to power_of_two"
        )
    low, high = rails(after, narrow)

    def forward(self: Any, x: Tensor) -> Tensor:
        whole = torch.round(x / before.scale + before.zero_point)
        kept = torch.clamp(integers(whole / factor), float(low), float(high))
        return emit_quant((kept - after.zero_point) * after.scale, after, narrow, "ROUND")

    return forward


def _clamp(meaning: Meaning) -> Callable[..., Tensor]:
    """A clamp of integers (ClampQuantAccumulator) is a Quant with the scale the tensor has already."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return emit_quant(x, meaning, bool(self.is_narrow_range), "ROUND")

    return forward
