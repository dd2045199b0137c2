"""Activation functions that are exact, or nearly so: ReLU, clipping, and the leaky kinds with fixed-point slopes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.nn.emission import emit, exporting
from edgemat.nn.layer import Link, QuantLayer, exact_arithmetic
from edgemat.nn.quantizer import FixedQuantizer, check_points, unsigned
from edgemat.nn.quantizers import weight_quantizer, weight_spec
from edgemat.recipe import WeightSpec


class QuantReLU(QuantLayer):
    """ReLU followed by its quantiser, in one pass.

    Args:
        output: Format of the result; a signed format is taken as the unsigned one of its width. A `FixedQuantizer` is
            used as it is, None keeps the exact input grid.
        input: Format of an own input quantiser, or None.
    """

    def __init__(self, output: str | Fixed | FixedQuantizer | None = "fixed<8>", *, input: str | Fixed | None = None):
        given = output if output is None or isinstance(output, FixedQuantizer) else unsigned(output)
        super().__init__(input, given, relu=True)
        if self.output_quantizer is not None:
            self.output_quantizer.relu = True
        self._producer = Link()

    def forward(self, x: Tensor) -> Tensor:
        """``max(x, 0)``, quantised; any shape."""
        producer = self._producer.modules
        if producer and producer[0].reaches_relu and not exporting():  # type: ignore[union-attr, operator]
            return x
        x = self.enter(x)
        return torch.relu(x) if self.output_quantizer is None else self.output_quantizer(x)

    def follow(self, producer: QuantLayer) -> None:
        """Names the layer that may quantise for this one while training (`WeightedLayer.precede`)."""
        self._producer = Link(producer)


class QuantClip(QuantLayer):
    """Clipping to ``[low, high]`` (ReLU6, Hardtanh, clamp) followed by a quantiser.

    The bounds are rounded to the grid of the result first: for a monotone rounding the result is the same, and the
    bounds exist as codes.

    Args:
        low: Lower bound, or None.
        high: Upper bound, or None.
        output: Format of the result; unsigned where `low` is at least 0. None keeps the exact input grid.
        input: Format of an own input quantiser, or None.
    """

    def __init__(
        self,
        low: float | None = 0.0,
        high: float | None = 6.0,
        output: str | Fixed | FixedQuantizer | None = "fixed<8>",
        *,
        input: str | Fixed | None = None,
    ):
        if low is not None and high is not None and low > high:
            raise FormatError(f"clipping to [{low}, {high}] was asked for, expected low <= high")
        if isinstance(output, str | Fixed) and low is not None and low >= 0:
            output = unsigned(output)
        super().__init__(input, output)
        self.low, self.high = low, high
        self._bounds: tuple[float | None, float | None] | None = None

    def bounds(self) -> tuple[float | None, float | None]:
        """The bounds on the grid of the result (of the input, without an output quantiser)."""
        quantizer = self.output_quantizer if self.output_quantizer is not None else self.source()
        if quantizer is None or quantizer.observing or not quantizer.ready:
            return self.low, self.high
        exponent = quantizer.exponent()
        scaled = [None if v is None else round(v * 2.0**exponent) * 2.0**-exponent for v in (self.low, self.high)]
        return scaled[0], scaled[1]

    def freeze(self) -> None:
        """Fixes the bounds for export."""
        super().freeze()
        self._bounds = self.bounds()

    def forward(self, x: Tensor) -> Tensor:
        """``min(max(x, low), high)``, quantised; any shape."""
        x = self.enter(x)
        if exporting():
            self.check_frozen()
            assert self._bounds is not None
            return self.leave(torch.clamp(x, *self._bounds))
        low, high = self.bounds()
        return self.leave(torch.clamp(x, low, high))


class QuantPReLU(QuantLayer):
    """PReLU or LeakyReLU with fixed-point slopes: ``x`` above 0, ``slope * x`` below, exact, then quantised.

    Args:
        num_parameters: 1, or the number of channels (axis 1).
        init: Start value of the slopes.
        learn: Whether the slopes are parameters (PReLU) or constants (LeakyReLU).
        weights: Format of the slopes.
        output: Format of the result.
        input: Format of an own input quantiser, or None where `link` names the producer.
    """

    def __init__(
        self,
        num_parameters: int = 1,
        init: float = 0.25,
        learn: bool = True,
        *,
        weights: str | Fixed | WeightSpec = "fixed<8>",
        output: str | Fixed | FixedQuantizer | None = "fixed<8>",
        input: str | Fixed | None = "fixed<8>",
    ):
        super().__init__(input, output)
        spec = weight_spec(weights, False)
        slopes = torch.full((num_parameters,), init)
        if learn:
            self.weight = nn.Parameter(slopes)
        else:
            self.register_buffer("weight", slopes, persistent=False)
        label = f"a {type(self).__name__}"
        self.weight_quantizer = weight_quantizer(spec, (num_parameters,), None, 0, label)
        self._formats: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Applies the slopes along axis 1; any shape."""
        x = self.enter(x)
        if exporting():
            self.check_frozen()
            return self.leave(emit("PRelu", (x, self.slope_codes), x.shape, **self._formats))
        slope: Tensor = self.weight_quantizer(self.weight)
        source = self.source()
        with exact_arithmetic(x):
            if not self.weight_quantizer.observing and (source is None or not source.observing):
                grid = self.known_source().grid
                frac = max(self.weight_quantizer.exponent(), 0)
                carrier = self.carrier(grid.magnitude * max(self.weight_quantizer.grid.magnitude, 1 << frac))
                x, slope = x.to(carrier), slope.to(carrier)
            laid = slope if slope.numel() == 1 else slope.view(1, -1, *([1] * (x.dim() - 2)))
            y = torch.where(x >= 0, x, x * laid)
        return self.leave(y)

    @torch.no_grad()
    def freeze(self) -> None:
        """Stores the slope codes."""
        super().freeze()
        self.weight_quantizer._check_ready()
        slope = self.weight_quantizer(self.weight)
        self.register_buffer("slope_codes", self.weight_quantizer.codes(slope).to(torch.int32))
        self._formats = {"slope_format": str(self.weight_quantizer.format), **self.weight_quantizer.promises}

    def extra_repr(self) -> str:
        """Number of slopes, for printing."""
        return f"num_parameters={self.weight.numel()}"


