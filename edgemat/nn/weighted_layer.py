"""`WeightedLayer`: quantised weights, an exact accumulator, and an optional batch norm folded in.

**Exactness.** Inputs are codes times ``2**-frac_x``, weights codes times ``2**-frac_w``; their products and sums lie on
the grid ``2**-(frac_x + frac_w)``, and so does the bias, so float arithmetic rounds nothing while every partial sum
stays below ``2**24`` (float32) or ``2**53`` (float64) LSBs. The static bound ``fan_in * |x| * |w|`` is tried first,
then ``max_o sum_i |w_oi| * |x| + |b_o|`` over the present codes.

**Batch norm.** With running statistics, ``scale = gamma / sqrt(var + eps)`` folds into the weights before they are
quantised, ``bias = beta + (b - mean) * scale`` is computed in float64: the deployed bits. While the batch norm trains,
the batch-statistics trick is used: the weights are quantised as they will be deployed, ``Q(w * scale) / scale``, and
the convolution's result goes through the ordinary batch norm, which updates its running statistics. Training therefore
sees folded, quantised weights; batch statistics and the rounding of the bias are the only differences from `eval()`.
Putting the batch norm into eval mode (frozen statistics) gives the deployed bits in training, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.nn import compiled
from edgemat.nn.accumulator import AccumulatorQuantizer
from edgemat.nn.accumulator_limit import limited, limited_batch_statistics
from edgemat.nn.batch_norm import BatchNorm, QuantBatchNorm, folded_scale
from edgemat.nn.emission import emit, exporting
from edgemat.nn.layer import FLOAT32_EXACT, Link, QuantLayer, exact_arithmetic
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.quantizers import bias_quantizer, weight_quantizer, weight_spec
from edgemat.nn.rounding import Grid, QuantizeChannels
from edgemat.nn.ternary_quantizer import Scales, TernaryQuantizer
from edgemat.nn.ternary_scale import emit_scaled, freeze_scales
from edgemat.nn.weights import folded_weight, layer_parameters
from edgemat.recipe import WeightSpec

_BIAS_LIMIT = 32


class WeightedLayer(QuantLayer):
    """Base of the layers with weights.

    Args:
        shape: Shape of the weight.
        outputs: Number of output channels.
        bias: Whether there is a bias.
        weights: Format of the weights, or everything a recipe says of them.
        bias_format: ``fixed<W>``, the width of the bias, at most 32 bits.
        input: Format of an own input quantiser, or None where `link` will name the producer.
        output: Format of the result, or None to keep the exact accumulator.
        relu: Whether a ReLU precedes the output quantiser.
        per_channel: Whether a learned binary point is learned per output channel.
    """

    out_axis = 0

    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        bias: bool,
        weights: str | Fixed | WeightSpec,
        bias_format: str | Fixed,
        input: str | Fixed | None,
        output: str | Fixed | FixedQuantizer | None,
        relu: bool,
        per_channel: bool,
    ):
        super().__init__(input, output, relu)
        width = (Fixed.parse(bias_format) if isinstance(bias_format, str) else bias_format).width
        if width > _BIAS_LIMIT:
            raise FormatError(f"a bias of {width} bits was asked for, expected at most {_BIAS_LIMIT}")
        self.weight = nn.Parameter(torch.empty(*shape))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        spec = weight_spec(weights, per_channel)
        grouped = self.out_axis == 1 and outputs != shape[1]
        label = f"a {type(self).__name__}"
        self.weight_quantizer = weight_quantizer(spec, shape, None if grouped else outputs, self.out_axis, label)
        self.bias_quantizer = bias_quantizer(spec, outputs) if bias else None
        self.outputs = outputs
        self.bias_grid = Grid.of(Fixed(width, 0))
        self.final = False
        self._narrow = True  # whether float32 held the sums of the last eager step with a bit to spare
        self._norm, self._heir = Link(), Link()
        self._formats: dict[str, Any] = {}
        self._scales: Scales | None = None
        if self.limiter is not None and self.input_quantizer is not None:
            self.limiter.meet(self.input_quantizer.signed)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation of the torch layer of the same name."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            fan_in = self.weight[0].numel() if self.out_axis == 0 else self.weight.shape[1] * self.weight[0, 0].numel()
            bound = fan_in**-0.5 if fan_in else 0.0
            nn.init.uniform_(self.bias, -bound, bound)

    def link(self, *quantizers: FixedQuantizer | None) -> None:
        """Names the quantiser whose values reach this layer."""
        super().link(*quantizers)
        source = self.source()
        if self.limiter is not None and source is not None:
            self.limiter.meet(source.signed)

    def bequeath(self, norm: QuantBatchNorm) -> None:
        """Names the batch norm that may quantise this layer's sums itself (`QuantBatchNorm.take_over`)."""
        self._heir = Link(norm)

    def leave(self, y: Tensor) -> Tensor:
        """Applies the output quantiser, if any, unless the batch norm behind this layer does so in its own pass."""
        heir = self._heir.modules
        if heir and heir[0].takes_sums:  # type: ignore[union-attr]
            return y
        return super().leave(y)

    # -- batch norm -----------------------------------------------------------------------------------------------
    def fold(self, norm: BatchNorm) -> None:
        """Folds a batch norm (registered elsewhere) into this layer."""
        self.bias_quantizer = None  # with batch statistics the bias is not rounded in training: no width to learn
        self._norm = Link(norm)

    @property
    def norm(self) -> BatchNorm | None:
        """The batch norm folded into this layer, or None."""
        found = self._norm.modules[0] if self._norm.modules else None
        assert found is None or isinstance(found, BatchNorm)
        return found

    def _along_outputs(self, values: Tensor) -> Tensor:
        shape = [1] * self.weight.dim()
        shape[self.out_axis] = -1
        return values.view(shape)

    @property
    def limiter(self) -> AccumulatorQuantizer | None:
        """The weights' quantiser where it bounds the accumulator, else None."""
        found = self.weight_quantizer
        return found if isinstance(found, AccumulatorQuantizer) else None

    def real_weight(self) -> Tensor:
        """The weight before a batch norm is folded in: the parameter, or with the norm a bounded accumulator leaves."""
        return self.weight if self.limiter is None else self.limiter.real(self.weight)

    def folding_scale(self) -> Tensor | None:
        """The factor of each output's weights in folding, float64, or None without a batch norm."""
        return None if self.norm is None else folded_scale(self.norm)

    def folded(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Weight (float32) and bias (float64, or None) with the running statistics folded in.

        Args:
            weight: `real_weight`, where the caller has it already.
        """
        norm = self.norm
        weight = self.real_weight() if weight is None else weight
        if norm is None:
            return weight, None if self.bias is None else self.bias.double()
        scale = folded_scale(norm)
        assert norm.running_mean is not None
        bias = -norm.running_mean.double() if self.bias is None else self.bias.double() - norm.running_mean.double()
        bias = bias * scale
        if norm.bias is not None:
            bias = bias + norm.bias.double()
        return weight * self._along_outputs(scale.float()), bias

    # -- the accumulator ------------------------------------------------------------------------------------------
    def accumulator_exponents(self) -> Tensor:
        """Fractional bits of the accumulator, int32, shape ``[]`` or ``[outputs]``."""
        return self.weight_quantizer.exponents() + self.aligned_source().finest()

    def quantized(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as deployed: values on their grids, float32 and float64."""
        weight, bias = self.folded()
        if self.limiter is not None:
            weight, bias = limited(self, self.limiter, weight, bias)
        weight = self.weight_quantizer(weight)
        return weight, None if bias is None else self.rounded_bias(bias)

    def rounded_bias(self, bias: Tensor) -> Tensor:
        """A bias on the accumulator's grid, float64; coarser where its own width is learned."""
        if self.bias_quantizer is not None:
            bias = self.bias_quantizer(bias.float()).double()
        exponents = self.accumulator_exponents().expand(self.outputs)
        points = self.weight_quantizer.frac.detach()
        return QuantizeChannels.apply(bias, points, self.bias_grid, exponents, 0, False, None).double()

    @torch.no_grad()
    def bound(self, weight: Tensor, bias: Tensor | None) -> int:
        """An upper bound of every partial sum, in LSBs of the accumulator."""
        if self.limiter is not None and 1 << (self.limiter.bits - 1) < FLOAT32_EXACT:
            return 1 << (self.limiter.bits - 1)
        source = self.aligned_source().reach()
        fan_in = weight.numel() // self.outputs
        offset = 0
        if bias is not None:
            offset = int(torch.ldexp(bias, self.accumulator_exponents()).abs().amax().item())
        static = fan_in * source * self.weight_quantizer.grid.magnitude + offset
        if static < 1 << 24:
            return static
        codes = self.weight_quantizer.codes(weight).abs()
        axes = [d for d in range(codes.dim()) if d != self.out_axis]
        return int(codes.sum(axes).amax().item()) * source + offset

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The float operator."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer; the result carries exact values of the accumulator or of the output format."""
        x = self.enter(x)
        if exporting():
            return self.leave(self.emit(x))
        with exact_arithmetic(x):
            norm = self.norm
            if norm is not None and norm.uses_batch_statistics:
                y = self._batch_statistics(x, norm)
                if self.quantizes_ahead:
                    return y
            else:
                y = self._exact(x)
        return self.leave(y)

    @property
    def quantizes_ahead(self) -> bool:
        """Whether batch norm with batch statistics and the next quantiser run in one pass here."""
        norm, quantizer = self.norm, self.next_quantizer
        return norm is not None and norm.uses_batch_statistics and quantizer is not None and quantizer.takes_affine

    def _exact(self, x: Tensor) -> Tensor:
        if self.observing:
            weight, bias = self.folded()
            if self.limiter is not None:
                weight, bias = limited(self, self.limiter, weight, bias)
            weight = self.weight_quantizer(weight)
            return self.apply_weight(x.float(), weight.float(), None if bias is None else bias.float())
        weight, bias, bound = self.deployed()
        if not torch.compiler.is_compiling():
            self._narrow = bound < FLOAT32_EXACT >> 1
        carrier = self.carrier(bound)
        y = self.apply_weight(
            x if x.dtype == carrier else x.to(carrier),
            weight if weight.dtype == carrier else weight.to(carrier),
            None if bias is None else bias.to(carrier),
        )
        # A loss takes float32; only the last layer's result is narrowed, and only while training.
        return y.float() if self.final and self.training else y

    def deployed(self) -> tuple[Tensor, Tensor | None, int]:
        """Weight and bias as deployed, and the bound of every partial sum."""
        quantizer = self.weight_quantizer
        if self.norm is None and quantizer.takes_rows(self.weight):
            source = self.aligned_source()
            if compiled.compiling() and not source.per_channel:
                sizes = self.bias_grid.width, source.grid.magnitude
                points = quantizer.frac, self.bias, source.frac, quantizer.grid
                w, b, top = compiled.parameters(self.weight, *points, sizes, self._narrow)
                return w, b, top - 1
            grids = quantizer.grid, self.bias, self.bias_grid, source.finest()
            found = layer_parameters(self.weight, quantizer.frac, *grids)
            if found is not None:
                weight, bias, most, offset = found
                return weight, bias, int(most) * source.reach() + int(offset)
        weight, bias = self.quantized()
        return weight, bias, self.bound(weight, bias)

    def _folded_weight(self, norm: BatchNorm) -> Tensor:
        """The weight of a step with batch statistics: quantised as it will be deployed, at its own size."""
        quantizer = self.weight_quantizer
        if quantizer.observing and not isinstance(quantizer, TernaryQuantizer):
            return self.weight
        if quantizer.takes_rows(self.weight):
            assert norm.running_var is not None
            if compiled.compiling():
                statistics = norm.weight, norm.running_var, norm.eps
                return compiled.fold(self.weight, quantizer.frac, quantizer.grid, statistics)
            found = folded_weight(
                self.weight, quantizer.frac, quantizer.grid, (norm.weight, norm.running_var, norm.eps)
            )
            if found is not None:
                return found
        with torch.no_grad():
            scale = folded_scale(norm).float()
            scale.masked_fill_(scale == 0.0, 1.0)
        return quantizer.folded(self.weight, scale).float()

    def _batch_statistics(self, x: Tensor, norm: BatchNorm) -> Tensor:
        if self.limiter is not None:
            return limited_batch_statistics(self, self.limiter, x.float(), norm)
        weight = self._folded_weight(norm)
        y = self.apply_weight(x.float(), weight, self.bias)
        if self.quantizes_ahead:
            assert self.next_quantizer is not None
            return norm.normalize_quantized(y, self.next_quantizer)
        return norm.normalize(y)

    @property
    def observing(self) -> bool:
        """Whether input or weights are real numbers, off their grids: in calibration, or before quantisation begins."""
        return self._takes_real()

    def _takes_real(self) -> bool:
        source = self.source()
        return self.weight_quantizer.observing or (source is not None and source.observing)

    # -- export ---------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def freeze(self) -> None:
        """Stores weight and bias codes and the texts of their formats."""
        super().freeze()
        if not self.weight_quantizer.ready:
            self.weight_quantizer._check_ready()
        trits = self.weight_quantizer if isinstance(self.weight_quantizer, TernaryQuantizer) else None
        if trits is not None:
            trits.check_deployable()
            if self.defers and self._deferred(trits):
                return
        weight, bias = self.quantized()
        self.carrier(self.bound(weight, bias))
        codes = self.weight_quantizer.codes(weight)
        self._formats = {"w_format": str(self.weight_quantizer.format), **self.weight_quantizer.promises}
        self.register_buffer("weight_codes", codes.to(torch.int32))
        exponents = self.accumulator_exponents()
        if self.limiter is not None:
            sums = Fixed(self.limiter.bits, 0, True, "TRN", "WRAP")
            self._formats["accumulator"] = str(sums.with_frac(exponents.tolist()))
        if bias is not None:
            self.register_buffer("bias_codes", torch.ldexp(bias, exponents).to(torch.int32))
            fracs = exponents.tolist()
            self._formats["b_format"] = str(Fixed(self.bias_grid.width, 0).with_frac(fracs))
        self._scales = None if trits is None else trits.scales
        if self._scales is not None:
            freeze_scales(self, self._scales, codes)

    def _deferred(self, trits: TernaryQuantizer) -> bool:
        """Leaves the trits to be made while they are written, where nothing else depends on them: no bias, no batch
        norm, no scale but the binary point, and a sum that float32 holds whatever the trits are."""
        plain = type(trits) is TernaryQuantizer and trits.scales is None and not self.weight_quantizer.promises
        if not plain or self.norm is not None or self.bias is not None or self.out_axis or self.weight.dim() != 2:
            return False
        if self.weight.shape[1] * self.aligned_source().reach() >= FLOAT32_EXACT:
            return False
        limit, scale = trits.measure(self.weight)
        trits.settle_scale(scale)
        self._formats, self._scales = {"w_format": str(trits.format)}, None
        self.defer("weight_codes", trits.rows(self.weight, limit))
        return True

    def emit(self, x: Tensor) -> Tensor:
        """Writes the node of this layer."""
        self.check_frozen()
        if self._scales is not None:
            return emit_scaled(self, self._scales, x, self._formats)
        tensors = [x, self.weight_codes]
        if "b_format" in self._formats:
            tensors.append(self.bias_codes)
        op, shape, attrs = self.node(x)
        return emit(op, tensors, shape, **self._formats, **attrs)

    def node(self, x: Tensor) -> tuple[str, list[Any], dict[str, Any]]:
        """Operator, output shape and attributes of this layer's node."""
        raise NotImplementedError
