"""Accumulator-aware weights: a sum that P bits hold whatever the input, in any order, by construction (A2Q, A2Q+).

Let the input's codes span ``lo..hi`` and ``R = 2**(P-1) - 1``. With the sums ``S+`` of the positive and ``S-`` of the
negative weight codes (as magnitudes) every partial sum in any order, bias code b included, lies within ``+-R`` if

* A2Q (arXiv 2308.13504, equation 15): ``(S+ + S-) * max(|lo|, hi) + |b| <= R``; for N-bit inputs this is
  ``||q||_1 <= (2**(P-1) - 1) * 2**(signed - N)`` (an unsigned input reaches ``2**N - 1``, so a little more is allowed);
* A2Q+ (arXiv 2401.10432, equation 7): ``max(S+, S-) * (hi - lo) + |b| <= R``. Weights that sum to zero have
  ``S+ = S- = ||q||_1 / 2``, and the bound is ``||q||_1 <= (2**P - 2) / (2**N - 1)``, for unsigned inputs twice A2Q's.

**Weights.** ``w = g * v / n(v)`` for each output, ``n`` being ``||v||_1``, or ``2 * max(S+, S-)`` of v less its mean.
``g = 2**t`` is learned (`AccumulatorQuantizer.log2_norm`) and clamped to what the bound leaves; weights round toward
zero, so that codes only shrink: neither S+ nor S- can exceed what holds before rounding, and zero-centred weights need
not sum to zero afterwards.

**Bias.** It counts: b saturates at half of R, and the weights get what it leaves. The two caps are taken from the
rounded bias code, half a code wide: a sum of integers that stays below ``cap + 1`` is at most ``cap``.

**Batch norm** is folded first: ``W = s * w``, ``b = beta + c`` with ``c = (b0 - mean) * s``. Where W is too large the
batch norm's scale s is clamped to ``k * s``, in W and in c alike, with the largest ``k <= 1`` that fulfils
``|beta + k * c| + k * n(W) * M <= R - 1`` (M: `Sum.factor`; both in codes): one linear inequality for each sign. Steps
with batch statistics scale their result alike, ``beta + k * (y - beta)``, so that training sees what is deployed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.rounding import EXPONENT_LIMIT, range_frac

if TYPE_CHECKING:
    from edgemat.nn.batch_norm import BatchNorm
    from edgemat.nn.linear import WeightedLayer

BOUNDS = ("auto", "a2q", "a2q+")
_CANDIDATES = 8
_TINY = 1e-100
"""In place of a norm of 0: any quotient by it exceeds 1, and neither it nor its derivative overflows float64."""
_MARGIN = 1.0 - 2.0**-20
"""More than float32 loses in scaling a weight (six times 2**-24); for caps of less than 2**19 it costs no code."""


@dataclass(frozen=True)
class Sum:
    """What one sum must keep.

    Attributes:
        bits: P.
        low: Smallest code of the input, at most 0.
        high: Largest code of the input, at least 0.
        centred: Whether the bound is A2Q+'s.
        biased: Whether a bias shares the accumulator.
    """

    bits: int
    low: int
    high: int
    centred: bool
    biased: bool

    @property
    def room(self) -> int:
        """R: the largest magnitude of a partial sum."""
        return (1 << (self.bits - 1)) - 1

    @property
    def bias_limit(self) -> int:
        """Largest magnitude of a bias code."""
        return self.room // 2 if self.biased else 0

    @property
    def reach(self) -> int:
        """What one unit of the bounded sum of codes adds at most: of the L1 norm (A2Q), of S+ or S- (A2Q+)."""
        return self.high - self.low if self.centred else max(self.high, -self.low)

    @property
    def factor(self) -> float:
        """M: what one unit of `row_norms` adds at most."""
        return self.reach / 2 if self.centred else float(self.reach)

    def caps(self, bias: Tensor | None) -> Tensor:
        """Largest `row_norms` of weight codes before they round toward zero, float64 ``[outputs]`` or ``[]``.

        Args:
            bias: Integral bias codes, float64, or None.
        """
        left = torch.tensor(float(self.room), dtype=torch.float64) if bias is None else self.room - bias.abs()
        whole = torch.floor(left / max(self.reach, 1)) if self.reach else left.new_full(left.shape, 2.0**52)
        # Float division of integers below 2**53 may round a quotient up to the next integer: give that one back.
        whole = whole - (whole * self.reach > left).double()
        return (whole + 0.5) * _MARGIN * (2.0 if self.centred else 1.0)


def row_norms(weight: Tensor, axis: int, centred: bool) -> Tensor:
    """``||w||_1`` of each output, or, zero-centred, ``2 * max(S+, S-)``; float64 ``[outputs]``."""
    rows = weight.movedim(axis, 0).flatten(1)
    total = rows.abs().sum(1, dtype=torch.float64)
    # S+ and S- are (total + sum) / 2 and (total - sum) / 2.
    return total + rows.sum(1, dtype=torch.float64).abs() if centred else total


def project_onto_ball(rows: Tensor, radius: Tensor, centred: bool = False) -> Tensor:
    """The nearest rows (Euclidean distance) with ``||row||_1 <= radius`` (Duchi et al., ICML 2008, figure 1).

    Args:
        rows: ``[outputs, inputs]``, float64.
        radius: One for each row, at least 0.
        centred: Whether ``S+ <= radius / 2`` and ``S- <= radius / 2`` are asked for instead. The set is a product, so
            positive and negative entries are projected apart; rows that sum to zero go on doing so.
    """
    if centred:
        halves = radius / 2.0
        return project_onto_ball(rows.clamp_min(0.0), halves) - project_onto_ball((-rows).clamp_min(0.0), halves)
    if rows.shape[1] == 0:
        return rows
    size = rows.abs()
    ordered = size.sort(1, descending=True).values
    excess = ordered.cumsum(1) - radius[:, None]
    counts = torch.arange(1, rows.shape[1] + 1, dtype=rows.dtype, device=rows.device)
    last = (ordered * counts > excess).sum(1, keepdim=True).clamp_min(1)
    threshold = (excess.gather(1, last - 1) / last).clamp_min(0.0)
    return (size - threshold).clamp_min(0.0).copysign(rows)


class AccumulatorQuantizer(FixedQuantizer):
    """Quantises weights whose sums keep within a given accumulator.

    Attributes:
        log2_norm: t: log2 of each output's norm g before the clamp and before a batch norm is folded in; float32
            ``[outputs]``. Used once `started`.
        started: Whether `log2_norm` is set (by calibration or the first training step); before, g is the weight's own.

    Args:
        format: A format or its text; weights round toward zero (``TRN_ZERO``), which takes the place of the default
            ``RND``. SAT or SAT_SYM.
        bits: P, the accumulator's width, 2 to 64.
        outputs: Number of output channels.
        bound: ``"a2q"``, ``"a2q+"`` (zero-centred), or ``"auto"``, which `meet` settles.
        channels: Number of channels with a binary point each, or None for one.
        axis: Axis of the output channels.

    Raises:
        FormatError: for another rounding or overflow mode.
    """

    def __init__(
        self,
        format: str | Fixed = "fixed<8>",
        bits: int = 16,
        outputs: int = 1,
        bound: str = "auto",
        channels: int | None = None,
        axis: int = 0,
    ):
        fmt = Fixed.parse(format) if isinstance(format, str) else format
        if fmt.rounding not in ("RND", "TRN_ZERO") or fmt.overflow not in ("SAT", "SAT_SYM") or bound not in BOUNDS:
            raise FormatError(
                f"weights {fmt} with accumulator={bits} (bound {bound!r}), expected rounding TRN_ZERO (or none "
                f"stated), overflow SAT or SAT_SYM and one of the bounds {', '.join(BOUNDS)}; only rounding toward "
                "zero keeps a bound"
            )
        super().__init__(replace(fmt, rounding="TRN_ZERO"), channels=channels, axis=axis, role="weights")
        self.bits, self.bound, self.asked = bits, bound, bound
        self.log2_norm = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("started", torch.tensor(False))
        self.sum: Sum | None = None

    def meet(self, signed: bool) -> None:
        """Settles the bound ``"auto"`` for an input: zero-centring gains where it is unsigned, and only costs else."""
        if self.asked == "auto":
            self.bound = "a2q" if signed else "a2q+"

    @property
    def centred(self) -> bool:
        """Whether weights are zero-centred (A2Q+)."""
        return self.bound == "a2q+"

    def along(self, values: Tensor, weight: Tensor) -> Tensor:
        """One value for each output, laid out to broadcast against `weight`."""
        shape = [1] * weight.dim()
        shape[self.axis] = -1
        return values.view(shape)

    def real(self, weight: Tensor) -> Tensor:
        """``g * v / n(v)`` of the parameter v; v itself (zero-centred for A2Q+) until `started`."""
        if self.centred:
            axes = [d for d in range(weight.dim()) if d != self.axis]
            weight = weight - weight.mean(axes, keepdim=True) if axes else weight
        if not bool(self.started):
            if not (self.training and weight.requires_grad):
                return weight
            self.start(weight)
        norms = row_norms(weight, self.axis, self.centred)
        scale = self.norms() / norms.clamp_min(_TINY)
        return weight * self.along(torch.where(norms > 0.0, scale, 0.0).to(weight.dtype), weight)

    def norms(self) -> Tensor:
        """g of each output, float64."""
        return torch.exp2(self.log2_norm.double().clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT))

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """Sets `log2_norm` to that of `weight`."""
        norms = row_norms(weight, self.axis, self.centred)
        self.log2_norm.copy_(torch.where(norms > 0.0, norms, 1.0).log2().float())
        self.started.fill_(True)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Sets the binary point(s) of least squared error under the bound, from the finest that hold the range down.

        Coarser points leave a larger ball (in real numbers), finer ones round less.
        """
        if self.sum is None:
            super().fit(x)
            return
        rows = x.detach().double().movedim(self.axis, 0).flatten(1)
        if self.per_channel:
            ends = zip(rows.amin(1).tolist(), rows.amax(1).tolist(), strict=True)
            finest = torch.tensor([range_frac(a, b, self.grid) for a, b in ends], dtype=torch.float64)
        else:
            low, high = (v.item() for v in torch.aminmax(rows)) if rows.numel() else (0.0, 0.0)
            finest = torch.full((rows.shape[0],), float(range_frac(low, high, self.grid)), dtype=torch.float64)
        cap = self.sum.caps(None).expand(rows.shape[0])
        fracs = torch.stack([(finest - i).clamp_min(-EXPONENT_LIMIT) for i in range(_CANDIDATES)])
        errors = torch.stack([self._error(rows, frac, cap) for frac in fracs])
        if self.per_channel:
            self.set_frac(fracs.gather(0, errors.argmin(0, keepdim=True))[0].float())
        else:
            self.set_frac(float(fracs[int(errors.sum(1).argmin()), 0]) if rows.shape[0] else 0.0)

    def _error(self, rows: Tensor, frac: Tensor, cap: Tensor) -> Tensor:
        """Squared error of each row's projected and rounded codes."""
        scale = torch.exp2(frac)[:, None]
        codes = project_onto_ball(rows * scale, cap, self.centred).trunc().clamp(self.grid.low, self.grid.high)
        return (codes / scale - rows).square().sum(1)

    def extra_repr(self) -> str:
        """The format, for printing."""
        return f"{super().extra_repr()}, accumulator={self.bits}, bound={self.bound}"


