"""Small Brevitas models for the tests: a branch for each kind of layer, so that one export covers all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import brevitas.nn as qnn
import torch
from brevitas.quant import (
    Int8ActPerTensorFixedPoint,
    Int8ActPerTensorFloat,
    Int8BiasPerTensorFixedPointInternalScaling,
    Int8BiasPerTensorFloatInternalScaling,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFixedPoint,
    Int8WeightPerTensorFloat,
    Int16Bias,
    Int32Bias,
    ShiftedUint8ActPerTensorFixedPoint,
    ShiftedUint8ActPerTensorFloat,
    SignedBinaryWeightPerTensorConst,
    SignedTernaryWeightPerTensorConst,
    TruncTo8bit,
    Uint8ActPerTensorFixedPoint,
    Uint8ActPerTensorFloat,
)
from brevitas.quant.fixed_point import Int8WeightPerChannelFixedPoint
from torch import Tensor, nn

PIXELS = (3, 6, 6)


@dataclass(frozen=True)
class Kind:
    """Quantisers of one kind of scale."""

    weight: Any
    channel: Any
    signed: Any
    unsigned: Any
    shifted: Any
    bias: Any


POWERS = Kind(
    Int8WeightPerTensorFixedPoint,
    Int8WeightPerChannelFixedPoint,
    Int8ActPerTensorFixedPoint,
    Uint8ActPerTensorFixedPoint,
    ShiftedUint8ActPerTensorFixedPoint,
    Int8BiasPerTensorFixedPointInternalScaling,
)
FLOATS = Kind(
    Int8WeightPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8ActPerTensorFloat,
    Uint8ActPerTensorFloat,
    ShiftedUint8ActPerTensorFloat,
    Int8BiasPerTensorFloatInternalScaling,
)
KINDS = {"powers of two": POWERS, "real scales": FLOATS}


def plain(x: Any) -> Tensor:
    """The values of a Brevitas tensor, or the tensor."""
    return x.value if isinstance(x, tuple) else x


class Sum(nn.Module):
    """A residual: a convolution plus its own input."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.conv = qnn.QuantConv2d(3, 3, 3, padding=1, weight_quant=kind.weight, bias_quant=Int16Bias)
        self.add = qnn.QuantEltwiseAdd(input_quant=kind.signed, output_quant=kind.signed)

    def forward(self, x: Any) -> Any:
        return self.add(self.conv(x), x)


class Joined(nn.Module):
    """Two tensors of one scale, concatenated: one quantiser serves both."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.conv = qnn.QuantConv2d(3, 2, 3, padding=1, weight_quant=kind.weight, bias_quant=Int16Bias)
        self.act = qnn.QuantIdentity(act_quant=kind.signed, return_quant_tensor=True)

    def forward(self, x: Any) -> Any:
        return torch.cat([self.act(self.conv(x)), self.act(x)], 1)


def row(*layers: nn.Module) -> nn.Sequential:
    """Layers in a row."""
    return nn.Sequential(*layers)


def linear(kind: Kind, *after: nn.Module, weight: Any = None, inputs: int = 108, **settings: Any) -> nn.Sequential:
    """A flattened image through a linear layer of 5 outputs, and what follows."""
    settings = {"bias_quant": Int16Bias, **settings}
    return row(nn.Flatten(), qnn.QuantLinear(inputs, 5, weight_quant=weight or kind.weight, **settings), *after)


def conv(kind: Kind, *after: nn.Module, layer: Any = qnn.QuantConv2d, weight: Any = None, **settings: Any) -> Any:
    """A convolution to 4 channels, and what follows."""
    settings = {"bias_quant": Int16Bias, "kernel_size": 3, **settings}
    return row(layer(3, settings.pop("outputs", 4), weight_quant=weight or kind.weight, **settings), *after)


def rounded(kind: Kind, mode: str) -> nn.Sequential:
    """A linear layer whose output rounds in one of Brevitas' ways."""
    return linear(kind, qnn.QuantIdentity(act_quant=kind.signed, bit_width=5, float_to_int_impl_type=mode))


Branch = Callable[[Kind], nn.Module]


def relu(kind: Kind, **settings: Any) -> nn.Module:
    """A quantised ReLU."""
    return qnn.QuantReLU(act_quant=kind.unsigned, **settings)


