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


def rails(meaning: Meaning, narrow: bool) -> tuple[int, int]:
    """Smallest and largest integer q of a quantised tensor."""
    bits = int(meaning.bit_width.reshape(-1)[0].item())
    if meaning.signed:
        return -(1 << (bits - 1)) + narrow, (1 << (bits - 1)) - 1
    return 0, (1 << bits) - 1 - narrow


def float_thresholds(quantiser: nn.Module, meaning: Meaning, codes: range) -> Tensor:
    """The smallest float32 at which a rising function and its quantiser reach each code; float32 [1, codes].

    Found by bisection over the floats in their order; infinite where a code is never reached.

    Args:
        quantiser: Maps a float tensor to ``(value, ...)``.
        meaning: Its scale.
        codes: The codes, zero point subtracted.
    """
    wanted = torch.tensor(list(codes), dtype=torch.float64) * meaning.scale.double()

    def reached(places: Tensor) -> Tensor:
        with torch.no_grad():
            values = quantiser(_floats(places))[0]
        result: Tensor = torch.round(values.double() / meaning.scale.double()) >= torch.round(
            wanted / meaning.scale.double()
        )
        return result

    ends = torch.tensor([-(0x7F7FFFFF), 0x7F7FFFFF], dtype=torch.int64)
    below, above = (end.expand(len(codes)).clone() for end in ends)
    always, never = reached(below), ~reached(above)
    for _ in range(33):
        middle = (below + above) // 2
        hit = reached(middle)
        above = torch.where(hit, middle, above)
        below = torch.where(hit, below, middle)
    found = _floats(above)
    found = torch.where(never, torch.tensor(torch.inf), torch.where(always, torch.tensor(-torch.inf), found))
    return found.reshape(1, -1)


def _floats(places: Tensor) -> Tensor:
    """float32 numbers by their place in the order of all of them; place 0 is 0."""
    magnitude = places.abs().to(torch.int32).view(torch.float32)
    return torch.where(places < 0, -magnitude, magnitude)


def _levels(meaning: Meaning, narrow: bool) -> Tensor:
    low, high = rails(meaning, narrow)
    if high - low < 4 * SPAN:
        return torch.arange(low - 3, high + 4)
    ends = [torch.arange(low - 3, low + SPAN), torch.arange(-SPAN, SPAN), torch.arange(high - SPAN, high + 4)]
    return torch.unique(torch.cat(ends))
