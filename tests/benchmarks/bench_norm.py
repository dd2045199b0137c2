"""Norm and quantiser as one function that recomputes, against the same two one after the other: time and kept memory.

Every row is one training step of one layer (forward and backward) on an activation of the stated shape. *Unfused* is
torch's float norm followed by a straight-through quantiser (`FixedQuantizer`), what quantisation-aware training usually
runs; *exact* gives the deployed bits as ours does, by a straight-through sum of the float norm and the exact one;
*torch* is the fused function without its native passes. Kept: bytes that autograd holds between forward and backward,
the input itself and the result (the next layer keeps it) left out.

Times are of the processor with one thread, which other processes of the machine disturb least, else of the clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn

from edgemat.nn import FixedQuantizer, QuantLayerNorm, QuantRMSNorm, native
from edgemat.nn.normalization import QuantRowNorm

SHAPES = ((4096, 256), (4096, 512), (512, 2048), (64, 2048))
REPEATS = 15


def _kept(run: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes kept for backward, each storage once, without x and the result."""
    held: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = run(x)
    left_out = {x.untyped_storage().data_ptr(), y.untyped_storage().data_ptr()}
    return sum(size for at, size in held.items() if at not in left_out)


def _seconds(runs: list[Callable[[Tensor], Tensor]], x: Tensor) -> list[float]:
    """Median time of a step of each, taken in turns."""
    times: list[list[float]] = [[] for _ in runs]
    gradient = torch.randn(x.shape)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(REPEATS):
        for spent, run in zip(times, runs, strict=True):
            start = clock()
            run(x).backward(gradient)
            spent.append(clock() - start)
            x.grad = None
    return [statistics.median(spent) for spent in times]


def _exact_unfused(layer: QuantRowNorm, quantizer: FixedQuantizer) -> Callable[[Tensor], Tensor]:
    """The deployed bits by a straight-through sum: the float norm for the gradient, the exact one for the value."""

    def run(x: Tensor) -> Tensor:
        real = layer.real(x)
        with torch.no_grad():
            exact = quantizer(layer(x))
        return quantizer.adopt(real, exact)

    return run


def _without_native(layer: QuantRowNorm) -> Callable[[Tensor], Tensor]:
    """The layer in torch's operations, backward included: whether to go natively is settled in forward."""

    def run(x: Tensor) -> Tensor:
        with mock.patch.object(native, "kernel", lambda *tensors: None):
            return layer(x)

    return run


def main() -> None:
    """Prints the table: times and kept memory, and their ratios fused over unfused."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    print(f"float32 inputs on a grid of 8 bits, results of 8 bits, {threads} threads; medians of {REPEATS} steps")
    print(f"{'norm':<10} {'shape':<10} {'fused ms':>9} {'unfused ms':>11} {'/ unfused':>10} {'/ exact':>8}"
          f" {'/ torch':>8} {'kept MB':>8} {'unfused MB':>11} {'/ unfused':>10}")  # fmt: skip
    for kind in (QuantRMSNorm, QuantLayerNorm):
        for shape in SHAPES:
            source = FixedQuantizer("fixed<8,4>")
            x = source(torch.randn(shape)).detach().requires_grad_()
            fused = kind(shape[-1], input=None, output="fixed<8,4>")
            plain = kind(shape[-1], input=None, output=None)
            quantizer = FixedQuantizer("fixed<8,4>", role="requantize")
            for layer in (fused, plain):
                layer.link(source)
                nn.init.normal_(layer.weight)
                layer(x)

            def unfused(x: Tensor, layer: QuantRowNorm = plain, quantizer: FixedQuantizer = quantizer) -> Tensor:
                return quantizer(layer.real(x))

            runs = [fused, unfused, _exact_unfused(plain, quantizer), _without_native(fused)]
            spent = _seconds(runs, x)
            kept = [_kept(run, x) / 1e6 for run in runs]
            ratios = [spent[0] / other for other in spent[1:]]
            size = "x".join(map(str, shape))
            print(f"{kind.__name__[5:]:<10} {size:<10} {spent[0] * 1e3:9.2f} {spent[1] * 1e3:11.2f}"
                  f" {ratios[0]:10.2f} {ratios[1]:8.2f} {ratios[2]:8.2f} {kept[0]:8.2f} {kept[1]:11.2f}"
                  f" {kept[0] / max(kept[1], 1e-9):10.3f}")  # fmt: skip