BRANCHES: dict[str, Branch] = {
    "linear": linear,
    "linear_float_bias": lambda k: linear(k, relu(k), bias_quant=None),
    "linear_bias_of_8_bits": lambda k: linear(k, relu(k), bias_quant=k.bias, weight_bit_width=3),
    "linear_by_channel": lambda k: linear(k, relu(k), weight=k.channel, bias_quant=Int32Bias),
    "linear_ternary": lambda k: linear(k, relu(k), weight=SignedTernaryWeightPerTensorConst, bias=False),
    "linear_binary": lambda k: linear(k, relu(k), weight=SignedBinaryWeightPerTensorConst, bias=False),
    "linear_output": lambda k: linear(k, output_quant=k.signed),
    "floor": lambda k: rounded(k, "floor"),
    "ceil": lambda k: rounded(k, "ceil"),
    "round_to_zero": lambda k: rounded(k, "round_to_zero"),
    "sigmoid": lambda k: linear(k, qnn.QuantSigmoid(act_quant=k.unsigned)),
    "tanh": lambda k: linear(k, qnn.QuantTanh(act_quant=k.signed, bit_width=6)),
    "hard_tanh": lambda k: linear(k, qnn.QuantHardTanh(act_quant=k.signed, min_val=-1.0, max_val=1.0)),
    "conv1d": lambda k: row(nn.Flatten(2), conv(k, relu(k, bit_width=4), layer=qnn.QuantConv1d, stride=2)),
    "conv2d": lambda k: conv(k, relu(k), nn.MaxPool2d(2), padding=1, weight_bit_width=4),
    "conv2d_by_channel": lambda k: conv(k, relu(k), weight=k.channel),
    "depthwise": lambda k: conv(k, relu(k), weight=k.channel, groups=3, outputs=3),
    "transpose1d": lambda k: row(nn.Flatten(2), conv(k, relu(k), layer=qnn.QuantConvTranspose1d, stride=2)),
    "transpose2d": lambda k: conv(k, relu(k), layer=qnn.QuantConvTranspose2d, stride=2, output_padding=1),
    "batch_norm": lambda k: conv(k, nn.BatchNorm2d(4), relu(k), bias=False),
    "sum": Sum,
    "cat": Joined,
    "max_pool": lambda k: nn.MaxPool2d(2),
    "average_floor": lambda k: qnn.TruncAvgPool2d(2, trunc_quant=TruncTo8bit),
    "average_round": lambda k: qnn.TruncAvgPool2d(3, bit_width=6),
    "average_all": lambda k: row(qnn.TruncAdaptiveAvgPool2d(1), linear(k, inputs=3)),
    "average_of_torch": lambda k: row(nn.AdaptiveAvgPool2d(1), qnn.QuantIdentity(act_quant=k.signed)),
    "shifted": lambda k: conv(k, qnn.QuantIdentity(act_quant=k.shifted), padding=1),
    "upsample": lambda k: qnn.QuantUpsample(scale_factor=2),
    "scale_bias": lambda k: row(
        qnn.QuantScaleBias(3, True, runtime_shape=(1, -1, 1, 1), weight_quant=k.weight, return_quant_tensor=False),
        relu(k),
    ),
    "hard_swish": lambda k: qnn.QuantHardSwish(act_quant=k.signed),
}


class Branches(nn.Module):
    """One quantised image through every branch.

    Args:
        kind: Its quantisers.
        names: Which branches; all by default.
    """

    def __init__(self, kind: Kind, names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.enter = qnn.QuantIdentity(act_quant=kind.signed, return_quant_tensor=True)
        self.branches = nn.ModuleDict({name: BRANCHES[name](kind) for name in names or BRANCHES})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The values of each branch, by name."""
        entered = self.enter(x)
        return {name: plain(branch(entered)) for name, branch in self.branches.items()}


def trained(model: nn.Module, *shape: int) -> nn.Module:
    """The model with settled statistics, batch norms that are no identity, in eval mode."""
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.weight, -1.0, 2.0)
                nn.init.uniform_(part.bias, -0.5, 0.5)
        for _ in range(2):
            model.train()(torch.randn(16, *shape))
    return model.eval()