@dataclass(frozen=True)
class Limit:
    """How far the bound shrinks a layer's parameters.

    Attributes:
        weights: Factor of the folded weights, float64 ``[outputs]``.
        batch_norm: k, the factor of the batch norm's scale.
        offset: beta (or the bias, without batch norm) within its limit, float64 ``[outputs]``, or None.
    """

    weights: Tensor
    batch_norm: Tensor
    offset: Tensor | None


def sum_of(layer: WeightedLayer, quantizer: AccumulatorQuantizer) -> Sum:
    """What the sums of `layer` must keep.

    Raises:
        FormatError: if the accumulator cannot hold a single product of a weight code 1.
    """
    source = layer.known_source()
    low, high = source.grid.low, source.grid.high
    if source.ready:
        lows, highs = source.format.channel_rails()
        low, high = int(lows.min()), int(highs.max())
    biased = layer.bias is not None or layer.norm is not None
    found = Sum(quantizer.bits, min(low, 0), max(high, 0), quantizer.centred, biased)
    least = found.reach + (2 + found.bias_limit if biased else 0)
    if found.room < least:
        needed = next(p for p in range(2, 80) if _holds(replace(found, bits=p)))
        raise FormatError(
            f"layer {layer.path or type(layer).__name__!r} has accumulator={quantizer.bits}, which cannot hold one "
            f"weight code times its input's codes {low} to {high}{' and a bias' if biased else ''}, expected at least "
            f"{needed} bits; widen the accumulator or narrow the input"
        )
    quantizer.sum = found
    return found


