"""`MLGRU`: the token mixer of the MatMul-free language model, in both published forms; trits and a fixed-point state.

``form="paper"`` (arXiv 2406.02528, section 3.3.1), with x the token's features and h' the state of the token before::

    f = sigmoid(x Wf)    c = silu(x Wc)    g = sigmoid(x Wg)
    h = f * h' + (1 - f) * c
    y = norm(g * h) Wo

``form="released"`` (the authors' code) bounds f from below, feature by feature, and normalises the gate::

    f = b + (1 - b) * sigmoid(x Wf)        c, h as above
    y = norm(rms_norm(x Wg) * silu(h)) Wo

``norm`` is that of the published ternary layer, which normalises its own input; it may be left out. (The inputs of Wf,
Wc and Wg are normalised by whoever calls.)

**Numbers.** Sigmoid and SiLU are tables of at most 12 bits of input. f is a share of 1, unsigned with no integer bits,
so that 1 - f is exact. ``f * h' + (1 - f) * c`` is one exact sum, rounded once into the state's format. In the released
form the bound b has f's format and f is rounded once more.

**Sequences.** `prefill` projects a whole sequence at once and then runs the recurrence, feature by feature, token by
token; `step` takes one token and keeps the state. They give the same codes. The step is what is exported.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.nn import arguments
from edgemat.nn.activation import QuantConstant
from edgemat.nn.emission import exporting
from edgemat.nn.glu import NORMALISED, normalizer, projection, share_tokens, table_format
from edgemat.nn.join import QuantMul
from edgemat.nn.layer import QuantLayer, exact_arithmetic
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.recurrence import gated_means, takes_sequences
from edgemat.nn.state import QuantState
from edgemat.nn.tables import QuantTable

FORMS = ("paper", "released")
GAIN = 2.0**-2.5
"""Gain of the uniform Xavier initialisation that the authors' code gives the projections."""


