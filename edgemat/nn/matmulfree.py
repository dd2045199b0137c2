"""`MatMulFreeLM`: the MatMul-free language model (arXiv 2406.02528) with trits, fixed-point states and integer codes.

A token's features are a row of the embedding. Each block adds to them what its token mixer (`MLGRU`) and its channel
mixer (`GLU`) make of them, each behind an `RMSNorm`; a last norm and a ternary head give the logits::

    x = embedding[token]
    for each block:  x = x + MLGRU(RMSNorm(x));  x = x + GLU(RMSNorm(x))
    logits = RMSNorm(x) W

The features x are the residual stream: one format behind the embedding and one behind each addition, wider than the
8 bits of the norms' results.

Nothing is multiplied by a weight. What multiplications remain are of two variables (the gates of the state) and of a
norm's gain.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.nn import arguments
from edgemat.nn.embedding import QuantEmbedding
from edgemat.nn.glu import GLU, NORMALISED, normalizer
from edgemat.nn.join import QuantAdd
from edgemat.nn.layer import QuantLayer
from edgemat.nn.mlgru import MLGRU
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.state import reset_states
from edgemat.nn.ternary import TernaryLinear

DEVIATION = 0.02
"""Standard deviation of the initial embedding, channel mixers and head, as in the authors' configuration."""


class MatMulFreeBlock(nn.Module):
    """One block; see `MatMulFreeLM` for the arguments."""

    def __init__(
        self,
        dim: int,
        hidden: int | None,
        form: str,
        options: dict[str, object],
        activations: str | Fixed,
        residual: str | Fixed,
        gates: str | Fixed,
        state: str | Fixed,
        source: FixedQuantizer,
    ):
        super().__init__()
        normalised = activations if options["tokens"] is None else NORMALISED
        self.mixer_norm = normalizer(dim, source, normalised)
        formats = {"gates": gates, "activations": activations, "state": state}
        self.mixer = MLGRU(dim, form=form, input=None, output=residual, **formats, **options)  # type: ignore[arg-type]
        self.mixer.link(self.mixer_norm.output_quantizer)
        self.mixer_add = QuantAdd(residual)
        self.mixer_add.link(source, self.mixer.o_proj.output_quantizer)
        self.channel_norm = normalizer(dim, self.mixer_add.output_quantizer, normalised)
        narrow = {"gate": gates, "activations": activations}
        self.channel = GLU(dim, hidden, input=None, output=residual, **narrow, **options)  # type: ignore[arg-type]
        self.channel.link(self.channel_norm.output_quantizer)
        self.channel_add = QuantAdd(residual)
        self.channel_add.link(self.mixer_add.output_quantizer, self.channel.down_proj.output_quantizer)

    def forward(self, x: Tensor, bound: Tensor | None = None) -> Tensor:
        """Features ``[N, T, dim]`` of sequences or ``[N, dim]`` of one step."""
        x = self.mixer_add(x, self.mixer(self.mixer_norm(x), bound))
        y: Tensor = self.channel_add(x, self.channel(self.channel_norm(x)))
        return y


