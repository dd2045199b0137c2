"""The products of weights and activations of each layer: whose bits meet whose, and how often."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgemat.errors import FormatError
from edgemat.nn import arguments
from edgemat.nn.activation import QuantPReLU
from edgemat.nn.batch_norm import QuantBatchNorm
from edgemat.nn.convolution import QuantConvTranspose2d, _Convolution
from edgemat.nn.layer import QuantLayer
from edgemat.nn.learned_activation import LearnedActivationQuantizer
from edgemat.nn.learned_width import LearnedWidthQuantizer, enclosed_bits, signed_digits
from edgemat.nn.linear import QuantLinear
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.weighted_layer import WeightedLayer

COSTED = (WeightedLayer, QuantBatchNorm, QuantPReLU)


@dataclass(frozen=True)
class Product:
    """One layer whose constants multiply its input.

    Attributes:
        name: Name of the layer in its network.
        layer: The layer.
        codes: int64 codes of its weights (scales, slopes), of the weights' shape.
        operand: Bits of each input channel's or feature's codes, sign included, float32 ``[inputs]``; differentiable.
        places: How often each weight multiplies for one sample.
    """

    name: str
    layer: QuantLayer
    codes: Tensor
    operand: Tensor
    places: int

    def bits(self) -> Tensor:
        """Bits of each weight between its highest and its lowest one; differentiable where widths are learned."""
        quantizer = self.layer.weight_quantizer
        return quantizer.bits() if isinstance(quantizer, LearnedWidthQuantizer) else enclosed_bits(self.codes)

    def digits(self) -> Tensor:
        """Nonzero signed digits of each weight; differentiable where widths are learned."""
        quantizer = self.layer.weight_quantizer
        return quantizer.digits() if isinstance(quantizer, LearnedWidthQuantizer) else signed_digits(self.codes)

    def bias_bits(self) -> Tensor:
        """Bits of all biases of learned width; 0 where there are none."""
        quantizer = getattr(self.layer, "bias_quantizer", None)
        return quantizer.bits().sum() if quantizer is not None else torch.zeros(())

    def by_input(self, values: Tensor) -> Tensor:
        """Sums a tensor of the weights' shape over all weights that multiply the same input: ``[inputs]``."""
        layer = self.layer
        if isinstance(layer, QuantLinear):
            return values.sum(0)
        if isinstance(layer, QuantConvTranspose2d):
            return values.sum(tuple(range(1, values.dim())))
        if isinstance(layer, _Convolution):
            outputs = values.shape[0] // layer.groups
            return values.reshape(layer.groups, outputs, values.shape[1], -1).sum((1, 3)).reshape(-1)
        return values.reshape(-1).expand(self.operand.shape)


def products(q: nn.Module) -> list[Product]:
    """The layers of `q` with weights, scales or slopes, in the order they are registered.

    The codes are those of the latest forward while training (where widths are learned), else of the present weights.

    Raises:
        FormatError: if there is none, one is not calibrated, or there was no forward, which tells sizes.
    """
    found = []
    for name, part in arguments.module("cost", q).named_modules():
        if isinstance(part, COSTED):
            if part.input_shape is None:
                raise FormatError(
                    f"layer {name or type(part).__name__!r} has not seen an input yet, expected one forward before a "
                    "cost is asked for, because sizes of maps are known then; call q(x) first"
                )
            found.append(Product(name, part, _codes(part), *_operand(part)))
    if not found:
        raise FormatError(
            f"{type(q).__name__} holds no layer of edgemat.nn with weights, expected a quantised module; call "
            "edgemat.quantize first"
        )
    return found


@torch.no_grad()
def _codes(layer: QuantLayer) -> Tensor:
    quantizer = layer.weight_quantizer
    if isinstance(quantizer, LearnedWidthQuantizer) and layer.training and quantizer.has_codes:
        return quantizer.codes_now()
    return quantizer.codes(_deployed(layer)[0])


@torch.no_grad()
def stored_codes(layer: QuantLayer) -> tuple[Tensor, Tensor | None]:
    """int64 codes of weights and bias as targets store them: weights aligned to the finest input channel."""
    values, bias = _deployed(layer)
    if bias is not None:
        bias = torch.ldexp(bias.double(), layer.accumulator_exponents()).to(torch.int64)
    codes, source = layer.weight_quantizer.codes(values), layer.aligned_source()
    if source.per_channel and isinstance(source, LearnedActivationQuantizer) and isinstance(layer, WeightedLayer):
        shifts = torch.where(source.widths() > 0, source.finest() - source.exponents(), 0)
        shape = [1] * codes.dim()
        shape[1 - layer.out_axis] = -1
        inputs = codes.shape[1 - layer.out_axis]
        if shifts.numel() <= inputs:  # a grouped convolution's channels differ by group, and are left as they are
            codes = codes << shifts.long().repeat_interleave(inputs // shifts.numel()).view(shape)
    return codes, bias


def _deployed(layer: QuantLayer) -> tuple[Tensor, Tensor | None]:
    """Weights and bias as deployed, on their grids."""
    if isinstance(layer, QuantBatchNorm):
        assert layer.running_mean is not None and layer.running_var is not None
        return layer.quantized(layer.running_mean, layer.running_var)
    if isinstance(layer, QuantPReLU):
        return layer.weight_quantizer(layer.weight), None
    assert isinstance(layer, WeightedLayer)
    return layer.quantized()


def source_bits(source: FixedQuantizer) -> Tensor:
    """Bits of a quantiser's codes, sign included, float32 ``[]`` or ``[channels]``; differentiable where learned."""
    if not isinstance(source, LearnedActivationQuantizer):
        return torch.tensor(float(source.width))
    magnitude = source.bits()
    return magnitude + (magnitude.detach() > 0) if source.signed else magnitude


def _operand(layer: QuantLayer) -> tuple[Tensor, int]:
    """Bits of each input, and how often each weight multiplies for one sample."""
    shape = layer.input_shape
    assert shape is not None
    bits = source_bits(layer.aligned_source())
    per_sample = math.prod(shape[1:])
    if isinstance(layer, QuantLinear):
        return _spread(layer, bits, layer.in_features), per_sample // layer.in_features
    if isinstance(layer, WeightedLayer):
        inputs = layer.in_channels  # type: ignore[attr-defined]
        operand = _spread(layer, bits, int(inputs))
        if isinstance(layer, QuantConvTranspose2d):
            return operand, per_sample // layer.in_channels
        _, result, _ = layer.node(torch.empty(shape, device="meta"))
        return operand, math.prod(result[2:])
    channels = shape[1] if len(shape) > 1 else 1
    return _spread(layer, bits, channels), per_sample // channels


def _spread(layer: QuantLayer, bits: Tensor, inputs: int) -> Tensor:
    """One entry per input; a flattened map repeats each channel's."""
    if bits.dim() == 0:
        return bits.expand(inputs)
    if inputs % bits.numel():
        raise FormatError(
            f"layer {layer.path or type(layer).__name__!r} takes {inputs} inputs from {bits.numel()} channels, "
            "expected a multiple; use activation_groups='tensor' for the layer before"
        )
    return bits.repeat_interleave(inputs // bits.numel())
