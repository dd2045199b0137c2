"""Effective bit operations (EBOPs): what the multiplications and additions of a network cost in bits.

A multiplication of operands of ``b_i`` and ``b_j`` bits counts ``b_i * b_j``, an addition of two tensors ``max(b_i,
b_j)`` (HGQ, arXiv 2405.00645, section III.B). A constant counts the bits from its highest to its lowest one bit: 6 has
two, a power of two one, 0 none, so that neither pruned weights nor shifts cost anything they should not. A variable
counts the bits of its proved interval, sign bit included, channel by channel where the channels have widths of their
own; what is always 0 counts nothing. Sums within a product (accumulation, bias, pooling) are not counted.
"""

from __future__ import annotations

import numpy as np

from edgemat.op import Tensor


def constant_bits(codes: np.ndarray) -> np.ndarray:
    """Bits between the highest and the lowest one bit of each |code|, both included.

    Args:
        codes: int64 array.

    Returns:
        int64 array of the same shape, 0 to 63 (0 for the code 0).
    """
    size = np.abs(np.asarray(codes, np.int64))
    lowest = size & -size
    odd = np.where(size == 0, 0, size // np.maximum(lowest, 1))
    bits = np.zeros(size.shape, np.int64)
    while odd.any():
        bits += odd != 0
        odd = odd >> 1
    return bits


def interval_bits(lo: int, hi: int) -> int:
    """Bits of an integer within lo..hi: two's complement where lo < 0, none where it is always 0."""
    return max(hi.bit_length(), (-lo - 1).bit_length() + 1 if lo < 0 else 0, hi.bit_length() + 1 if lo < 0 < hi else 0)


def operand_bits(tensor: Tensor) -> np.ndarray:
    """Bits of a tensor's codes: int64, one entry, or one per channel of axis 1."""
    lows, highs = tensor.channel_intervals()
    pairs = zip(lows.tolist(), highs.tolist(), strict=True)
    return np.array([interval_bits(lo, hi) for lo, hi in pairs], np.int64)


def channel_bits(tensor: Tensor) -> np.ndarray:
    """`operand_bits` with one entry for each channel of axis 1."""
    return np.broadcast_to(operand_bits(tensor), (int(tensor.shape[1] or 1) if len(tensor.shape) > 1 else 1,))
