"""Where the binary points of weights start: what holds their range, or has the least squared error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from edgemat.formats import Fixed
from edgemat.nn.accumulator import AccumulatorQuantizer
from edgemat.nn.accumulator_limit import sum_of
from edgemat.nn.activation import QuantConstant
from edgemat.nn.batch_norm import QuantBatchNorm
from edgemat.nn.learned_width import LearnedWidthQuantizer
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.rounding import EXPONENT_LIMIT, Grid, range_frac
from edgemat.nn.weighted_layer import WeightedLayer

_CANDIDATES = 8


def best_frac(values: Tensor, widest: int, codes_of: Callable[[Tensor, float], Tensor]) -> int:
    """The binary point of the least squared error, from `widest` to finer ones; the coarser of equals.

    Args:
        values: float64.
        widest: The coarsest binary point tried.
        codes_of: Codes of the values times a factor (`FixedQuantizer.round_codes`).
    """
    errors = []
    for frac in range(widest, min(widest + _CANDIDATES, EXPONENT_LIMIT)):
        codes = codes_of(values, 2.0**frac)
        errors.append((float((codes * 2.0**-frac - values).square().sum()), frac))
    return min(errors)[1]


def fit_weights(module: nn.Module, method: str = "minmax") -> None:
    """Sets the binary points of all learned weights from their present values, batch norm folded in."""
    for part in module.modules():
        fit_part(module, part, method)


def fit_part(root: nn.Module, part: nn.Module, method: str) -> None:
    """`fit_weights` for one module; constants are looked up in `root`."""
    if isinstance(part, WeightedLayer):
        if part.limiter is not None:
            sum_of(part, part.limiter)
        fit_quantizer(part.weight_quantizer, part.folded()[0], method)
        if part.bias_quantizer is not None:
            part.bias_quantizer.fit(part.folded()[1])
    elif isinstance(part, QuantBatchNorm):
        assert part.running_mean is not None and part.running_var is not None
        fit_quantizer(part.weight_quantizer, part.real_affine(part.running_mean, part.running_var)[0].float(), method)
    elif isinstance(part, QuantConstant):
        fit_quantizer(part.weight_quantizer, _constant(root, part), method)
    elif hasattr(part, "weight_quantizer") and hasattr(part, "weight"):
        fit_quantizer(part.weight_quantizer, part.weight, method)  # type: ignore[arg-type]


def fit_quantizer(quantizer: FixedQuantizer, weight: Tensor, method: str) -> None:
    """Sets the learned binary points of a weights' quantiser; ``"mse"`` leaves learned widths at their range."""
    if quantizer.stated:
        return
    weight = weight.detach()
    quantizer.fit(weight)
    if method != "mse" or isinstance(quantizer, LearnedWidthQuantizer | AccumulatorQuantizer):
        return
    widest = quantizer.exponents()
    if not quantizer.per_channel:
        quantizer.set_frac(best_frac(weight.double().reshape(-1), int(widest), quantizer.round_codes))
        return
    rows = quantizer._rows(weight.double())
    fracs = [best_frac(row, int(f), quantizer.round_codes) for row, f in zip(rows, widest.tolist(), strict=True)]
    quantizer.set_frac(torch.tensor(fracs))


def _constant(root: nn.Module, part: QuantConstant) -> Tensor:
    if not part.target:
        return part.value
    owner, _, name = part.target.rpartition(".")
    found = getattr(root.get_submodule(owner), name)
    assert isinstance(found, Tensor)
    return found


@torch.no_grad()
def limit_weights(layer: WeightedLayer | QuantBatchNorm) -> None:
    """Coarsens learned weights where the bias, on the accumulator's grid, would not fit its width."""
    quantizer, source = layer.weight_quantizer, layer.source()
    if isinstance(layer, WeightedLayer):
        bias = layer.folded()[1]
    else:
        assert layer.running_mean is not None and layer.running_var is not None
        bias = layer.real_affine(layer.running_mean, layer.running_var)[1]
    if quantizer.stated or bias is None or source is None or not source.ready:
        return
    grid = layer.bias_grid
    if isinstance(quantizer, AccumulatorQuantizer):
        grid = Grid.of(Fixed(max(min(quantizer.bits - 1, grid.width), 2), 0, True, "RND", "SAT_SYM"))
    finest = [range_frac(min(b, 0.0), max(b, 0.0), grid) - source.finest() if b else None for b in bias.tolist()]
    present = quantizer.exponents().expand(len(finest)).tolist()
    limited = [f if limit is None else min(f, limit) for f, limit in zip(present, finest, strict=True)]
    if limited != present:
        quantizer.set_frac(torch.tensor(limited) if quantizer.per_channel else min(limited))
