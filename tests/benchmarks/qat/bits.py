"""EBOPs counted from integers, the same way for every method.

A multiplication costs the product of its operands' bits (Sun et al., arXiv 2405.00645, section III). A weight's bits
are those between its highest and its lowest one, both included; zero costs nothing. An activation's are those of its
format without the sign; a channel of a per-channel format has its own.
"""

from __future__ import annotations

import numpy as np


def enclosed_bits(codes: np.ndarray) -> np.ndarray:
    """Bits from the highest to the lowest one of ``|code|``: 0 for 0, 1 for powers of two, 2 for 3, 6 and 12."""
    left = np.abs(codes.astype(np.int64))
    low = left & -left
    odd = np.where(left > 0, left // np.maximum(low, 1), 0)
    bits = np.zeros(codes.shape, dtype=np.int64)
    while (odd > 0).any():
        bits += odd > 0
        odd >>= 1
    return bits


def dense(codes: np.ndarray, widths: np.ndarray | int) -> int:
    """EBOPs of a dense layer.

    Args:
        codes: Weight codes [outputs, inputs].
        widths: Bits of each input without the sign, [inputs] or one for all.
    """
    return int((enclosed_bits(codes) * np.asarray(widths, dtype=np.int64)).sum())


def biases(codes: np.ndarray) -> int:
    """Bits of the biases, which cost one addition each."""
    return int(enclosed_bits(codes).sum())
