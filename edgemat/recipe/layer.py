"""What a recipe says of one layer: the formats and groups that the layers of `edgemat.nn` take."""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgemat.formats import Fixed
from edgemat.recipe.settings import BINARY_KINDS, SCALES, TERNARY

PARAMETER_BITS = 12
"""Bits of batch norms, slopes and constants in a network of bipolar weights, as in FracBNN (arXiv 2012.12206)."""


@dataclass(frozen=True)
class WeightSpec:
    """How the weights of one layer are quantised: what the layers of `edgemat.nn` take for `weights`.

    Attributes:
        format: Width, sign, modes and, where stated, the binary point(s); ``bipolar`` for binary weights.
        groups: What shares a learned binary point (and width): the whole ``"tensor"``, an output ``"channel"``, as many
            inputs of one output as the number says, or each ``"weight"`` alone.
        learn_width: Whether the width is learned, too, from `format.width` down to 0 (pruned).
        khot: Largest number of signed powers of two a weight is the sum of, or None for any code.
        accumulator: Bits that the layer's accumulator must never exceed (A2Q), or None.
        accumulator_bound: ``"a2q"`` (arXiv 2308.13504), ``"a2q+"`` (arXiv 2401.10432), or ``"auto"``: a2q where the
            layer's input is signed, a2q+ where it is not.
        points: ``"learned"`` by gradient, or ``"statistics"``: after the mean magnitude (StatsQ, arXiv 2302.02210).
        ternary: How trits are made of weights (docs/ternary.md): ``"absmean"``, ``"learned"`` or ``"b1.58"`` with the
            format `TERNARY`, ``"binary"`` or ``"onebit"`` with ``bipolar``; None for weights that are rounded.
        scale: How the scale of ternary weights is deployed: ``"power_of_two"``, a multiplier such as ``"fixed<8>"``, or
            ``"free"`` for training alone.
    """

    format: Fixed
    groups: str | int = "channel"
    learn_width: bool = False
    khot: int | None = None
    accumulator: int | None = None
    accumulator_bound: str = "auto"
    points: str = "learned"
    ternary: str | None = None
    scale: str = "power_of_two"


@dataclass(frozen=True)
class ActivationSpec:
    """How the output of one layer is quantised.

    Attributes:
        format: Width, sign, modes and, where stated, the binary point.
        groups: What shares a learned binary point (and width): the ``"tensor"`` or a ``"channel"`` (axis 1).
        learn_width: Whether the width is learned, too, from `format.width` down to 0 (pruned).
    """

    format: Fixed
    groups: str = "tensor"
    learn_width: bool = False


@dataclass(frozen=True)
class LayerRecipe:
    """What holds for one layer after all rules.

    Attributes:
        weights: Format of weights, slopes and constants.
        bias: Width of the bias; its binary point is that of the accumulator.
        activations: Format of the layer's output.
        stated: Whether a rule states `activations`, which is then taken as written, sign included.
        input: Format the layer's input is requantised to first, or None.
        outputs: Format of a network output computed by this layer, or None for the exact accumulator.
        per_channel_weights: Whether each output channel has its own binary point.
        batch_norm: ``"fold"`` or ``"affine"``.
        every_layer: Whether the output is quantised even where an activation function follows directly.
        learn_widths: What learns its width: ``"none"``, ``"weights"``, ``"activations"`` or ``"all"``.
        weight_groups: What weights share a binary point; None follows `per_channel_weights`.
        activation_groups: What activations share a binary point.
        khot: See `WeightSpec`; `accumulator`, `accumulator_bound`, `points`, `ternary` and `scale` as well.
        tokens: Format of a token's codes in front of a Linear, or None.
        token_scale: ``"power_of_two"``, or ``"absmax"`` for training alone.
    """

    weights: Fixed
    bias: Fixed
    activations: Fixed
    stated: bool = False
    input: Fixed | None = None
    outputs: Fixed | None = None
    per_channel_weights: bool = True
    batch_norm: str = "fold"
    every_layer: bool = False
    learn_widths: str = "none"
    weight_groups: str | int | None = None
    activation_groups: str = "tensor"
    khot: int | None = None
    accumulator: int | None = None
    accumulator_bound: str = "auto"
    points: str = "learned"
    ternary: str | None = None
    scale: str = "power_of_two"
    tokens: Fixed | None = None
    token_scale: str = "power_of_two"

    def activation(self, non_negative: bool) -> Fixed:
        """Format of an output; unsigned of the same width where it is proven non-negative, unless a rule states it.

        Bipolar stays bipolar.
        """
        if self.stated or not non_negative or self.activations.bipolar:
            return self.activations
        return replace(self.activations, signed=False)

    def activation_spec(self, format: Fixed) -> ActivationSpec:
        """How an output of `format` (one of `activation`, `outputs`, `input`) is quantised."""
        return ActivationSpec(format, self.activation_groups, self.learn_widths in ("activations", "all"))

    @property
    def parameters(self) -> Fixed:
        """Format of parameters that scale or shift (batch norm, slopes, constants): that of the weights.

        Where those are bipolar or ternary, which can neither scale nor shift, 12 bits with a learned binary point.
        """
        return Fixed(PARAMETER_BITS) if self.weights.bipolar or self.trits is not None else self.weights

    @property
    def trits(self) -> str | None:
        """How trits are made of the weights, or None where the format of the weights is none of trits."""
        if self.ternary is None:
            return None
        fits = self.weights.bipolar if self.ternary in BINARY_KINDS else self.weights == TERNARY
        return self.ternary if fits else None

    @property
    def folds(self) -> bool:
        """Whether weights can take a batch norm in: a sign or a scale that is a power of two cannot, and a layer whose
        tokens have scales of their own has no bias."""
        free = self.tokens is None and not self.weights.bipolar
        return free and (self.trits is None or self.scale not in SCALES)

    def parameter_spec(self) -> WeightSpec:
        """How such parameters are quantised."""
        return replace(self.weight_spec(), format=self.parameters, ternary=None)

    def weight_spec(self) -> WeightSpec:
        """How the weights are quantised."""
        groups = self.weight_groups
        if groups is None:
            groups = "channel" if self.per_channel_weights else "tensor"
        learn = self.learn_widths in ("weights", "all")
        bounded = self.khot, self.accumulator, self.accumulator_bound
        return WeightSpec(self.weights, groups, learn, *bounded, self.points, self.trits, self.scale)
