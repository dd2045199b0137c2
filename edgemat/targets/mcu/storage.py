"""How codes are stored in C: element types, constants, arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgemat.formats import Fixed


@dataclass(frozen=True)
class ConstantArray:
    """A constant array of weights.c; ``role`` is ``weight``, ``bias``, ``shift``, ..."""

    role: str
    element: str
    values: np.ndarray


def storage(fmt: Fixed) -> str:
    """Element name (``s8`` ... ``s64``) codes of a format are stored in."""
    if fmt.width <= 16:
        return ("s" if fmt.signed else "u") + ("8" if fmt.width <= 8 else "16")
    return "s32" if fmt.width + (not fmt.signed) <= 32 else "s64"


def c_type(element: str) -> str:
    """``s8`` to ``int8_t``, ``u16`` to ``uint16_t``."""
    return f"{'int' if element[0] == 's' else 'uint'}{element[1:]}_t"


def size_of(element: str) -> int:
    """Bytes of an element."""
    return int(element[1:]) // 8


def array_storage(values: np.ndarray) -> str:
    """Smallest element that holds every value of a constant array."""
    lo, hi = (int(values.min()), int(values.max())) if values.size else (0, 0)
    for element, low, high in (
        ("s8", -(1 << 7), 1 << 7), ("u8", 0, 1 << 8), ("s16", -(1 << 15), 1 << 15), ("u16", 0, 1 << 16),
        ("s32", -(1 << 31), 1 << 31),
    ):  # fmt: skip
        if low <= lo and hi < high:
            return element
    return "s64"


def literal(value: int) -> str:
    """An integer constant of C99; the most negative one has no literal of its own."""
    return "(-9223372036854775807 - 1)" if value == -(1 << 63) else str(value)
