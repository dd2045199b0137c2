"""Checks of what public functions are given: a wrong type or value gets one sentence, whoever was called.

Each check takes a label (function, then argument: ``"CostTarget: at_most"``), returns what it was given in plain form,
and raises a `FormatError` that says what was found, what was expected and, where it helps, what to do.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from edgemat.errors import FormatError
from edgemat.nn.layer import QuantLayer
from edgemat.nn.quantizer import FixedQuantizer

_SHOWN = 60


def number(
    label: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> float:
    """`value` as a float.

    Args:
        label: What it is, for the message.
        value: A real number, or a tensor or array that holds one; no bool.
        above: It must be larger.
        least: It must be at least this.
        below: It must be smaller.
        most: It must be at most this.

    Raises:
        FormatError: for anything else, NaN and infinities included.
    """
    found = _real(value)
    fits = (
        math.isfinite(found)
        and (above is None or found > above)
        and (least is None or found >= least)
        and (below is None or found < below)
        and (most is None or found <= most)
    )
    if fits:
        return found
    if least is not None and most is not None:
        raise FormatError(f"{label} is {_shown(value)}, expected a number from {least:g} to {most:g}")
    words = ("above", above), ("of at least", least), ("less than", below), ("of at most", most)
    ends = " and ".join(f"{word} {end:g}" for word, end in words if end is not None)
    raise FormatError(f"{label} is {_shown(value)}, expected a finite number {ends}".rstrip())


def whole(label: str, value: Any, least: int = 0) -> int:
    """`value` as an int.

    Args:
        label: What it is, for the message.
        value: A whole number of Python, numpy or torch; no bool and no float.
        least: It must be at least this.

    Raises:
        FormatError: for anything else.
    """
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except (TypeError, ValueError):
        found = None
    if found is None or found < least:
        raise FormatError(f"{label} is {_shown(value)}, expected a whole number of at least {least}")
    return found


def place(label: str, value: Any) -> Path:
    """`value` as a path.

    Raises:
        FormatError: for anything but a text or a path.
    """
    if not isinstance(value, str | os.PathLike):
        raise FormatError(f"{label} is {_shown(value)}, expected a path such as 'runs/first'")
    return Path(value)


def sequence(label: str, value: Any) -> Iterable[Any]:
    """`value` as an iterable of batches.

    Raises:
        FormatError: for one tensor, a text, or what cannot be walked.
    """
    if isinstance(value, Tensor):
        raise FormatError(f"{label} got one tensor, expected an iterable of batches; put it into a list: [x]")
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise FormatError(f"{label} got {_shown(value)}, expected an iterable of batches such as [x]")
    return value


def module(label: str, value: Any) -> nn.Module:
    """`value` as a module.

    Raises:
        FormatError: for anything else.
    """
    if not isinstance(value, nn.Module):
        kind = f"the class {value.__name__}" if isinstance(value, type) else _shown(value)
        raise FormatError(f"{label} got {kind}, expected a torch.nn.Module")
    return value


def quantized(label: str, value: Any) -> nn.Module:
    """`value` as a module with at least one layer or quantiser of edgemat.nn.

    Raises:
        FormatError: for anything else, a float network above all, in which there is nothing to do.
    """
    if not any(isinstance(part, QuantLayer | FixedQuantizer) for part in module(label, value).modules()):
        raise FormatError(
            f"{label}: {type(value).__name__} holds no layer of edgemat.nn, expected a quantised module; call "
            "edgemat.quantize first and give its result"
        )
    return value  # type: ignore[no-any-return]


def _real(value: Any) -> float:
    """A number as a float; NaN for anything else."""
    if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _shown(value: Any) -> str:
    """A value for a message; tensors, modules and long texts by what they are."""
    if isinstance(value, int) and value.bit_length() > _SHOWN:  # Python refuses to write very large ones
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float | str):
        text = repr(value)
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    if isinstance(value, Real):
        return str(value)
    return f"a {type(value).__name__}"