class QuantConstant(QuantLayer):
    """A constant operand of Add, Mul and the like, rounded to a format of its own.

    Args:
        format: Format of the constant.
        value: The constant, or None where the network passes a parameter or buffer to `forward`.
        target: Name of that parameter or buffer.
    """

    def __init__(self, format: str | Fixed, value: Tensor | None = None, target: str = ""):
        super().__init__()
        check_points(format, None, f"the constant {target}".rstrip())
        self.weight_quantizer = FixedQuantizer(format, role="weights")
        self.target = target
        self.register_buffer("value", value, persistent=False)
        self._y_format = ""
        if value is not None and not self.weight_quantizer.ready:
            self.weight_quantizer.fit(value)

    def forward(self, value: Tensor | None = None) -> Tensor:
        """The rounded constant."""
        if exporting():
            self.check_frozen()
            return emit("Constant", (self.codes,), self.codes.shape, y_format=self._y_format)
        return self.weight_quantizer(self.value if value is None else value)

    @torch.no_grad()
    def freeze_value(self, value: Tensor | None) -> None:
        """Stores the codes of the constant."""
        self._frozen = True
        kept = self.value if value is None else value
        assert kept is not None
        self.register_buffer("codes", self.weight_quantizer.codes(self.weight_quantizer(kept)).to(torch.int32))
        self._y_format = str(self.weight_quantizer.format)

    def freeze(self) -> None:
        """Stores the codes of a constant this module owns."""
        if self.value is not None:
            self.freeze_value(None)

    def extra_repr(self) -> str:
        """Where the value lives, for printing."""
        return self.target or f"shape={tuple(self.value.shape)}"
