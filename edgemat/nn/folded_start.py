"""Where weights with a batch norm folded in start: binary points and statistics that agree with each other.

Such weights are ``Q(w * s)`` with ``s = gamma / sqrt(running_var + eps)``. Rounding changes the spread of the sums, the
running variance follows it, and with it s: a training moves towards the s at which the sums of ``Q(w * s)`` have the
spread gamma again, whatever the error was at the s it began with. With few bits that s may be far away, or nowhere:
where the step is too fine, s grows until every weight saturates, and no gradient is left. A binary point is therefore
judged at the scale it will settle at. That scale follows from the size of the rounded weights: first as if inputs were
independent, then as the batches show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from edgemat.nn.batch_norm import BatchNorm, QuantBatchNorm
from edgemat.nn.learned_width import LearnedWidthQuantizer
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.statistics import StatisticsQuantizer
from edgemat.nn.weight_points import fit_part, fit_quantizer, limit_weights
from edgemat.nn.weighted_layer import WeightedLayer

ROUNDS = 2  # of choosing binary points and measuring what the statistics become with them
_OCTAVES = 2.0  # how far a scale is followed, up and down
_HALVINGS = 16
Moments = list[tuple[Tensor, Tensor]]
Norms = Sequence[BatchNorm | QuantBatchNorm]


def settled_factors(rows: Tensor, sizes: Tensor, fracs: Tensor, codes_of: Callable[[Tensor, float], Tensor]) -> Tensor:
    """The factor of each row at which its rounded values are as large as they shall be, between 1/4 and 4.

    Args:
        rows: Real weights, float64 ``[rows, weights]``.
        sizes: Root of the sum of squares each row shall have, float64 ``[rows]``; where it is 0 the factor is 1.
        fracs: Fractional bits per row.
        codes_of: Codes of the values times a factor (`FixedQuantizer.round_codes`).

    Returns:
        The smallest factors that reach the sizes, float64 ``[rows]``.
    """
    step = torch.exp2(fracs.double())
    low, high = torch.full_like(sizes, -_OCTAVES), torch.full_like(sizes, _OCTAVES)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        codes = codes_of(rows * (torch.exp2(middle) * step)[:, None], 1.0)
        small = codes.square().sum(1) < (sizes * step).square()
        low, high = torch.where(small, middle, low), torch.where(small, high, middle)
    return torch.where(sizes > 0.0, torch.exp2(high), 1.0)


def settled_points(
    rows: Tensor, sizes: Tensor, fracs: Tensor, codes_of: Callable[[Tensor, float], Tensor]
) -> tuple[Tensor, Tensor]:
    """The binary points whose error is least once the scales have settled, at equal sizes; the coarser of equals.

    Args:
        rows: Real weights, float64 ``[rows, weights]``.
        sizes: As for `settled_factors`.
        fracs: The points of the least error at the present scales; their neighbours are tried, too.
        codes_of: As for `settled_factors`.

    Returns:
        Fractional bits and the factors by which the scales will have changed, one per row.
    """
    wanted = rows * (sizes / sizes_of(rows).clamp_min(1e-300))[:, None]
    best = torch.full_like(sizes, float("inf"))
    points, factors = fracs.clone(), torch.ones_like(sizes)
    for move in (-1, 0, 1):
        tried = fracs + move
        found = settled_factors(rows, sizes, tried, codes_of)
        step = torch.exp2(tried.double())[:, None]
        values = codes_of(rows * found[:, None] * step, 1.0) / step
        reached = sizes_of(values)
        error = (values * (sizes / reached.clamp_min(1e-300))[:, None] - wanted).square().sum(1)
        # Where rails end the growth first there is no place to settle at: worse than any error of equal sizes.
        error = torch.where(reached < sizes, error + 4.0 * sizes.square(), error)
        better = (error < best) & (sizes > 0.0)
        best = torch.where(better, error, best)
        points, factors = torch.where(better, tried, points), torch.where(better, found, factors)
    return points, factors


def sizes_of(rows: Tensor) -> Tensor:
    """Root of the sum of squares of each row."""
    return rows.square().sum(1).sqrt()


def scale_variance(norm: BatchNorm, factors: Tensor) -> None:
    """Changes the running variance so that the folded scale changes by `factors`."""
    assert norm.running_var is not None
    var = (norm.running_var.double() + norm.eps) / factors.square() - norm.eps
    norm.running_var.copy_(var.clamp_min(0.0))


def estimated(norms: Norms, run: Callable[[], None]) -> Moments:
    """Means and variances that the norms see while `run` shows the batches; the running ones stay as they are."""
    buffers = [(norm.running_mean, norm.running_var, norm.num_batches_tracked) for norm in norms]
    kept = [[None if buffer is None else buffer.clone() for buffer in found] for found in buffers]
    try:
        for norm in norms:
            norm.estimating = True
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.zero_()
        run()
        return [(mean.clone(), var.clone()) for mean, var, _ in buffers if mean is not None and var is not None]
    finally:
        for norm, present, before in zip(norms, buffers, kept, strict=True):
            norm.estimating = False
            for buffer, value in zip(present, before, strict=True):
                if buffer is not None and value is not None:
                    buffer.copy_(value)


def set_statistics(norm: BatchNorm | QuantBatchNorm, moments: tuple[Tensor, Tensor], batches: int) -> None:
    """Gives a batch norm that never saw a batch the statistics of so many."""
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_(moments[0])
    norm.running_var.copy_(moments[1])
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(batches)


def move_statistics(norms: Norms, before: Moments, after: Moments) -> None:
    """Moves running statistics by what changed between two estimates on the same batches.

    Means move by the difference, variances by the ratio: where nothing changed the running ones stay what a whole
    training made them, however few the batches are.
    """
    for norm, (mean, var), (new_mean, new_var) in zip(norms, before, after, strict=True):
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.add_(new_mean - mean)
        norm.running_var.mul_((new_var + norm.eps) / (var + norm.eps))


class _Silent:
    """An observer that takes note of nothing."""

    def update(self, x: Tensor) -> None:
        """Does nothing."""


def _settles(layer: WeightedLayer) -> bool:
    """Whether the scale of the layer's weights is a batch norm's that moves, with a binary point for each."""
    quantizer = layer.weight_quantizer
    return (
        layer.norm is not None
        and not layer.norm.frozen
        and type(quantizer) is FixedQuantizer
        and quantizer.per_channel
        and not quantizer.stated
        and quantizer.grid.overflow in ("SAT", "SAT_SYM")
    )


class _Following:
    """The weights of a layer while its batch norm is brought to follow them, in units of the scale it came with."""

    def __init__(self, layer: WeightedLayer):
        assert layer.norm is not None
        self.quantizer, self.norm, weight = layer.weight_quantizer, layer.norm, layer.folded()[0].detach()
        self.rows = self.quantizer._rows(weight.double())
        # The statistics were made with real weights, or with the ones that are deployed at present.
        real = not self.quantizer.ready or self.quantizer.delayed
        self.sizes = sizes_of(self.rows if real else self.quantizer._rows(self.quantizer(weight).double()))
        fit_quantizer(self.quantizer, weight, "mse")
        self.start = self.quantizer.exponents()

    def choose(self) -> None:
        """Sets the binary points, and the running variance to what it will be with them."""
        codes_of = self.quantizer.round_codes
        points, factors = settled_points(self.rows, self.sizes, self.start, codes_of)
        self.quantizer.set_frac(points)
        scale_variance(self.norm, factors)

    def learn(self, before: Tensor, after: Tensor) -> None:
        """Takes the size of the rounded weights at the scale that was measured: inputs are not independent."""
        factors = ((before.double() + self.norm.eps) / (after.double() + self.norm.eps)).sqrt()
        step = torch.exp2(self.quantizer.exponents().double())
        self.sizes = sizes_of(self.quantizer.round_codes(self.rows * (factors * step)[:, None], 1.0)) / step


def real_statistics(module: nn.Module, norms: Norms, show: Callable[[], None]) -> Moments:
    """What the batch norms see of weights as they are: real numbers, or deployed values where they have points.

    Weights that are no roundings of real ones (K-hot, ternary, bipolar, of a bounded accumulator) are fitted first.
    """
    waiting = []
    for part in list(module.modules()):
        quantizer = getattr(part, "weight_quantizer", None)
        if not isinstance(quantizer, FixedQuantizer) or quantizer.ready:
            continue
        if type(quantizer) is FixedQuantizer or isinstance(quantizer, LearnedWidthQuantizer | StatisticsQuantizer):
            waiting.append(quantizer)
        else:
            fit_part(module, part, "mse")
    try:
        for quantizer in waiting:
            quantizer._observer = _Silent()
        return estimated(norms, show)
    finally:
        for quantizer in waiting:
            quantizer._observer = None


def fit_and_follow(module: nn.Module, norms: Norms, before: Moments, show: Callable[[], None]) -> None:
    """Fits all weights for the least error, and moves batch norms' statistics by what that changes in them."""
    parts = list(module.modules())
    following = {part.norm: _Following(part) for part in parts if isinstance(part, WeightedLayer) and _settles(part)}
    for part in parts:
        if not (isinstance(part, WeightedLayer) and part.norm in following):
            fit_part(module, part, "mse")
    present = [norm.running_var.clone() for norm in norms if norm.running_var is not None]
    after = before
    for _ in range(ROUNDS):
        for norm, (_, var), (_, new) in zip(norms, before, after, strict=True):
            if after is not before and norm in following:
                following[norm].learn(var, new)
        for found in following.values():
            found.choose()
        for part in parts:
            if isinstance(part, WeightedLayer | QuantBatchNorm):
                limit_weights(part)
        after = estimated(norms, show)
        for norm, var in zip(norms, present, strict=True):
            assert norm.running_var is not None
            norm.running_var.copy_(var)
    move_statistics(norms, before, after)
    for part in parts:
        follows = isinstance(part, QuantBatchNorm) or (isinstance(part, WeightedLayer) and part.norm is not None)
        if follows and not (isinstance(part, WeightedLayer) and part.norm in following):
            fit_part(module, part, "mse")
