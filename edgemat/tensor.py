"""`Tensor`: the type of one edge of the lowered graph: shape, format, and the proved interval of its codes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgemat import formats
from edgemat.formats import Fixed

Shape = tuple[int | None, ...]
MAX_ELEMENTS = 1 << 26
"""No tensor of one sample, and no weight, has as many elements: files from strangers are refused before allocation."""
REAL = Fixed(24, 24, rounding="TRN", overflow="WRAP")
"""Stands, by identity, for "not codes but float values": the input of Quantize, the output of Dequantize."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """The type of one edge of the lowered graph.

    Attributes:
        name: Value name in the ONNX file.
        shape: Dimensions; None stands for the batch and only on axis 0.
        format: What a code means.
        lo: Smallest code the tensor can hold (proved).
        hi: Largest code the tensor can hold (proved).
    """

    name: str
    shape: Shape
    format: Fixed
    lo: int
    hi: int

    @property
    def dtype(self) -> np.dtype:
        """The ONNX code type: int8/uint8 up to 8 bits, int32 up to 32, else int64 (float32 for REAL tensors)."""
        return np.dtype(np.float32) if self.format is REAL else code_dtype(self.format)

    @property
    def batched(self) -> bool:
        """Whether axis 0 is the batch."""
        return bool(self.shape) and self.shape[0] is None

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample: without the batch axis."""
        return tuple(int(d) for d in (self.shape[1:] if self.batched else self.shape))  # type: ignore[arg-type]

    @property
    def native_shape(self) -> tuple[int, ...]:
        """Shape of one sample with channels last (rank 3 and 4), as native code stores it."""
        shape = self.sample_shape
        return (*shape[1:], shape[0]) if self.batched and len(shape) in (2, 3) else shape

    @property
    def size(self) -> int:
        """Elements of one sample."""
        return int(np.prod(self.sample_shape, dtype=np.int64))

    @property
    def magnitude(self) -> int:
        """Largest absolute code."""
        return max(abs(self.lo), abs(self.hi))

    def channel_intervals(self) -> tuple[np.ndarray, np.ndarray]:
        """Smallest and largest code of each channel: int64 arrays of one entry, or of one per channel of axis 1.

        A channel's width narrows what is proved of the whole tensor.
        """
        if self.format is REAL or self.format.widths is None:
            return np.array([self.lo], np.int64), np.array([self.hi], np.int64)
        low, high = self.format.channel_rails()
        return np.maximum(low, self.lo), np.minimum(high, self.hi)

    def legal(self, codes: np.ndarray) -> np.ndarray:
        """Codes of lo..hi brought to ones that can occur: channels of their own width saturate, bipolar takes the sign.

        Args:
            codes: Integers [N, ...] of the tensor's shape (or of one sample, without the batch).
        """
        if self.format is REAL or not (self.format.bipolar or self.format.widths is not None):
            return codes.astype(np.int64)
        return formats.wrap(codes, self.format, codes.ndim - len(self.shape) + 1)


def code_dtype(fmt: Fixed) -> np.dtype:
    """The ONNX integer type that carries codes of `fmt` between operators."""
    if fmt.width <= 8:
        return np.dtype(np.int8 if fmt.signed else np.uint8)
    return np.dtype(np.int32 if fmt.width + (not fmt.signed) <= 32 else np.int64)


def channels(shape: Shape) -> int:
    """Length of axis 1, or 1 where there is none."""
    return int(shape[1] or 1) if len(shape) > 1 else 1
