"""Average pooling: the exact rational ``sum / count``, rounded once.

The sum of codes is exact in float64, and so the quotient is correctly rounded to 53 bits. A quotient that is not a tie
of the output format differs from every tie by at least ``2**-g / (2 * count)`` of an LSB (``g`` dropped input bits),
which 53 bits resolve while ``log2(sum) + log2(count) + 2 <= 53``: the second rounding then sees ties only where they
are. Max pooling is exact and needs no layer of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edgemat.errors import FormatError, LoweringError
from edgemat.formats import Fixed
from edgemat.nn.emission import emit, exporting
from edgemat.nn.layer import QuantLayer, exact_arithmetic, pair
from edgemat.nn.quantizer import FixedQuantizer


class AveragePool(QuantLayer):
    """Base of the average pools.

    Args:
        output: Format of the mean; required, because a mean has no exact fixed-point format of its own.
        input: Format of an own input quantiser, or None.
    """

    def __init__(self, output: str | Fixed | FixedQuantizer = "fixed<8>", input: str | Fixed | None = None):
        super().__init__(input, output)

    def window(self, x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool, bool]:
        """Kernel, stride, padding, ceil_mode and count_include_pad for `x`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Averages over windows of ``[N, C, L]`` or ``[N, C, H, W]``."""
        x = self.enter(x)
        if x.dim() not in (3, 4):
            raise LoweringError(
                f"layer {self.path or type(self).__name__!r} got a tensor of {x.dim()} axes, expected [N, C, L] or [N, "
                "C, H, W]"
            )
        kernel, stride, padding, ceil_mode, include = self.window(x)
        if exporting():
            return self._emit(x, kernel, stride, padding, ceil_mode, include)
        source = self.source()
        bits = source.grid.magnitude.bit_length() if source is not None else 24
        count = math.prod(kernel)
        if bits + 2 * count.bit_length() + 2 > 53:
            raise FormatError(
                f"layer {self.path or type(self).__name__!r} averages {count} codes of {bits} bits, expected few "
                "enough for 53 bits; pool in two steps"
            )
        with exact_arithmetic(x):
            # Sums that float32 holds need no float64 copy of the whole input; the quotient always needs float64.
            plain = bits + count.bit_length() <= 24 and source is not None and x.dtype == torch.float32
            if plain and x.dim() == 4 and not ceil_mode and not any(padding):
                mean = F.avg_pool2d(x, kernel, stride, divisor_override=1).double() / count
            else:
                pool = F.avg_pool1d if x.dim() == 3 else F.avg_pool2d
                mean = pool(x.double(), kernel, stride, padding, ceil_mode, include)
        return self.leave(mean)

    def _emit(
        self,
        x: Tensor,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        ceil_mode: bool,
        include: bool,
    ) -> Tensor:
        self.check_frozen()
        assert self.output_quantizer is not None
        sizes: list[Any] = []
        for n, k, s, p in zip(x.shape[2:], kernel, stride, padding, strict=True):
            size = (n + 2 * p - k + (s - 1 if ceil_mode else 0)) // s + 1
            # A window that starts beyond the input and its left padding is dropped, as torch does.
            sizes.append(size - 1 if ceil_mode and (size - 1) * s >= n + p else size)
        return emit(
            "AveragePool",
            (x,),
            [*x.shape[:2], *sizes],
            kernel_shape=list(kernel),
            strides=list(stride),
            pads=[*padding, *padding],
            ceil_mode=int(ceil_mode),
            count_include_pad=int(include),
            requantize=self.output_quantizer._frozen,
        )


class QuantAvgPool(AveragePool):
    """`torch.nn.AvgPool1d` and `AvgPool2d` (by the rank of the input), quantised.

    Args:
        kernel_size: Window.
        stride: Step, the window by default.
        padding: Zeros on both sides.
        ceil_mode: Whether windows may hang over the padded edge.
        count_include_pad: Whether padding counts as elements.
        output: Format of the mean.
        input: Format of an own input quantiser, or None.
    """

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        *,
        output: str | Fixed | FixedQuantizer = "fixed<8>",
        input: str | Fixed | None = None,
    ):
        super().__init__(output, input)
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None or stride == () or stride == [] else stride
        self.padding, self.ceil_mode, self.count_include_pad = padding, ceil_mode, count_include_pad

    def window(self, x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool, bool]:
        """As constructed."""
        rank = x.dim() - 2
        return (
            pair(self.kernel_size, rank),
            pair(self.stride, rank),
            pair(self.padding, rank),
            self.ceil_mode,
            self.count_include_pad,
        )

    def extra_repr(self) -> str:
        """The window, for printing."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class QuantAdaptiveAvgPool(AveragePool):
    """Average pooling to a fixed output size that divides the input; size 1 is global average pooling.

    Args:
        output_size: Size of the result's spatial axes; None keeps an axis.
        output: Format of the mean.
        input: Format of an own input quantiser, or None.
    """

    def __init__(
        self,
        output_size: int | Sequence[int | None] | None = 1,
        *,
        output: str | Fixed | FixedQuantizer = "fixed<8>",
        input: str | Fixed | None = None,
    ):
        super().__init__(output, input)
        self.output_size = output_size

    def window(self, x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool, bool]:
        """Equal windows; refused where the sizes do not divide."""
        sizes = [int(n) for n in x.shape[2:]]
        wanted = self.output_size
        targets = [wanted] * len(sizes) if wanted is None or isinstance(wanted, int) else list(wanted)
        kernel = []
        for n, target in zip(sizes, targets, strict=True):
            size = n if target is None else int(target)
            if size == 0 or n % size:
                raise LoweringError(
                    f"layer {self.path or type(self).__name__!r} pools {n} elements to {size}, expected a divisor; "
                    "windows of unequal size have no counterpart on the targets"
                )
            kernel.append(n // size)
        return tuple(kernel), tuple(kernel), (0,) * len(kernel), False, True

    def extra_repr(self) -> str:
        """The size, for printing."""
        return f"output_size={self.output_size}"


class QuantMean(AveragePool):
    """``x.mean(dim, keepdim)`` over one or all spatial axes of ``[N, C, ...]``, or over axis 1 of ``[N, T, C]``.

    Args:
        dim: Axes to average.
        keepdim: Whether they stay with size 1.
        output: Format of the mean.
        input: Format of an own input quantiser, or None.
    """

    def __init__(
        self,
        dim: int | Sequence[int],
        keepdim: bool = False,
        *,
        output: str | Fixed | FixedQuantizer = "fixed<8>",
        input: str | Fixed | None = None,
    ):
        super().__init__(output, input)
        self.dim = (dim,) if isinstance(dim, int) else tuple(dim)
        self.keepdim = keepdim

    def window(self, x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool, bool]:
        """The whole of each averaged axis, one element of the others."""
        axes = {d % x.dim() for d in self.dim}
        whole = x.dim() == 3 or axes == {2, 3}
        sizes = tuple(int(n) if whole or axis in axes else 1 for axis, n in enumerate(x.shape[2:], 2))
        return sizes, sizes, (0,) * len(sizes), False, True

    def forward(self, x: Tensor) -> Tensor:
        """Averages the axes."""
        axes = sorted(d % x.dim() for d in self.dim)
        swapped = x.dim() == 3 and axes == [1]
        if not swapped and (not axes or axes[0] < 2):
            raise LoweringError(
                f"layer {self.path or 'mean'!r} averages axes {axes} of a tensor of {x.dim()} axes, expected axes from "
                "2 on, or axis 1 of [N, T, C]; transpose first"
            )
        y = super().forward(x.transpose(1, 2) if swapped else x)
        if swapped:
            y = y.transpose(1, 2)
        return y if self.keepdim else torch.squeeze(y, tuple(axes))

    def extra_repr(self) -> str:
        """The axes, for printing."""
        return f"dim={self.dim}, keepdim={self.keepdim}"
