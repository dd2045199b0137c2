"""Dynamic activations: every row (token) is quantised with a power of two of its own (docs/normalization.md).

`TokenQuantizer` takes rows from a fixed grid of the input to codes of a narrower width and one exponent for each row. A
linear layer without bias computes on the codes, `rescale` multiplies its exact result by the rows' powers of two.
`QuantLinear` and `TernaryLinear` with ``tokens="fixed<8>"`` do both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.nn.emission import emit, exporting
from edgemat.nn.layer import QuantLayer, exact_arithmetic
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.rounding import Grid, power_of_two, quantize_codes
from edgemat.recipe import TOKEN_SCALES, checked_tokens


def row_exponents(codes: Tensor, width: int) -> Tensor:
    """``max(0, bits(max |codes|) - (width - 1))`` of each row, where bits is the position of the leading one.

    Args:
        codes: Integral floats ``[..., n]``.
        width: Bits of a row's codes, sign included.

    Returns:
        int32 ``[..., 1]``.
    """
    bits = torch.frexp(codes.detach().abs().amax(-1, keepdim=True)).exponent
    return (bits - (width - 1)).clamp_min(0).to(torch.int32)


class _QuantizeRows(torch.autograd.Function):
    """``sat(round(x * factor))``; the gradient of x is that of the product where it does not saturate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, grid: Grid) -> Tensor:
        scaled = x * factor
        ctx.save_for_backward(factor, (scaled >= grid.low - 0.5) & (scaled < grid.high + 0.5))
        return quantize_codes(scaled, grid, 1.0, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factor, inside = ctx.saved_tensors
        return grads[0] * factor * inside, None, None


class RowGrid(FixedQuantizer):
    """The grid of a `TokenQuantizer`'s codes: the width of a row's codes, the binary point of its input."""

    def _other_format(self, state_dict: dict[str, Any], prefix: str) -> Fixed | str | None:
        """The binary point follows the input's: any is this quantiser's."""
        return None


class TokenQuantizer(QuantLayer):
    """Rows ``[..., n]`` to codes of `width` bits and one exponent for each row.

    With ``x = codes * 2**-f`` on the grid of the input quantiser, the exponent e of a row is the smallest of at least 0
    with every code below ``2**(e + width - 1)``, and ``q = sat(round(codes * 2**-e))``. A row of zeros has e = 0.
    Gradients pass straight through where a code does not saturate.

    Attributes:
        grid: The quantiser that layers behind this one are linked to: `width` bits, f fractional bits.

    Args:
        width: Bits of a row's codes, 2 to 24, sign included.
        input: Format of the input's grid, or None where `link` names the producer.
        rounding: How codes are rounded.
        scale: ``"power_of_two"``, or ``"absmax"`` for training alone: the published division of each row by its largest
            value (BitNet b1.58, arXiv 2402.17764), in floating point.

    Raises:
        FormatError: for another width or scale.
    """

    def __init__(
        self,
        width: int = 8,
        *,
        input: str | Fixed | None = "fixed<16>",
        rounding: str = "RND",
        scale: str = "power_of_two",
    ):
        super().__init__(input, None)
        if not isinstance(width, int) or isinstance(width, bool) or not 2 <= width <= 24:
            raise FormatError(f"a TokenQuantizer has width {width!r}, expected 2 to 24 bits, sign included")
        if scale not in TOKEN_SCALES:
            raise FormatError(f"a TokenQuantizer has scale={scale!r}, expected one of {', '.join(TOKEN_SCALES)}")
        self.scale = scale
        self.grid = RowGrid(Fixed(width, width, True, rounding, "SAT"), role="requantize")
        self._format = ""

    @property
    def width(self) -> int:
        """Bits of a row's codes."""
        return self.grid.width

    @property
    def passes(self) -> bool:
        """Whether rows pass as they are: real numbers in calibration, or before the input's binary point is set."""
        source = self.known_source()
        return source.observing or not source.ready

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantises rows.

        Args:
            x: ``[..., n]``.

        Returns:
            ``q * 2**-f`` of the shape of x, and what `rescale` takes, ``[..., 1]``: int32 exponents (under ``"absmax"``
            the float factors themselves).
        """
        x = self.enter(x)
        if exporting():
            self.check_frozen()
            exponents = emit("TokenExponent", (x,), (*x.shape[:-1], 1), width=self.width)
            return emit("TokenQuantize", (x, exponents), x.shape, y_format=self._format), exponents
        source = self.known_source()
        if self.passes:
            return x, torch.zeros_like(x[..., :1], dtype=torch.int32)
        frac = source.exponent()
        if float(self.grid.frac) != frac:
            self.grid.set_frac(frac)
        carrier = source.grid.carrier
        with exact_arithmetic(x):
            codes = x.to(carrier) * 2.0**frac
            if self.scale == "absmax":
                largest = codes.detach().abs().amax(-1, keepdim=True).clamp_min(1.0)
                factors = largest / self.grid.grid.high
                return _QuantizeRows.apply(codes, 1.0 / factors, self.grid.grid) * 2.0**-frac, factors
            exponents = row_exponents(codes, self.width)
            q = _QuantizeRows.apply(codes, power_of_two(-exponents, carrier), self.grid.grid)
            return q.float() * 2.0**-frac, exponents

    def rescale(self, y: Tensor, exponents: Tensor) -> Tensor:
        """``y * 2**exponents`` for each row of y, exact.

        Args:
            y: ``[..., m]``, computed from codes by layers that are linear and have no bias.
            exponents: ``[..., 1]``, from the same call.
        """
        if exporting():
            return emit("TokenRescale", (y, exponents), y.shape)
        factors = exponents if exponents.is_floating_point() else power_of_two(exponents, y.dtype)
        return y * factors

    def freeze(self) -> None:
        """Fixes the format of the codes."""
        super().freeze()
        if self.scale != "power_of_two":
            raise FormatError(
                f"layer {self.path or type(self).__name__!r} divides every row by its largest value in floating point "
                "(scale 'absmax'), which no target computes with equal bits; train with the scale 'power_of_two' "
                "before the export"
            )
        self.grid.set_frac(self.known_source().exponent())
        self._format = str(self.grid.format)

    def extra_repr(self) -> str:
        """Width and scale, for printing."""
        return f"{self.width}, scale={self.scale}"


def token_quantizer(format: str | Fixed, scale: str, label: str) -> TokenQuantizer:
    """The quantiser in front of a layer that names its source by `link`.

    Args:
        format: Width and rounding of a row's codes, such as ``"fixed<8>"``.
        scale: As for `TokenQuantizer`.
        label: The layer, for messages.

    Raises:
        FormatError: for another kind of format.
    """
    fmt = checked_tokens(format, f"{label}: tokens")
    return TokenQuantizer(fmt.width, input=None, rounding=fmt.rounding, scale=scale)
