"""`GLU`: the channel mixer of the MatMul-free language model (arXiv 2406.02528, section 3.3.2), SwiGLU with trits.

``y = norm(silu(x Wg) * (x Wu)) Wd``, every W ternary, SiLU from a table. The norm is that of the published ternary
layer, which normalises its own input; it may be left out. (The inputs of Wg and Wu are normalised by whoever calls.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.nn import arguments
from edgemat.nn.join import QuantMul
from edgemat.nn.layer import QuantLayer
from edgemat.nn.normalization import RMSNorm
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.tables import TABLE_BITS, QuantTable
from edgemat.nn.ternary import TernaryLinear

STEP = 256
EPS = 1e-8
"""What the published ternary layer's norm adds to the mean square."""
NORMALISED = "fixed<16>"
"""Format of what is normalised next."""


def hidden_width(dim: int) -> int:
    """``8 * dim / 3`` rounded up to a multiple of 256, the published width."""
    return -(-(8 * dim // 3) // STEP) * STEP


def projection(
    inputs: int, outputs: int, source: FixedQuantizer | None, output: str | Fixed | None, options: dict[str, Any]
) -> TernaryLinear:
    """A ternary projection without bias that takes the values of `source` (or what it is linked to later)."""
    layer = TernaryLinear(inputs, outputs, input=None, output=output, **options)
    if source is not None:
        layer.link(source)
    return layer


def share_tokens(*layers: TernaryLinear) -> None:
    """Gives projections of the same features one `TokenQuantizer`, the first's: each row is quantised once for all."""
    for layer in layers[1:]:
        layer.tokens = layers[0].tokens


def table_format(format: str | Fixed, label: str) -> Fixed:
    """A format that indexes a table.

    Raises:
        FormatError: if it has more than 12 bits.
    """
    fmt = Fixed.parse(format) if isinstance(format, str) else format
    if fmt.width > TABLE_BITS:
        raise FormatError(f"{label} has {fmt} before a table, expected at most {TABLE_BITS} bits such as 'fixed<10>'")
    return fmt


def normalizer(features: int, source: FixedQuantizer | None, output: str | Fixed) -> RMSNorm:
    """The norm in front of a ternary projection."""
    layer = RMSNorm(features, EPS, input=None, output=output)
    layer.link(source)
    return layer


class GLU(QuantLayer):
    """``[..., dim]`` to ``[..., dim]``.

    Args:
        dim: Features.
        hidden: Hidden features; None for `hidden_width(dim)`.
        ternary: How trits are made (`TernaryLinear`); `scale` and `per_channel` as well.
        input: Format of an own input quantiser, or None where `link` names the producer.
        gate: Format of ``x Wg``, which indexes the table: at most 12 bits.
        activations: Format of silu's values, of ``x Wu`` and of the product.
        output: Format of the result, or None for the exact sums.
        norm: Whether the product is normalised (`RMSNorm`) before the last projection.
        tokens: Format of the codes into which each token's features are quantised in front of the projections, with a
            power of two of their own (`TernaryLinear`), once for those that read the same; None for none.
            `token_scale` as well.

    Raises:
        FormatError: for a gate of more than 12 bits.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        ternary: str = "absmean",
        scale: str = "power_of_two",
        per_channel: bool = True,
        input: str | Fixed | None = "fixed<8>",
        gate: str | Fixed = "fixed<10>",
        activations: str | Fixed = "fixed<8>",
        output: str | Fixed | FixedQuantizer | None = None,
        norm: bool = True,
        tokens: str | Fixed | None = None,
        token_scale: str = "power_of_two",
    ):
        super().__init__(input)
        self.dim = arguments.whole("a GLU's dim", dim, 1)
        self.hidden = hidden_width(dim) if hidden is None else arguments.whole("a GLU's hidden", hidden, 1)
        options = {"ternary": ternary, "scale": scale, "per_channel": per_channel}
        options |= {"tokens": tokens, "token_scale": token_scale}
        source = self.input_quantizer
        self.gate_proj = projection(dim, self.hidden, source, table_format(gate, "a GLU's gate"), options)
        self.up_proj = projection(dim, self.hidden, source, activations, options)
        share_tokens(self.gate_proj, self.up_proj)
        self.silu = QuantTable("silu", activations, input=None)
        self.silu.link(self.gate_proj.output_quantizer)
        self.product = QuantMul(NORMALISED if norm else activations)
        self.product.link(self.silu.output_quantizer, self.up_proj.output_quantizer)
        normalised = activations if tokens is None else NORMALISED
        self.norm = normalizer(self.hidden, self.product.output_quantizer, normalised) if norm else None
        source = self.product.output_quantizer if self.norm is None else self.norm.output_quantizer
        self.down_proj = projection(self.hidden, dim, source, None, options)
        self.down_proj.output_quantizer = None if output is None else self.made_output(output)

    def made_output(self, output: str | Fixed | FixedQuantizer) -> FixedQuantizer:
        """The quantiser of the result."""
        return output if isinstance(output, FixedQuantizer) else FixedQuantizer(output, role="requantize")

    def result_quantizer(self) -> FixedQuantizer | None:
        """The quantiser of the result, which the last part owns; None for exact sums."""
        return self.down_proj.output_quantizer

    def link(self, *quantizers: FixedQuantizer | None) -> None:
        """Names the quantiser whose values reach this layer."""
        super().link(*quantizers)
        for part in (self.gate_proj, self.up_proj):
            part.link(*quantizers)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes the features of each token.

        Raises:
            FormatError: for another number of features.
        """
        if not x.dim() or x.shape[-1] != self.dim:
            raise FormatError(
                f"layer {self.path or 'GLU'!r} got features of shape {tuple(x.shape)}, expected [..., {self.dim}]"
            )
        x = self.enter(x)
        rows = self.gate_proj.rows(x)
        y: Tensor = self.product(self.silu(self.gate_proj(x, rows)), self.up_proj(x, rows))
        return self.down_proj(y if self.norm is None else self.norm(y))

    @torch.no_grad()
    def reset_parameters(self, deviation: float = 0.02, residuals: int = 1) -> None:
        """The published initialisation: normal, the last projection divided by the root of the residual additions."""
        for part in (self.gate_proj, self.up_proj, self.down_proj):
            torch.nn.init.normal_(part.weight, std=deviation)
        self.down_proj.weight.div_(residuals**0.5)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"dim={self.dim}, hidden={self.hidden}"
