"""Calibration: initial binary points from data, checkpoints keep them."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgemat.errors import EdgematError, FormatError
from edgemat.nn import arguments
from edgemat.nn.accumulator_limit import project_weights
from edgemat.nn.batch_norm import BatchNorm, QuantBatchNorm
from edgemat.nn.folded_start import ROUNDS, fit_and_follow, real_statistics, set_statistics
from edgemat.nn.learned_activation import LearnedActivationQuantizer
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.rounding import Grid, quantize_codes, range_frac
from edgemat.nn.weight_points import best_frac, fit_weights, limit_weights
from edgemat.nn.weighted_layer import WeightedLayer

METHODS = ("minmax", "percentile", "mse")
BATCH_NORMS = ("follow", "keep")
_KEPT = 1 << 15


class Statistics:
    """Range and a sample of the values one quantiser sees.

    Args:
        keep: Values kept of each batch for percentiles and squared errors, evenly spaced.
        channels: Whether `lows` and `highs` take note of the range of each channel (axis 1), 0 included.
    """

    def __init__(self, keep: int = _KEPT, channels: bool = False):
        self.low, self.high = float("inf"), float("-inf")
        self.keep, self.channels = keep, channels
        self.sample: list[Tensor] = []
        self.lows, self.highs = torch.zeros(()), torch.zeros(())

    def update(self, x: Tensor) -> None:
        """Takes note of one batch."""
        if x.numel() == 0:
            return
        flat = x.detach().reshape(-1)
        low, high = (v.item() for v in torch.aminmax(flat))
        if not (np.isfinite(low) and np.isfinite(high)):
            raise FormatError(f"calibration saw values from {low} to {high}, expected finite numbers; clean the data")
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.channels:
            rows = x.detach().movedim(1, 0).reshape(x.shape[1], -1)
            self.lows = torch.minimum(self.lows, rows.amin(1))
            self.highs = torch.maximum(self.highs, rows.amax(1))
        if self.keep:
            step = max(1, flat.numel() // self.keep)
            self.sample.append(flat[::step].to("cpu", torch.float64))

    def values(self) -> Tensor:
        """The sample, float64."""
        return torch.cat(self.sample)

    def frac(self, grid: Grid, method: str, percentile: float) -> int:
        """The binary point the method chooses for a format."""
        if self.low > self.high:
            return 0
        widest = range_frac(self.low, self.high, grid)
        if method == "minmax":
            return widest
        values = self.values()
        if method == "percentile":
            rest = (100.0 - percentile) / 200.0
            kept = values.sort().values
            low = float(kept[int(rest * (len(kept) - 1))])
            high = float(kept[len(kept) - 1 - int(rest * (len(kept) - 1))])
            return range_frac(low, high, grid)
        return best_frac(values, widest, lambda x, scale: quantize_codes(x, grid, scale, False))

    @torch.no_grad()
    def settle(self, part: FixedQuantizer, method: str, percentile: float) -> None:
        """Sets the learned binary point (and width) of the quantiser whose values these are."""
        frac = self.frac(part.grid, method, percentile)
        if part.tracks:
            part.seen[0], part.seen[1] = min(self.low, 0.0), max(self.high, 0.0)
        if not isinstance(part, LearnedActivationQuantizer):
            part.set_frac(frac)
        elif part.per_channel:
            part.fit_range(self.lows, self.highs, frac)
        else:
            part.fit_range(torch.tensor(self.low), torch.tensor(self.high), frac)


def calibrate(
    module: nn.Module,
    batches: Iterable[Any],
    method: str = "minmax",
    percentile: float = 99.99,
    max_batches: int | None = None,
    batch_norm: str = "follow",
) -> nn.Module:
    """Sets the binary points of activations from data and of weights from the weights, in place.

    Learned binary points start here; stated ones are kept. Batch norms that never saw a batch estimate their running
    statistics from the batches first, because weights are quantised with them folded in.

    With ``"mse"`` the statistics of the others follow: they move by what quantisation changes in them on these batches
    (those of one sample left out), and weights with a batch norm folded in get the binary points that have the least
    error there. Batch norms that `edgemat.freeze_batch_norm` froze stay as they are.

    Args:
        module: The result of `edgemat.quantize`, or a module built from edgemat.nn layers.
        batches: Tensors, tuples or lists (one item per input; a surplus item, such as a DataLoader's labels, is left
            out), or dicts by input name. Values are cast to float32.
        method: ``"minmax"`` holds everything seen, ``"percentile"`` the central part, ``"mse"`` minimises the squared
            error.
        percentile: The central part in percent.
        max_batches: Batches taken at most; None takes all.
        batch_norm: ``"follow"``, or ``"keep"`` for statistics that stay although the method is ``"mse"``.

    Returns:
        The module, in the mode it came in.

    Raises:
        FormatError: for an unknown method or treatment of batch norms, no batches, a module without quantisers, or
            values that are not finite.
    """
    if method not in METHODS:
        raise FormatError(f"calibration method is {method!r}, expected one of {', '.join(METHODS)}")
    if batch_norm not in BATCH_NORMS:
        raise FormatError(f"calibration: batch_norm is {batch_norm!r}, expected one of {', '.join(BATCH_NORMS)}")
    percentile = arguments.number("calibration: percentile", percentile, above=50, most=100)
    arguments.sequence("calibration", batches)
    limit = None if max_batches is None else arguments.whole("calibration: max_batches", max_batches, 1)
    if not any(isinstance(part, FixedQuantizer) for part in arguments.module("calibrate", module).modules()):
        raise FormatError(
            f"{type(module).__name__} holds no quantiser of edgemat.nn, expected a quantised module; call "
            "edgemat.quantize first and calibrate its result"
        )
    # Kept, because the batches are walked again if batch norms have to be estimated first.
    taken = list(itertools.islice(batches, limit))
    if not taken:
        raise FormatError("calibration got no batches, expected at least one; a generator can be used only once")
    modes = {part: part.training for part in module.modules()}
    norms = [part for part in module.modules() if isinstance(part, BatchNorm | QuantBatchNorm)]
    fresh = [norm for norm in norms if norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 0]
    observed = [
        part
        for part in module.modules()
        if isinstance(part, FixedQuantizer) and part.role != "weights" and not part.stated
    ]
    every = [part for part in module.modules() if isinstance(part, FixedQuantizer) and part.role != "weights"]
    moving = [norm for norm in norms if norm in fresh or not norm.frozen]
    shown = taken if fresh else [batch for batch in taken if _samples(batch) > 1]
    follow = method == "mse" and batch_norm == "follow" and bool(moving) and bool(shown)
    progress = _Progress(len(taken) * (1 + ROUNDS if follow else 2 if fresh else 1))

    def show(batches: Sequence[Any]) -> None:
        for batch in batches:
            observe(module, batch)
            progress.advance()

    def watch() -> None:
        for part in every:
            part._observer = Statistics(_KEPT if method != "minmax" else 0, part.per_channel)

    def settle() -> None:
        for part in observed:
            found = part._observer
            assert isinstance(found, Statistics)
            found.settle(part, method, percentile)

    try:
        module.eval()
        watch()
        with torch.no_grad():
            if follow:
                before = real_statistics(module, moving, lambda: show(shown))
                for norm, moments in zip(moving, before, strict=True):
                    if norm in fresh:
                        set_statistics(norm, moments, len(shown))
                settle()
                for part in every:
                    part._observer = None
                fit_and_follow(module, moving, before, lambda: show(shown))
            else:
                if fresh:
                    for norm in fresh:
                        norm.estimating = True
                    fit_weights(module, method)
                    show(taken)
                    for norm in fresh:
                        norm.estimating = False
                    watch()
                fit_weights(module, method)
                show(taken)
                settle()
        for part in module.modules():
            if isinstance(part, WeightedLayer | QuantBatchNorm):
                limit_weights(part)
            if isinstance(part, WeightedLayer) and part.limiter is not None:
                project_weights(part, part.limiter)
    finally:
        progress.close()
        for norm in norms:
            norm.estimating = False
        for part in every:
            part._observer = None
        for part, training in modes.items():
            part.training = training
    return module


def _samples(batch: Any) -> int:
    """Size of a batch's first axis."""
    item = batch
    if isinstance(batch, Mapping):
        item = next(iter(batch.values()))
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        item = batch[0]
    shape = np.shape(item)
    return int(shape[0]) if shape else 1


