"""How a quantiser of Brevitas rounds, found by what it does on ties, beside ties and at its rails."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from edgemat.brevitas.recording import Meaning
from edgemat.errors import UnsupportedOpError
from edgemat.foreign.quantisers import ROUNDING_NAMES, qonnx_quantiser

SPAN = 1 << 10
"""Of quantisers with more levels, this many are tried at each end and around 0."""
_OFFSETS = (-0.5, -0.25, 0.0, 0.25, 0.5)
_BESIDE = 2.0**-10


def rounding_of(name: str, quantiser: nn.Module, meaning: Meaning, narrow: bool) -> str:
    """The QONNX name of the rounding mode that gives the same codes as `quantiser` on every number that is tried.

    Args:
        name: What to call it in messages.
        quantiser: Maps a float tensor to ``(value, scale, zero_point, bit_width)``.
        meaning: What it handed out for the example.
        narrow: Whether its smallest code is left out.

    Raises:
        UnsupportedOpError: if its scale depends on the data, or it rounds like none of them.
    """
    levels = _levels(meaning, narrow)
    steps = torch.tensor([o + d for o in _OFFSETS for d in (-_BESIDE, 0.0, _BESIDE)], dtype=torch.float64)
    places = (levels.double()[:, None] + steps[None, :]).reshape(-1, *[1] * meaning.scale.dim())
    tried = ((places - meaning.zero_point.double()) * meaning.scale.double()).float()
    tried = torch.cat([tried, -torch.zeros_like(tried[:1])])
    with torch.no_grad():
        found, scale, zero, bits = quantiser(tried)[:4]
    same = all(
        torch.equal(a.float().reshape(-1), b.reshape(-1))
        for a, b in ((scale, meaning.scale), (zero, meaning.zero_point), (bits, meaning.bit_width))
    )
    if not same:
        raise UnsupportedOpError(
            f"quantiser {name!r} takes its scale from the data it is given, expected one that stands after training; "
            "use a quantiser with learned or calibrated statistics"
        )
    codes = torch.round(found.double() / meaning.scale.double()).numpy().astype(np.int64)
    scaled = tried.numpy() / np.asarray(meaning.scale.numpy(), np.float32)
    for mode in ROUNDING_NAMES:
        rule = qonnx_quantiser(
            np.asarray(meaning.scale.numpy()),
            meaning.zero_point.numpy(),
            meaning.bit_width.numpy(),
            meaning.signed,
            narrow,
            mode,
        )
        if np.array_equal(rule.round(scaled), codes):
            return mode
    raise UnsupportedOpError(
        f"quantiser {name!r} rounds in a way of its own, expected one of {', '.join(sorted(set(ROUNDING_NAMES)))}; set "
        "float_to_int_impl_type"
    )


def integers_of(name: str, function: nn.Module) -> str:
    """Which of torch's functions a module that makes integers is: "round", "floor", "ceil" or "trunc".

    Raises:
        UnsupportedOpError: if it is none of them.
    """
    tried = torch.arange(-64, 65, dtype=torch.float32) / 8
    with torch.no_grad():
        found = function(tried)
    for mode in ("round", "floor", "ceil", "trunc"):
        if torch.equal(getattr(torch, mode)(tried), found):
            return mode
    raise UnsupportedOpError(
        f"quantiser {name!r} makes integers in a way of its own, expected round, floor, ceil or round to zero; set "
        "float_to_int_impl_type"
    )


def _levels(meaning: Meaning, narrow: bool) -> Tensor:
    bits = int(meaning.bit_width.reshape(-1)[0].item())
    low = -(1 << (bits - 1)) + narrow if meaning.signed else 0
    high = (1 << (bits - 1)) - 1 if meaning.signed else (1 << bits) - 1 - narrow
    if high - low < 4 * SPAN:
        return torch.arange(low - 3, high + 4)
    ends = [torch.arange(low - 3, low + SPAN), torch.arange(-SPAN, SPAN), torch.arange(high - SPAN, high + 4)]
    return torch.unique(torch.cat(ends))