def _holds(candidate: Sum) -> bool:
    return candidate.room >= candidate.reach + (2 + candidate.bias_limit if candidate.biased else 0)


def _exponents(quantizer: AccumulatorQuantizer) -> Tensor:
    """Fractional bits, float64, rounded with a straight-through gradient."""
    frac = quantizer.frac.double()
    return frac + (frac.detach().round() - frac.detach())


def limit(layer: WeightedLayer, quantizer: AccumulatorQuantizer, weight: Tensor, bias: Tensor | None) -> Limit:
    """The factors that keep a layer's bound.

    Args:
        layer: The layer; its input's binary point need not be set yet (the bias is then left out of account).
        quantizer: Its weights' quantiser.
        weight: Folded weights (real numbers).
        bias: Folded bias, float64, or None.
    """
    goal = sum_of(layer, quantizer)
    norms = _folded_norms(layer, quantizer, weight)
    one = torch.ones_like(norms)
    if not quantizer.ready:
        return Limit(one, one, _constant(layer, bias))
    points = _exponents(quantizer).expand(norms.shape)
    steps = torch.exp2(points)
    codes = norms * steps
    source = layer.known_source()
    if bias is None or not source.ready:
        shrink = (goal.caps(None) / codes).clamp_max(1.0)
        return Limit(shrink, shrink, _constant(layer, bias))
    unit = steps * 2.0 ** source.exponent()
    top = float(goal.bias_limit)
    constant = _constant(layer, bias)
    assert constant is not None
    offset = (constant * unit).clamp(-top, top)
    load = codes * goal.factor
    slope: Tensor | float = 0.0
    if layer.norm is None:
        shrink = ((goal.room - 1 - offset.abs()) / load).clamp_max(1.0)
    else:
        slope = (bias - constant) * unit
        # Where a side does not rise with k, any k will do: the quotient by a tiny number is more than 1.
        sides = (((goal.room - 1 - s * offset) / (load + s * slope).clamp_min(_TINY)) for s in (1.0, -1.0))
        shrink = torch.minimum(*sides).clamp_max(1.0)
    rounded = layer.rounded_bias((offset + shrink * slope) / unit)
    exact = torch.ldexp(rounded.detach(), layer.accumulator_exponents()).expand(norms.shape)
    return Limit((goal.caps(exact) / codes).clamp_max(1.0), shrink, offset / unit)


