"""How many values overflow the rails of each format of a network, as deployed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from edgemat.formats import Fixed
from edgemat.lightning.network import Arguments, quantizers
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.rounding import Grid, open_interval, power_of_two, round_doubled_


def count_saturated(x: Tensor, fmt: Fixed, axis: int = 1) -> tuple[int, int]:
    """Values whose rounded code lies beyond the rails, and values in all.

    Channels of width 0 (pruned) and bipolar formats have no rails and count for nothing.

    Args:
        x: Real values, any shape, finite.
        fmt: The format, binary point included.
        axis: The channel axis, where the format differs by channel.
    """
    if fmt.bipolar or x.numel() == 0:
        return 0, 0
    x = x.detach() if x.dtype in (torch.float32, torch.float64) else x.detach().float()
    if not fmt.per_channel:
        bottom, top = open_interval(Grid.of(fmt), fmt.fracs[0], False, x.dtype == torch.float64)
        return int(((x <= bottom) | (x >= top)).sum()), x.numel()
    lows, highs = fmt.channel_rails()
    low, high = (torch.from_numpy(rail).to(x.device, torch.float64) for rail in (lows, highs))
    fracs = torch.tensor(fmt.fracs, device=x.device)
    live = torch.tensor([width > 0 for width in fmt.widths or (fmt.width,)], device=x.device)

    def laid(values: Tensor) -> Tensor:
        if values.numel() == 1:
            return values.reshape(())
        shape = [1] * x.dim()
        shape[axis] = -1
        return values.view(shape)

    wide = round_doubled_(x.double() * laid(power_of_two(fracs + 1, torch.float64)), fmt.rounding)
    beyond = ((wide < laid(low)) | (wide > laid(high))) & laid(live)
    return int(beyond.sum()), int(laid(live).expand(x.shape).sum())


def measure(network: nn.Module, arguments: Arguments) -> dict[str, tuple[int, int]]:
    """Saturated values and values in all by name of the quantiser, in one run.

    A quantiser that did not run (the result of a table, whose entries are rounded when the table is made) is left out.

    Args:
        network: A copy of a network, in eval mode.
        arguments: What it is called with.
    """
    counts: dict[str, tuple[int, int]] = {}
    names = {part: name for name, part in quantizers(network).items()}

    def hook(quantizer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(quantizer, FixedQuantizer)
        x = args[0].clamp_min(0.0) if quantizer.relu else args[0]
        beyond, total = count_saturated(x, quantizer.format, quantizer.axis)
        before = counts.get(names[quantizer], (0, 0))
        counts[names[quantizer]] = before[0] + beyond, before[1] + total

    for quantizer in names:
        quantizer.register_forward_pre_hook(hook)
    with torch.no_grad():
        network(*arguments.args, **arguments.kwargs)
    return counts


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode, and each part's own mode afterwards."""
    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()
        yield
    finally:
        for part, training in modes.items():
            part.training = training