class MLGRU(QuantLayer):
    """Features ``[N, T, dim]`` of whole sequences, or ``[N, dim]`` of one step, to the same shape.

    Attributes:
        state: The recurrent state ``[N, dim]``.
        bound: The lower bound of f by feature, ``[dim]`` in [0, 1) (a buffer; ``form="released"``): zeros, or what
            `MatMulFreeLM` learns.

    Args:
        dim: Features.
        form: ``"paper"`` or ``"released"``.
        ternary: How trits are made (`TernaryLinear`); `scale` and `per_channel` as well.
        input: Format of an own input quantiser, or None where `link` names the producer.
        gates: Format of the projections that index a table: at most 12 bits.
        forget: Format of f, unsigned with no integer bits.
        activations: Format of c, of the output gate and of the gated state.
        state: Format of the state.
        output: Format of the result, or None for the exact sums.
        norm: Whether the gated state is normalised (`RMSNorm`) before the last projection.
        tokens: Format of the codes into which each token's features are quantised in front of the projections, with a
            power of two of their own (`TernaryLinear`), once for those that read the same; None for none.
            `token_scale` as well.

    Raises:
        FormatError: for another form, projections of more than 12 bits, or another format of f.
    """

    def __init__(
        self,
        dim: int,
        *,
        form: str = "paper",
        ternary: str = "absmean",
        scale: str = "power_of_two",
        per_channel: bool = True,
        input: str | Fixed | None = "fixed<8>",
        gates: str | Fixed = "fixed<10>",
        forget: str | Fixed = "ufixed<8,0>",
        activations: str | Fixed = "fixed<8>",
        state: str | Fixed = "fixed<16>",
        output: str | Fixed | FixedQuantizer | None = None,
        norm: bool = True,
        tokens: str | Fixed | None = None,
        token_scale: str = "power_of_two",
    ):
        super().__init__(input)
        if form not in FORMS:
            raise FormatError(f"an MLGRU of form {form!r} was asked for, expected {' or '.join(map(repr, FORMS))}")
        gate = Fixed.parse(forget) if isinstance(forget, str) else forget
        if gate.signed or gate.int_bits != 0:
            raise FormatError(f"an MLGRU's forget is {gate}, expected an unsigned share of 1 such as 'ufixed<8,0>'")
        self.dim, self.form = arguments.whole("an MLGRU's dim", dim, 1), form
        options = {"ternary": ternary, "scale": scale, "per_channel": per_channel}
        options |= {"tokens": tokens, "token_scale": token_scale}
        source, narrow = self.input_quantizer, table_format(gates, "an MLGRU's gates")
        self.f_proj = projection(dim, dim, source, narrow, options)
        self.c_proj = projection(dim, dim, source, narrow, options)
        self.g_proj = projection(dim, dim, source, narrow, options)
        share_tokens(self.f_proj, self.c_proj, self.g_proj)
        self.sigmoid = QuantTable("sigmoid", gate, input=None)
        self.sigmoid.link(self.f_proj.output_quantizer)
        self.silu = QuantTable("silu", activations, input=None)
        self.silu.link(self.c_proj.output_quantizer)
        self.one = QuantConstant(Fixed(2, 2), torch.ones(1))
        self.state = QuantState(dim, state)
        kept = self.state.output_quantizer
        self.product = QuantMul(NORMALISED if norm else activations)
        if form == "paper":
            self.gate: nn.Module = QuantTable("sigmoid", activations, input=None)
            self.gate.link(self.g_proj.output_quantizer)  # type: ignore[operator]
            self.product.link(self.gate.output_quantizer, kept)  # type: ignore[arg-type]
        else:
            self._build_released(dim, gate, narrow, activations)
        normalised = activations if tokens is None else NORMALISED
        self.norm = normalizer(dim, self.product.output_quantizer, normalised) if norm else None
        last = self.product.output_quantizer if self.norm is None else self.norm.output_quantizer
        self.o_proj = projection(dim, dim, last, None, options)
        if output is not None:
            made = output if isinstance(output, FixedQuantizer) else FixedQuantizer(output, role="requantize")
            self.o_proj.output_quantizer = made
        self.reset_parameters()

    def _build_released(self, dim: int, gate: Fixed, narrow: Fixed, activations: str | Fixed) -> None:
        self.gate = normalizer(dim, self.g_proj.output_quantizer, activations)
        self.swish = QuantTable("silu", activations, input=narrow)
        assert self.swish.input_quantizer is not None
        self.swish.input_quantizer.role = "requantize"
        self.product.link(self.gate.output_quantizer, self.swish.output_quantizer)
        self.register_buffer("bound", torch.zeros(dim))
        self.least = QuantConstant(gate, torch.zeros(dim))
        self.bounded = FixedQuantizer(gate, role="requantize")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The initialisation of the authors' code: uniform Xavier with a gain of ``2**-2.5``."""
        for part in (self.f_proj, self.c_proj, self.g_proj, self.o_proj):
            nn.init.xavier_uniform_(part.weight, gain=GAIN)

    def result_quantizer(self) -> FixedQuantizer | None:
        """The quantiser of the result, which the last part owns; None for exact sums."""
        return self.o_proj.output_quantizer

    def link(self, *quantizers: FixedQuantizer | None) -> None:
        """Names the quantiser whose values reach this layer."""
        super().link(*quantizers)
        for part in (self.f_proj, self.c_proj, self.g_proj):
            part.link(*quantizers)

    # -- the parts ------------------------------------------------------------------------------------------------
    def projected(self, x: Tensor, bound: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """f, c and the output gate of features ``[..., dim]``; `bound` is the lower bound of f (``"released"``)."""
        rows = self.f_proj.rows(x)
        f = self.sigmoid(self.f_proj(x, rows))
        if self.form == "released":
            f = self._raised(f, self.bound if bound is None else bound)
        return f, self.silu(self.c_proj(x, rows)), self.gate(self.g_proj(x, rows))

    def _raised(self, f: Tensor, bound: Tensor) -> Tensor:
        """``f + b * (1 - f)``, rounded into the format of f."""
        if exporting():
            return self.bounded(f + self.least() * (self.one() - f))
        least = self.least.weight_quantizer(bound)
        with exact_arithmetic(f):
            return self.bounded(f.double() + least.double() * (1.0 - f.double())).float()

    def mixed(self, f: Tensor, c: Tensor, h: Tensor) -> Tensor:
        """``f * h + (1 - f) * c``, exact, not yet rounded."""
        if exporting():
            return f * h + (self.one() - f) * c
        with exact_arithmetic(f):
            f, c, h = f.double(), c.double(), h.double()
            return f * h + (1.0 - f) * c

    def gated(self, gate: Tensor, h: Tensor) -> Tensor:
        """The output of states ``[..., dim]`` under their gates."""
        other = h if self.form == "paper" else self.swish(h)
        y: Tensor = self.product(gate, other)
        return self.o_proj(y if self.norm is None else self.norm(y))

    # -- over time ------------------------------------------------------------------------------------------------
    def prefill(self, x: Tensor, bound: Tensor | None = None) -> Tensor:
        """Outputs ``[N, T, dim]`` of whole sequences from the initial state on.

        In eval mode the last state is kept, so that `step` goes on behind the sequence.

        Raises:
            FormatError: for features of another shape.
        """
        if x.dim() != 3 or x.shape[2] != self.dim or not x.shape[1]:
            raise self._wrong(x)
        x = self.enter(x)
        f, c, gate = self.projected(x, bound)
        states = self.states(f, c)
        if not self.training:
            self.state.reset()
            self.state.value = states[:, -1].detach().clone()
        return self.gated(gate, states)

    def _wrong(self, x: Tensor) -> FormatError:
        return FormatError(
            f"layer {self.path or 'MLGRU'!r} got features of shape {tuple(x.shape)}, expected [N, T, {self.dim}] "
            f"with at least one token, or [N, {self.dim}] for one step"
        )

    def states(self, f: Tensor, c: Tensor) -> Tensor:
        """The states ``[N, T, dim]`` of whole sequences of shares f and entering values c."""
        kept, entering = self.state.output_quantizer, self.silu.output_quantizer
        share = self.sigmoid.output_quantizer if self.form == "paper" else self.bounded
        assert kept is not None and share is not None and entering is not None
        if takes_sequences(kept, share, entering):
            with exact_arithmetic(f):
                return gated_means(f, c, kept, share, entering)
        h, made = self.state.initial(f), []
        for f_t, c_t in zip(f.unbind(1), c.unbind(1), strict=True):
            h = self.state.quantize(self.mixed(f_t, c_t, h))
            made.append(h)
        return torch.stack(made, 1)

    def step(self, x: Tensor, bound: Tensor | None = None) -> Tensor:
        """Outputs ``[N, dim]`` of one token; reads the state and writes the next.

        Raises:
            FormatError: for features of another shape; in training mode.
        """
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise self._wrong(x)
        x = self.enter(x)
        f, c, gate = self.projected(x, bound)
        return self.gated(gate, self.state.write(self.mixed(f, c, self.state.read(x))))

    def forward(self, x: Tensor, bound: Tensor | None = None) -> Tensor:
        """`prefill` for three axes, `step` for two."""
        return self.step(x, bound) if x.dim() == 2 else self.prefill(x, bound)

    @torch.no_grad()
    def freeze(self) -> None:
        """Stores the codes of the lower bound."""
        super().freeze()
        if self.form == "released":
            self.least.value = self.bound.clone()
            self.least.freeze()

    def extra_repr(self) -> str:
        """Size and form, for printing."""
        return f"dim={self.dim}, form={self.form}"
