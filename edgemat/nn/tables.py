"""Activation functions read from a table: sigmoid, tanh, SiLU, GELU, hard sigmoid, hard swish, softmax.

The table is computed once in float64 (`edgemat.ops.table.make_table`) and is the same one that the lowered file stores,
so that `eval()` gives the deployed bits. Gradients are those of the real function followed by the output quantiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.nn.emission import emit, exporting
from edgemat.nn.layer import QuantLayer
from edgemat.nn.quantizer import FixedQuantizer, unsigned

TABLE_BITS = 12
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
}
NON_NEGATIVE = ("sigmoid", "hardsigmoid")


class QuantTable(QuantLayer):
    """A function of one variable, looked up by the input's code.

    Args:
        function: A key of `FUNCTIONS`.
        output: Format of the result; unsigned where the function is never negative.
        input: Format of the input, at most 12 bits; None where `link` names the producer.
    """

    def __init__(
        self,
        function: str,
        output: str | Fixed | FixedQuantizer = "fixed<8>",
        *,
        input: str | Fixed | None = "fixed<8>",
    ):
        if function not in FUNCTIONS:
            raise FormatError(f"table function {function!r} is unknown, expected one of {', '.join(FUNCTIONS)}")
        if isinstance(output, str | Fixed) and function in NON_NEGATIVE:
            output = unsigned(output)
        super().__init__(input, output)
        if input is not None and self.known_source().width > TABLE_BITS:
            raise FormatError(f"a table for {input} was asked for, expected an input of at most {TABLE_BITS} bits")
        self.function = function
        self._cache: tuple[tuple[str, str], Tensor] | None = None

    def table_codes(self) -> Tensor:
        """int64 codes, entry i for the input code ``min_code + i``."""
        from edgemat.ops.table import make_table

        assert self.output_quantizer is not None
        x_format, y_format = self.known_source().format, self.output_quantizer.format
        key = str(x_format), str(y_format)
        if self._cache is None or self._cache[0] != key:
            self._cache = key, torch.from_numpy(make_table(self.function, x_format, y_format))
        return self._cache[1]

    def forward(self, x: Tensor) -> Tensor:
        """Applies the function; any shape."""
        x = self.enter(x)
        quantizer = self.output_quantizer
        assert quantizer is not None
        if exporting():
            self.check_frozen()
            return emit("Table", (x, self.codes), x.shape, function=self.function, y_format=quantizer._frozen)
        source = self.known_source()
        real = FUNCTIONS[self.function](x.float())
        if quantizer.observing or source.observing or not quantizer.ready:
            return quantizer(real)
        codes = self.table_codes().to(x.device)
        values = torch.ldexp(codes.double(), -quantizer.exponents()).to(quantizer.grid.carrier)
        if source.per_channel or x.dtype != torch.float32:
            index = torch.ldexp(x.detach().double(), source.exponents()).round_()
        else:  # 12 bits times a power of two: exact in float32
            index = (x.detach() * math.ldexp(1.0, source.exponent())).round_()
        index = index.sub_(source.format.min_code)
        # Off the grid only behind a training dropout; there the nearest code is taken.
        return quantizer.adopt(real, values[index.clamp_(0, len(values) - 1).to(torch.int64)])

    def freeze(self) -> None:
        """Stores the table."""
        super().freeze()
        self.register_buffer("codes", self.table_codes().to(torch.int32))

    def extra_repr(self) -> str:
        """The function, for printing."""
        return self.function


class QuantSoftmax(QuantLayer):
    """Softmax along one axis: exponentials from a table, their exact sum, one rounding of the quotient.

    The steps are those of `edgemat.ops.softmax`; the quotient of two integers below 2**40 in float64 meets a tie of the
    output format only where there is one.

    Args:
        dim: Axis, not the batch.
        output: Format of the result, taken as unsigned.
        input: Format of the input, at most 12 bits; None where `link` names the producer.
        table: Format of the exponentials; must hold 1.0.
    """

    def __init__(
        self,
        dim: int = 1,
        output: str | Fixed | FixedQuantizer = "fixed<8>",
        *,
        input: str | Fixed | None = "fixed<8>",
        table: str | Fixed = "ufixed<16,1>",
    ):
        super().__init__(input, output if isinstance(output, FixedQuantizer) else unsigned(output))
        if input is not None and self.known_source().width > TABLE_BITS:
            raise FormatError(f"a softmax of {input} was asked for, expected an input of at most {TABLE_BITS} bits")
        self.dim = dim
        self.table_format = Fixed.parse(table) if isinstance(table, str) else table

    def table_codes(self) -> Tensor:
        """int64 codes of ``exp(-d)``, entry d for the distance d from the largest code."""
        from edgemat.ops.softmax import make_softmax_table

        return torch.from_numpy(make_softmax_table(self.known_source().format, self.table_format))

    def forward(self, x: Tensor) -> Tensor:
        """Applies the softmax."""
        x = self.enter(x)
        quantizer = self.output_quantizer
        assert quantizer is not None
        if exporting():
            self.check_frozen()
            formats = {"table_format": str(self.table_format), "y_format": quantizer._frozen}
            return emit("Softmax", (x, self.codes), x.shape, axis=self.dim % x.dim() - 1, **formats)
        source = self.known_source()
        real = torch.softmax(x.float(), self.dim)
        if quantizer.observing or source.observing or not quantizer.ready:
            return quantizer(real)
        with torch.no_grad():
            table = self.table_codes().to(x.device)
            codes = torch.ldexp(x.double(), source.exponents()).round_()
            distance = codes.amax(self.dim, keepdim=True) - codes
            e = table[distance.clamp_(0, len(table) - 1).to(torch.int64)].double()
            exact = quantizer(e / e.sum(self.dim, keepdim=True))
        return quantizer.adopt(real, exact)

    def freeze(self) -> None:
        """Stores the table."""
        super().freeze()
        self.register_buffer("codes", self.table_codes().to(torch.int32))

    def extra_repr(self) -> str:
        """The axis, for printing."""
        return f"dim={self.dim}"


class QuantSigmoid(QuantTable):
    """Sigmoid from a table; arguments as `QuantTable`, without the function."""

    def __init__(self, output: str | Fixed | FixedQuantizer = "fixed<8>", *, input: str | Fixed | None = "fixed<8>"):
        super().__init__("sigmoid", output, input=input)


class QuantTanh(QuantTable):
    """Hyperbolic tangent from a table; arguments as `QuantTable`, without the function."""

    def __init__(self, output: str | Fixed | FixedQuantizer = "fixed<8>", *, input: str | Fixed | None = "fixed<8>"):
        super().__init__("tanh", output, input=input)
