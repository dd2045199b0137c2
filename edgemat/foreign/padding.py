"""Automatic padding of ONNX's convolutions and pools, written out."""

from __future__ import annotations

from collections.abc import Sequence


def same_pads(
    sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], upper: bool
) -> tuple[int, ...]:
    """Pads, begins then ends, that make ``ceil(size / stride)`` outputs (ONNX's SAME_UPPER and SAME_LOWER).

    Args:
        sizes: Elements along each spatial axis; any number where the stride is 1.
        kernel: Window along each axis.
        strides: Strides.
        dilations: Dilations.
        upper: Whether the odd element goes to the end (SAME_UPPER).
    """
    totals = [
        max((-(-size // stride) - 1) * stride + dilation * (k - 1) + 1 - size, 0)
        for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True)
    ]
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return (*small, *large) if upper else (*large, *small)