def _folded_norms(layer: WeightedLayer, quantizer: AccumulatorQuantizer, weight: Tensor) -> Tensor:
    """`row_norms` of the folded weights, positive: from what `AccumulatorQuantizer.real` made them, where it did."""
    if not bool(quantizer.started):
        return row_norms(weight, quantizer.axis, quantizer.centred).clamp_min(_TINY)
    norms, scale = quantizer.norms(), layer.folding_scale()
    return norms if scale is None else (norms * scale.abs()).clamp_min(_TINY)


def _constant(layer: WeightedLayer, bias: Tensor | None) -> Tensor | None:
    """The part of the folded bias that a batch norm's scale does not multiply."""
    if bias is None or layer.norm is None:
        return bias
    return torch.zeros_like(bias) if layer.norm.bias is None else layer.norm.bias.double()


def limited(
    layer: WeightedLayer, quantizer: AccumulatorQuantizer, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Folded weights and bias, shrunk so that their codes keep the bound.

    Before the first calibration or training step the binary point is set here.
    """
    if not quantizer.ready:
        sum_of(layer, quantizer)
        quantizer._settle(weight)
    found = limit(layer, quantizer, weight, bias)
    weight = weight * quantizer.along(found.weights.to(weight.dtype), weight)
    if bias is None or found.offset is None:
        return weight, bias
    return weight, found.offset + found.batch_norm * (bias - _constant(layer, bias))


@torch.compiler.disable  # its statistics move between two uses, which a graph that is cut there cannot differentiate
def limited_batch_statistics(
    layer: WeightedLayer, quantizer: AccumulatorQuantizer, x: Tensor, norm: BatchNorm
) -> Tensor:
    """The layer and its batch norm with the batch's statistics, as large as the deployed layer's result will be.

    ``beta + k * (y - beta)`` of the batch norm's y is the batch norm of scale ``k * gamma`` and offset beta.

    Args:
        layer: The layer, a batch norm folded into it.
        quantizer: Its weights' quantiser.
        x: Input, float32.
        norm: The batch norm.
    """
    from edgemat.nn.batch_norm import count_batch

    real = layer.real_weight()
    if quantizer.observing:
        y = layer.apply_weight(x, real.float(), layer.bias)
        ahead = layer.next_quantizer if layer.quantizes_ahead else None
        return norm.normalize(y) if ahead is None else norm.normalize_quantized(y, ahead)
    weight, bias = layer.folded(real)
    if not quantizer.ready:
        sum_of(layer, quantizer)
        quantizer._settle(weight)
    found = limit(layer, quantizer, weight, bias)
    scale = layer.folding_scale()
    assert scale is not None and bias is not None and found.offset is not None
    factor = (found.weights * scale).detach().float()
    factor = torch.where(factor == 0.0, 1.0, factor)
    y = layer.apply_weight(x, quantizer.folded(real, factor).float(), layer.bias)
    gamma = found.weights.float() if norm.weight is None else (found.weights * norm.weight.double()).float()
    beta, momentum = found.offset.float(), count_batch(norm, y)
    if layer.quantizes_ahead:
        assert layer.next_quantizer is not None
        running = norm.running_mean, norm.running_var, momentum, norm.eps
        return layer.next_quantizer.normalized(y, gamma, beta, *running)
    return functional.batch_norm(y, norm.running_mean, norm.running_var, gamma, beta, True, momentum, norm.eps)


@torch.no_grad()
def project_weights(layer: WeightedLayer, quantizer: AccumulatorQuantizer) -> None:
    """Puts the layer's weights onto the bound, the nearest point of it for each output: the Euclidean-projection start.

    Outputs whose batch norm has the scale 0 keep theirs.
    """
    goal = sum_of(layer, quantizer)
    weight, bias = layer.folded()
    points = _exponents(quantizer).expand(layer.outputs)
    code = torch.zeros(layer.outputs, dtype=torch.float64)
    if bias is not None:
        code = torch.ldexp(layer.rounded_bias(bias), layer.accumulator_exponents()).expand(layer.outputs)
        code = code.abs().clamp_max(float(goal.bias_limit))
    # Within the caps, and within the inequality that limits a batch norm, so that neither shrinks what starts here.
    radius = torch.minimum(goal.caps(code), (goal.room - 1.0 - code) / max(goal.factor, 0.5)) * torch.exp2(-points)
    rows = weight.double().movedim(quantizer.axis, 0)
    flat = project_onto_ball(rows.flatten(1), radius, quantizer.centred)
    projected = flat.view(rows.shape).movedim(0, quantizer.axis)
    found = layer.folding_scale()
    scale = torch.ones(layer.outputs, dtype=torch.float64) if found is None else found
    wide = quantizer.along(scale, weight)
    layer.weight.copy_(torch.where(wide == 0.0, layer.weight.double(), projected / torch.where(wide == 0.0, 1.0, wide)))
    quantizer.start(layer.weight)


def accumulator_penalty(module: nn.Module) -> Tensor:
    """How far the learned norms lie above what their accumulators allow: add it to the loss, times 1e-3 or so.

    ``sum over layers and outputs of max(log2 g - log2 cap, 0)`` (arXiv 2308.13504, equation 22): above the cap the
    clamp stops the gradient of g, and this brings g back to where it learns.

    Args:
        module: The result of `edgemat.quantize`, or a module of edgemat.nn layers.

    Returns:
        A scalar, 0 where no layer bounds its accumulator.

    Raises:
        FormatError: for a float network, in which no sum can be bounded, or for what is no module.
    """
    from edgemat.nn.arguments import quantized
    from edgemat.nn.linear import WeightedLayer

    quantized("accumulator_penalty", module)

    total = torch.zeros(())
    for layer in module.modules():
        quantizer = layer.weight_quantizer if isinstance(layer, WeightedLayer) else None
        if isinstance(layer, WeightedLayer) and isinstance(quantizer, AccumulatorQuantizer) and quantizer.ready:
            goal = sum_of(layer, quantizer)
            weight, bias = layer.folded()
            norms = _folded_norms(layer, quantizer, weight)
            code = None
            if bias is not None and layer.known_source().ready:
                with torch.no_grad():
                    code = torch.ldexp(layer.rounded_bias(bias), layer.accumulator_exponents())
                    code = code.clamp(-goal.bias_limit, goal.bias_limit).expand(norms.shape)
            caps = goal.caps(code).log2() - _exponents(quantizer)
            total = total + (norms.log2() - caps).clamp_min(0.0).sum().float()
    return total
