"""K-hot constants in an HLS design: how their digits are stored, and what their shift-adds count.

A folded dot product reads its digits from a ROM. Where few different weights occur, the ROM holds short indices and
one small table the digits; whichever takes fewer bits is chosen. Constants of an unrolled loop take no memory at all:
their shifts are wires.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgemat.signed_digits import DigitWords, digit_count, pack_digits

COMPILER_KHOT = 2
"""Signed 2-hot constants make Vitis HLS 2025.1 infer no multiplier for ``x * w`` (published observation, not ours)."""


@dataclass(frozen=True)
class StoredDigits:
    """Packed digits as arrays of a project.

    Attributes:
        stored: words, or indices into `table`; of the shape of the codes.
        table: words by index, or None where `stored` holds the words themselves.
        packed: the layout of a word.
    """

    stored: np.ndarray
    table: np.ndarray | None
    packed: DigitWords


def store_digits(codes: np.ndarray, khot: int, constant: bool) -> StoredDigits:
    """Digits of the codes in the smaller of both forms.

    Args:
        codes: int64 codes of at most `khot` digits.
        khot: largest number of digits.
        constant: whether the loop over the codes is unrolled; words are stored plainly then.
    """
    packed = pack_digits(codes, khot, dense=not constant)
    table, index = np.unique(packed.words, return_inverse=True)
    index_bits = max(int(len(table) - 1).bit_length(), 1)
    if constant or codes.size * packed.width <= codes.size * index_bits + len(table) * packed.width:
        return StoredDigits(packed.words, None, packed)
    return StoredDigits(index.reshape(codes.shape).astype(np.int64), table, packed)


def shift_adds(codes: np.ndarray, khot: int, constant: bool) -> int:
    """Shifted terms that are added when each code meets one input: those there are, or `khot` each from a ROM."""
    return int(digit_count(codes).sum()) if constant else codes.size * khot
