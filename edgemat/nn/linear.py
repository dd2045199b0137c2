"""`QuantLinear`: `torch.nn.Linear` with quantised weights, maybe over tokens that have scales of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.nn.emission import exporting
from edgemat.nn.layer import exact_arithmetic
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.token_quantizer import TokenQuantizer, token_quantizer
from edgemat.nn.weighted_layer import WeightedLayer
from edgemat.recipe import TOKEN_SCALES, WeightSpec


class QuantLinear(WeightedLayer):
    """`torch.nn.Linear` with quantised weights, ``[..., in_features]`` to ``[..., out_features]``.

    Args:
        in_features: Size of the last input axis.
        out_features: Size of the last output axis.
        bias: Whether there is a bias.
        weights: Format of the weights; ``fixed<6>`` learns the binary point.
        bias_format: Width of the bias.
        input: Format of the input, quantised by this layer; None where `link` names the producer.
        output: Format of the result, or None for the exact accumulator.
        relu: Whether a ReLU precedes the output quantiser.
        per_channel: Whether a learned weight binary point is one per output.
        tokens: Format of a row's codes, such as ``"fixed<8>"``, where each row (token) of the input is quantised with a
            power of two of its own (`TokenQuantizer`, docs/normalization.md); None for the input's own codes.
        token_scale: ``"power_of_two"``, or ``"absmax"`` for training alone.

    Raises:
        FormatError: for tokens together with a bias, which does not scale with a row, and a `token_scale` without them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weights: str | Fixed | WeightSpec = "fixed<8>",
        bias_format: str | Fixed = "fixed<32>",
        input: str | Fixed | None = "fixed<8>",
        output: str | Fixed | FixedQuantizer | None = None,
        relu: bool = False,
        per_channel: bool = True,
        tokens: str | Fixed | None = None,
        token_scale: str = "power_of_two",
    ):
        super().__init__(
            (out_features, in_features), out_features, bias, weights, bias_format, input, output, relu, per_channel
        )
        self.in_features, self.out_features = in_features, out_features
        self.tokens: TokenQuantizer | None = None
        if tokens is None:
            if token_scale != TOKEN_SCALES[0]:
                raise FormatError(
                    f"a {type(self).__name__} has token_scale={token_scale!r} and no tokens that it could scale, "
                    "expected tokens='fixed<8>' with it; leave it out otherwise"
                )
            return
        if bias:
            raise FormatError(
                f"a {type(self).__name__} has tokens={str(tokens)!r} and a bias, which does not scale with a token, "
                "expected bias=False; add a bias behind the layer"
            )
        if self.limiter is not None:
            self.limiter.meet(True)
        self.tokens = token_quantizer(tokens, token_scale, f"a {type(self).__name__}")
        self.tokens.link(self.input_quantizer)

    def link(self, *quantizers: FixedQuantizer | None) -> None:
        """Names the quantiser whose values reach this layer."""
        super().link(*quantizers)
        if self.tokens is not None and self.input_quantizer is None:
            self.tokens.link(*quantizers)

    def source(self, index: int = 0) -> FixedQuantizer | None:
        """The quantiser of what is summed: of the tokens' codes, where each token has a scale of its own."""
        return super().source(index) if self.tokens is None else self.tokens.grid

    def _takes_real(self) -> bool:
        return super()._takes_real() or (self.tokens is not None and self.tokens.passes)

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """What the layer's `TokenQuantizer` makes of an input, for `forward`; None without one."""
        return None if self.tokens is None else self.tokens(self.enter(x))

    def forward(self, x: Tensor, rows: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Applies the layer; the result carries exact values of the accumulator or of the output format.

        Args:
            x: ``[..., in_features]``.
            rows: The codes and scales of x, where a layer that shares this one's `tokens` has made them already.
        """
        if self.tokens is None:
            return super().forward(x)
        codes, scales = self.tokens(self.enter(x)) if rows is None else rows
        if exporting():
            y = self.emit(codes)
        else:
            with exact_arithmetic(x):
                y = self._exact(codes)
        return self.leave(self.tokens.rescale(y, scales))

    def freeze(self) -> None:
        """Stores the weight codes and the texts of the formats, those of the tokens first."""
        if self.tokens is not None:
            self.tokens.freeze()
        super().freeze()

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias``."""
        return F.linear(x, weight, bias)

    def node(self, x: Tensor) -> tuple[str, list[Any], dict[str, Any]]:
        """``Linear``."""
        return "Linear", [*x.shape[:-1], self.out_features], {}

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
