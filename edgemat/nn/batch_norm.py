"""Batch norm: folded into the layer before it, or kept as a fixed-point affine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemat.errors import FormatError, LoweringError
from edgemat.formats import Fixed
from edgemat.nn import compiled, stage
from edgemat.nn.affine import BatchAffine, batch_statistics
from edgemat.nn.emission import emit, exporting
from edgemat.nn.layer import Link, QuantLayer, exact_arithmetic
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.quantizers import weight_quantizer, weight_spec
from edgemat.nn.rounding import Grid, QuantizeChannels
from edgemat.recipe import WeightSpec


class BatchNorm(nn.Module):
    """Parameters and statistics of a batch norm, under the names of `torch.nn.BatchNorm2d`.

    On its own this module is the identity: `edgemat.quantize` leaves it where the user's batch norm was, and the layer
    before it, into which it is folded, does the work. Put it into eval mode to freeze the statistics.

    Attributes:
        frozen: Whether the running statistics stay and are used in training, too (`edgemat.freeze_batch_norm`).

    Args:
        norm: The torch module whose parameters and statistics are taken over.
    """

    frozen = False

    def __init__(self, norm: nn.Module):
        super().__init__()
        if getattr(norm, "running_mean", None) is None:
            raise LoweringError(
                "a batch norm without running statistics cannot be deployed; use track_running_stats=True"
            )
        self.weight: nn.Parameter | None = norm.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = norm.bias  # type: ignore[assignment]
        self.eps = float(norm.eps)  # type: ignore[arg-type]
        self.momentum = norm.momentum
        self.num_features = int(norm.num_features)  # type: ignore[arg-type]
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.register_buffer("num_batches_tracked", norm.num_batches_tracked)
        self.estimating = False
        self.train(norm.training)

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether the statistics of the batch are used (and the running ones updated)."""
        return (self.training and not self.frozen) or self.estimating

    def normalize(self, x: Tensor) -> Tensor:
        """The float batch norm with the batch's statistics, updating the running ones."""
        momentum = count_batch(self, x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, momentum, self.eps)

    def normalize_quantized(self, x: Tensor, quantizer: FixedQuantizer) -> Tensor:
        """`normalize`, then `quantizer`, in one pass over the data."""
        assert self.running_mean is not None
        gamma = torch.ones_like(self.running_mean) if self.weight is None else self.weight
        beta = torch.zeros_like(self.running_mean) if self.bias is None else self.bias
        if type(quantizer) is FixedQuantizer and stage.available(x):
            grids = stage.Stage(None, None, quantizer.grid, quantizer.relu, None)
            y, mean, var = stage.apply(x, gamma, beta, None, (None, quantizer.frac, None), self.eps, grids)
            move_statistics(self, x, mean, var)
            return y
        if compiled.compiling():
            return quantizer(compiled.normalize(self, x))
        momentum = count_batch(self, x)
        return quantizer.normalized(x, gamma, beta, self.running_mean, self.running_var, momentum, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """The identity."""
        return x

    def extra_repr(self) -> str:
        """Size, for printing."""
        return f"{self.num_features}, folded"


def count_batch(norm: BatchNorm | QuantBatchNorm, x: Tensor) -> float:
    """Counts a batch and gives the weight of its statistics in the running ones."""
    assert norm.num_batches_tracked is not None
    if x.numel() == x.shape[1]:
        raise FormatError(f"batch statistics of one value per channel (input {tuple(x.shape)}), expected more than one")
    norm.num_batches_tracked.add_(1)
    if norm.momentum is None or norm.estimating:
        return 1.0 / float(norm.num_batches_tracked)
    return float(norm.momentum)  # type: ignore[arg-type]


@torch.no_grad()
def move_statistics(norm: BatchNorm | QuantBatchNorm, x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Counts a batch and moves the running statistics towards its mean and unbiased variance."""
    if compiled.compiling():
        compiled.move_statistics(norm, mean, var)
        return
    momentum = count_batch(norm, x)
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(var, momentum)


def update_statistics(norm: QuantBatchNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the batch per channel (axis 1); updates the running ones."""
    with torch.no_grad():
        momentum = count_batch(norm, x)
        assert norm.running_mean is not None and norm.running_var is not None
        return batch_statistics(x.detach().float(), norm.running_mean, norm.running_var, momentum)


def folded_scale(norm: BatchNorm) -> Tensor:
    """``gamma / sqrt(running_var + eps)``, float64, shape ``[channels]``."""
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    return scale if norm.weight is None else scale * norm.weight.double()


class QuantBatchNorm(QuantLayer):
    """Batch norm as a fixed-point affine, ``Requantize(a * x + b)`` per channel (axis 1), QFX's way.

    ``a = gamma / sqrt(var + eps)`` in the format `weights`, ``b = beta - mean * a`` (the unrounded a) on the grid of
    the product. While training, the batch's statistics take the place of the running ones, and b stays real.

    Attributes:
        frozen: Whether the running statistics stay and are used in training, too (`edgemat.freeze_batch_norm`).

    Args:
        norm: The torch batch norm whose parameters and statistics are taken over, or the number of channels.
        weights: Format of a.
        bias_format: Width of b, at most 32 bits.
        input: Format of an own input quantiser, or None where `link` names the producer.
        output: Format of the result.
        per_channel: Whether a learned binary point of a is one per channel.
    """

    frozen = False

    def __init__(
        self,
        norm: nn.Module | int,
        *,
        weights: str | Fixed | WeightSpec = "fixed<8>",
        bias_format: str | Fixed = "fixed<32>",
        input: str | Fixed | None = "fixed<8>",
        output: str | Fixed | FixedQuantizer | None = "fixed<8>",
        relu: bool = False,
        per_channel: bool = True,
    ):
        super().__init__(input, output, relu)
        norm = nn.BatchNorm1d(norm) if isinstance(norm, int) else norm
        plain = BatchNorm(norm)
        self.weight, self.bias = plain.weight, plain.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(plain, name))
        self.eps, self.momentum, self.num_features = plain.eps, plain.momentum, plain.num_features
        spec = weight_spec(weights, per_channel)
        label, shape = f"a {type(self).__name__}", (self.num_features,)
        self.weight_quantizer = weight_quantizer(spec, shape, self.num_features, 0, label)
        width = (Fixed.parse(bias_format) if isinstance(bias_format, str) else bias_format).width
        self.bias_grid = Grid.of(Fixed(width, 0))
        self.final = False
        self.estimating = False
        self._maker, self._relu = Link(), Link()
        self._formats: dict[str, Any] = {}

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether the statistics of the batch are used (and the running ones updated)."""
        return (self.training and not self.frozen) or self.estimating

    @property
    def quantizes_ahead(self) -> bool:
        """Whether the affine with batch statistics and the next quantiser run in one pass."""
        quantizer = self.next_quantizer
        return self.uses_batch_statistics and quantizer is not None and quantizer.takes_affine

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance per channel: of the batch (updating the running ones), or the running ones."""
        assert self.running_mean is not None and self.running_var is not None
        if self.uses_batch_statistics:
            return update_statistics(self, x)
        return self.running_mean, self.running_var

    def real_affine(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """a and b before rounding, float64."""
        a = torch.rsqrt(var.double() + self.eps)
        if self.weight is not None:
            a = a * self.weight.double()
        b = -mean.double() * a
        return a, b if self.bias is None else b + self.bias.double()

    def quantized(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """a (float32) and b (float64) on their grids."""
        a, b = self.real_affine(mean, var)
        a = self.weight_quantizer(a.float())
        exponents = self.accumulator_exponents().expand(self.num_features)
        b = QuantizeChannels.apply(b, self.weight_quantizer.frac.detach(), self.bias_grid, exponents, 0, False, None)
        return a, b.double()

    def accumulator_exponents(self) -> Tensor:
        """Fractional bits of ``a * x + b``, int32, shape ``[]`` or ``[channels]``."""
        return self.weight_quantizer.exponents() + self.known_source().exponent()

    def forward(self, x: Tensor) -> Tensor:
        """Applies the affine along axis 1 of ``[N, C, ...]``."""
        x = self.enter(x)
        if exporting():
            self.check_frozen()
            return self.leave(emit("Affine", (x, self.scale_codes, self.bias_codes), x.shape, **self._formats))
        shape = [1, -1] + [1] * (x.dim() - 2)
        with exact_arithmetic(x):
            y = self._fused(x)
            if y is not None:
                return y
            first = self._joined(self._maker)
            x = x if first is None else first(x)
            if compiled.compiling() and self.uses_batch_statistics and not self.weight_quantizer.observing:
                y, quantizer = self._compiled(x.float()), self.next_quantizer
                ahead = quantizer is not None and self.output_quantizer is None and self.quantizes_ahead
                return quantizer(y) if ahead else self.leave(y)  # type: ignore[misc]
            mean, var = self.statistics(x)
            source = self.source()
            observing = self.weight_quantizer.observing or (source is not None and source.observing)
            if observing and not (self.training and self.uses_batch_statistics):
                a, b = self.real_affine(mean, var)
                return self.leave(torch.addcmul(b.float().view(shape), x.float(), a.float().view(shape)))
            if self.uses_batch_statistics:
                return self._batch_statistics(x.float(), mean, var)
            a, b = self.quantized(mean, var)
            reach = self.known_source().grid.magnitude * self.weight_quantizer.grid.magnitude
            offset = int(torch.ldexp(b.detach(), self.accumulator_exponents()).abs().amax().item())
            carrier = self.carrier(reach + offset)
            y = torch.addcmul(b.to(carrier).view(shape), x.to(carrier), a.to(carrier).view(shape))
        return self.leave(y.float() if self.final and self.training else y)

    # -- the stage: sums, affine and ReLU in single passes --------------------------------------------------------
    def take_over(self, maker: QuantLayer) -> None:
        """Names the layer whose output quantiser may join this batch norm's pass: nobody else takes its result."""
        self._maker = Link(maker)
        maker.bequeath(self)  # type: ignore[operator]

    def reach(self, relu: QuantLayer) -> None:
        """Names the ReLU, with a quantiser of its own, that may join this batch norm's pass."""
        self._relu = Link(relu)

    @property
    def _staged(self) -> bool:
        """Whether a training step may go through `edgemat.nn.stage`; known before the sums are."""
        quantizer = self.next_quantizer
        return (
            stage.possible()
            and self.uses_batch_statistics
            and not self.estimating
            and self.bias is not None
            and self.weight_quantizer.takes_rows(self.weight, False)
            and type(quantizer) is FixedQuantizer
            and quantizer.takes_affine
        )

    def _joined(self, link: Link) -> FixedQuantizer | None:
        """The output quantiser of a linked layer where this layer's stage contains it."""
        return stage.joining(link) if self._staged else None

    @property
    def takes_sums(self) -> bool:
        """Whether this batch norm quantises the sums of the layer before it, which hands them on as they are."""
        return self._joined(self._maker) is not None

    @property
    def reaches_relu(self) -> bool:
        """Whether this layer's pass contains the ReLU behind it and that ReLU's quantiser."""
        ahead = self.output_quantizer is None and self.quantizes_ahead
        return ahead or self._joined(self._relu) is not None

    def _fused(self, x: Tensor) -> Tensor | None:
        """A training step of the stage natively; None where the general way must be taken."""
        if not self._staged or not stage.available(x) or x.numel() == x.shape[1]:
            return None
        first, third = self._joined(self._maker), self._joined(self._relu)
        factors, result = self.weight_quantizer, self.next_quantizer
        assert result is not None and self.weight is not None and self.bias is not None
        fracs = [None if q is None else q.frac for q in (first, result, third)]
        outer = [None if q is None else q.grid for q in (first, third)]
        grids = stage.Stage(outer[0], factors.grid, result.grid, result.relu, outer[1])
        y, mean, var = stage.apply(x, self.weight, self.bias, factors.frac, fracs, self.eps, grids)
        move_statistics(self, x, mean, var)
        return y

    def leave(self, y: Tensor) -> Tensor:
        """Applies the output quantiser, and that of a ReLU that has left it to this layer."""
        y = super().leave(y)
        third = self._joined(self._relu)
        return y if third is None else third(y)

    def _batch_statistics(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """The affine of a training step: a rounded, b real, as its grid is far finer than the statistics' noise."""
        a = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            a = a * self.weight
        b = -mean * a if self.bias is None else torch.addcmul(self.bias, mean, a, value=-1.0)
        a = self.weight_quantizer(a)
        quantizer = self.next_quantizer
        if quantizer is not None and self.quantizes_ahead:
            y, third = quantizer.affine(x, a, b, mean, var, self.eps), self._joined(self._relu)
            return y if third is None else third(y)
        y = BatchAffine.apply(x, a, b, mean, var, self.eps)
        return self.leave(y)

    def _compiled(self, x: Tensor) -> Tensor:
        """`_batch_statistics` for `torch.compile`, the statistics included."""
        mean, var = compiled.batch_statistics(self, x)
        a = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            a = a * self.weight
        b = -mean * a if self.bias is None else self.bias - mean * a
        shape = [1, -1] + [1] * (x.dim() - 2)
        return x * self.weight_quantizer(a).view(shape) + b.view(shape)

    @torch.no_grad()
    def freeze(self) -> None:
        """Stores the codes of a and b and the texts of their formats."""
        super().freeze()
        self.weight_quantizer._check_ready()
        assert self.running_mean is not None and self.running_var is not None
        a, b = self.quantized(self.running_mean, self.running_var)
        exponents = self.accumulator_exponents()
        self.register_buffer("scale_codes", self.weight_quantizer.codes(a).to(torch.int32))
        self.register_buffer("bias_codes", torch.ldexp(b, exponents).to(torch.int32))
        b_format = Fixed(self.bias_grid.width, 0).with_frac(exponents.tolist())
        self._formats = {"a_format": str(self.weight_quantizer.format), "b_format": str(b_format)}
        self._formats |= self.weight_quantizer.promises