def observe(module: nn.Module, batch: Any) -> None:
    """Runs one calibration batch.

    Raises:
        FormatError: if the module cannot take it; names the shape and the layer that failed.
    """
    try:
        run(module, batch)
    except EdgematError:
        raise
    except RuntimeError as error:
        items = batch.values() if isinstance(batch, Mapping) else [batch] if hasattr(batch, "shape") else batch
        shapes = ", ".join(str(tuple(np.shape(item))) for item in items)
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise FormatError(
            f"calibration got a batch of shape {shapes}, which {_failed_layer(module, error)} cannot take ({reason}), "
            "expected batches of the shape the model is trained with"
        ) from error


def _failed_layer(module: nn.Module, error: BaseException) -> str:
    """The innermost named part of `module` whose forward raised `error`."""
    names = {id(part): name for name, part in module.named_modules() if name}
    found = "the model"
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            found = f"layer {names[id(owner)]!r} ({type(owner).__name__})"
        trace = trace.tb_next
    return found


def run(module: nn.Module, batch: Any) -> Any:
    """Calls the module on one batch of any accepted kind."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))

    def tensor(value: Any) -> Tensor:
        return torch.as_tensor(value).to(device=device, dtype=torch.float32)

    if isinstance(batch, Mapping):
        return module(**{str(k): tensor(v) for k, v in batch.items()})
    if isinstance(batch, Tensor | np.ndarray):
        return module(tensor(batch))
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return module(*(tensor(v) for v in batch[: _inputs(module, len(batch))]))
    raise FormatError(f"a calibration batch is a {type(batch).__name__}, expected a tensor, a tuple or a dict")


def _inputs(module: nn.Module, given: int) -> int:
    """How many items of a batch are inputs."""
    graph = getattr(module, "graph", None)
    if graph is not None:
        return min(given, sum(1 for node in graph.nodes if node.op == "placeholder"))
    import inspect

    parameters = [
        p
        for p in inspect.signature(module.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return min(given, len(parameters)) if parameters else given


class _Progress:
    """A bar on a terminal's stderr for work of more than two seconds."""

    def __init__(self, total: int):
        self.total, self.done, self.start = total, 0, time.monotonic()
        self.bar: Any = None
        self.task: Any = None

    def advance(self) -> None:
        """One batch is done."""
        self.done += 1
        if self.bar is None and time.monotonic() - self.start > 2.0 and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self.bar = Progress(console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("calibrating", total=self.total)
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)

    def close(self) -> None:
        """Removes the bar."""
        if self.bar is not None:
            self.bar.stop()