class MatMulFreeLM(QuantLayer):
    """Tokens to logits: ``[N, T]`` to ``[N, T, vocabulary]``, or ``[N]`` to ``[N, vocabulary]`` for one step.

    One step is what `edgemat.to_onnx` exports, with ``[N]`` tokens as the example: token in, logits out, states inside.

    Attributes:
        bounds: Latent lower bounds of the forget gates ``[layers, dim]`` (``form="released"``): block i is bounded by
            the cumulative sum of their softmax over the layers, which is 0 in the first.

    Args:
        vocabulary: Number of tokens.
        dim: Features of a token.
        layers: Blocks.
        hidden: Features of the channel mixers; None for 8/3 of `dim`, rounded up to a multiple of 256.
        form: Form of the token mixers, ``"paper"`` or ``"released"``.
        ternary: How trits are made (`TernaryLinear`); `scale` and `per_channel` as well.
        activations: Format of normalised features, gates and values inside the mixers.
        residual: Format of the residual stream: embedding, results of the mixers and sums.
        gates: Format of projections that index a table, at most 12 bits.
        state: Format of the recurrent states.
        output: Format of the logits, or None for the exact sums.
        tokens: Format of the codes into which each token's normalised features are quantised in front of each ternary
            layer, with a power of two of their own, e.g. ``"fixed<8>"``; the norms then keep 16 bits. None for none.
            `token_scale`: ``"power_of_two"``, or ``"absmax"`` (the published float division) for training alone.

    Raises:
        FormatError: for sizes below 1, or what the parts refuse.
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        layers: int,
        *,
        hidden: int | None = None,
        form: str = "paper",
        ternary: str = "absmean",
        scale: str = "power_of_two",
        per_channel: bool = True,
        activations: str | Fixed = "fixed<8>",
        residual: str | Fixed = "fixed<16>",
        gates: str | Fixed = "fixed<10>",
        state: str | Fixed = "fixed<16>",
        output: str | Fixed | None = None,
        tokens: str | Fixed | None = None,
        token_scale: str = "power_of_two",
    ):
        super().__init__()
        vocabulary = arguments.whole("a MatMulFreeLM's vocabulary", vocabulary, 1)
        dim, layers = (
            arguments.whole("a MatMulFreeLM's dim", dim, 1),
            arguments.whole("a MatMulFreeLM's layers", layers, 1),
        )
        self.vocabulary, self.dim, self.form = vocabulary, dim, form
        options = {"ternary": ternary, "scale": scale, "per_channel": per_channel}
        options |= {"tokens": tokens, "token_scale": token_scale}
        self.embedding = QuantEmbedding(vocabulary, dim, residual)
        source = self.embedding.output
        self.blocks = nn.ModuleList()
        for _ in range(layers):
            block = MatMulFreeBlock(dim, hidden, form, options, activations, residual, gates, state, source)
            self.blocks.append(block)
            assert block.channel_add.output_quantizer is not None
            source = block.channel_add.output_quantizer
        self.norm = normalizer(dim, source, activations if tokens is None else NORMALISED)
        self.head = TernaryLinear(dim, vocabulary, input=None, output=output, **options)  # type: ignore[arg-type]
        self.head.link(self.norm.output_quantizer)
        self.bounds = nn.Parameter(torch.zeros(layers, dim)) if form == "released" else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initialisation: normal with 0.02 (the last projection of a channel mixer divided by the root of
        twice the layers), token mixers uniform after Xavier with a gain of ``2**-2.5``, bounds at 0."""
        nn.init.normal_(self.embedding.weight, std=DEVIATION)
        nn.init.normal_(self.head.weight, std=DEVIATION)
        for block in self._blocks():
            block.mixer.reset_parameters()
            block.channel.reset_parameters(DEVIATION, 2 * len(self.blocks))
        if self.bounds is not None:
            self.bounds.zero_()

    def _blocks(self) -> list[MatMulFreeBlock]:
        return [block for block in self.blocks if isinstance(block, MatMulFreeBlock)]

    def result_quantizer(self) -> FixedQuantizer | None:
        """The quantiser of the result, which the last part owns; None for exact sums."""
        return self.head.output_quantizer

    def lower_bounds(self) -> list[Tensor | None]:
        """The lower bound of each block's forget gate, ``[dim]``, or None for each in the paper's form."""
        if self.bounds is None:
            return [None] * len(self.blocks)
        shares = self.bounds.softmax(0)
        return list((shares.cumsum(0) - shares[0]).unbind(0))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits: of whole sequences for ``[N, T]`` tokens, of one step for ``[N]``.

        Tokens are integers, or whole floats.

        Raises:
            FormatError: for other shapes, an empty sequence, other types, or what is no row of the embedding.
        """
        x = self.embedding(_tokens("MatMulFreeLM", tokens, (1, 2)))
        for block, bound in zip(self.blocks, self.lower_bounds(), strict=True):
            x = block(x, bound)
        y: Tensor = self.head(self.norm(x))
        return y

    def prefill(self, tokens: Tensor) -> Tensor:
        """Logits ``[N, T, vocabulary]`` of sequences ``[N, T]`` from the initial states on.

        In eval mode the last states are kept, so that `step` goes on behind the sequences.

        Raises:
            FormatError: as `forward`.
        """
        return self(_tokens("prefill", tokens, (2,)))

    def step(self, token: Tensor) -> Tensor:
        """Logits ``[N, vocabulary]`` of one token ``[N]`` behind the states, which move on.

        Raises:
            FormatError: as `forward`; in training mode.
        """
        return self(_tokens("step", token, (1,)))

    def reset(self) -> None:
        """Begins another sequence."""
        reset_states(self)

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, count: int, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Continues sequences.

        Args:
            tokens: The beginning, ``[N, T]`` with T at least 1.
            count: Tokens to add, at least 0.
            temperature: At least 0, which takes the most likely token (the first of equal ones); else tokens are drawn
                from the softmax of the logits divided by it.
            generator: Where random numbers come from.

        Returns:
            int64 ``[N, T + count]``.

        Raises:
            FormatError: for an empty beginning, another count or temperature, or in training mode.
        """
        if self.training:
            raise FormatError("generate was called in training mode, expected eval mode; call model.eval() first")
        tokens, count = _tokens("generate", tokens, (2,)), arguments.whole("generate: count", count)
        temperature = arguments.number("generate: temperature", temperature, least=0)
        self.reset()
        made, logits = [tokens.to(torch.int64)], self.prefill(tokens)[:, -1]
        for _ in range(count):
            if temperature > 0:
                logits = logits.double()
                shares = torch.softmax((logits - logits.amax(1, keepdim=True)) / temperature, 1)
                token = torch.multinomial(shares, 1, generator=generator)[:, 0]
            else:
                token = logits.argmax(1)
            made.append(token[:, None])
            logits = self.step(token)
        return torch.cat(made, 1)

    @torch.no_grad()
    def freeze(self) -> None:
        """Hands the lower bounds to the blocks, which store their codes."""
        super().freeze()
        for block, bound in zip(self._blocks(), self.lower_bounds(), strict=True):
            if bound is not None:
                block.mixer.bound.copy_(bound)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"vocabulary={self.vocabulary}, dim={self.dim}, layers={len(self.blocks)}, form={self.form}"


def _tokens(label: str, tokens: Tensor, axes: tuple[int, ...]) -> Tensor:
    """`tokens`, whose values the embedding checks.

    Raises:
        FormatError: for anything but a tensor of numbers with one of so many axes and at least one token each.
    """
    shapes = " or ".join("[N, T] with at least one token each" if count == 2 else "[N]" for count in axes)
    if not isinstance(tokens, Tensor):
        raise FormatError(f"{label} got a {type(tokens).__name__}, expected a tensor of tokens {shapes}")
    if tokens.dim() not in axes or (tokens.dim() == 2 and not tokens.shape[1]):
        raise FormatError(f"{label} got tokens of shape {tuple(tokens.shape)}, expected {shapes}")
    if tokens.dtype == torch.bool or tokens.is_complex():
        raise FormatError(f"{label} got tokens of type {tokens.dtype}, expected integers such as torch.int64")
    return tokens
