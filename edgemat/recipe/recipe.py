"""`Recipe`: the formats of a network, from Python or TOML."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.recipe.layer import LayerRecipe
from edgemat.recipe.settings import (
    MAPPINGS,
    POSITIONS,
    RULE_KEYS,
    TOKEN_SCALES,
    check_keys,
    checked_format,
    checked_rule,
    checked_rules,
    checked_settings,
    is_a,
    matches,
    nearest,
)
from edgemat.recipe.toml import toml_text

Format = str | Fixed


@dataclass(frozen=True)
class Recipe:
    """Formats of a network.

    Formats are texts such as ``"fixed<8,1>"`` or :class:`edgemat.Fixed`. Without ``int_bits`` (``"fixed<6>"``) the
    binary point is learned; modes left out mean RND, SAT.

    Attributes:
        input: Format of the inputs; a mapping gives one per input name.
        weights: Format of the weights; ``"ternary"`` for -1, 0, +1 and ``"binary"`` for -1, +1, each with a scale.
        bias: Width of the biases, at most 32 bits, signed, RND, SAT; the binary point is always the accumulator's.
        activations: Format of the layer outputs. Outputs proven non-negative become unsigned of that width.
        outputs: Format of the network's outputs; None keeps the last layer's exact accumulator.
        per_channel_weights: Whether learned binary points of weights differ by output channel.
        batch_norm: ``"fold"`` folds batch norm into the layer before it; ``"affine"`` keeps it as a fixed-point
            affine ``Requantize(a * x + b)``.
        every_layer: Whether every layer's output is quantised, even where an activation function follows directly.
        rules: Settings for single layers: a name pattern (``"stage1.*"``, as in :mod:`fnmatch`) or a module type,
            mapped to settings of the names above, ``input`` to ``points``. Later rules win. Activations stated by a
            rule are taken as written: ``fixed`` is signed, ``ufixed`` unsigned.
        types: Rules by class name (``{"Conv2d": {...}}``; a base class's name matches as well), for recipes that
            come from a file. `rules` win over them.
        first: Settings for the layers with weights that come first behind an input. They win over all rules but one
            that spells the layer's whole name.
        last: The same for those that come last before an output.
        learn_widths: What learns its width besides its binary point: ``"none"``, ``"weights"``, ``"activations"`` or
            ``"all"``. The stated width is the start and the largest.
        weight_groups: What weights share a learned binary point and width: ``"tensor"``, ``"channel"``, ``"weight"`` or
            a number of inputs; None follows `per_channel_weights`.
        activation_groups: The same of activations: ``"tensor"`` or ``"channel"`` (axis 1).
        khot: 1, 2 or 3: weights, scales and slopes are sums of at most so many signed powers of two: no multiplier.
        accumulator: Bits no accumulator may ever need: weights are trained to keep the promise (A2Q).
        accumulator_bound: Which bound the weights' norm keeps: ``"a2q"``, ``"a2q+"``, or ``"auto"``: the former for
            layers with signed inputs, the latter for unsigned ones.
        points: Binary points of weights: ``"learned"`` by gradient or ``"statistics"`` (StatsQ).
        ternary: How trits are made where `weights` is ``"ternary"`` (``"absmean"``, ``"learned"`` or ``"b1.58"``) or
            ``"binary"`` (``"binary"`` or ``"onebit"``); those two words set the first of their kinds.
        scale: How the scale of such weights is deployed: ``"power_of_two"``, a multiplier such as ``"fixed<8>"``, or
            ``"free"`` for training alone.
        tokens: Format of a token's codes, such as ``"fixed<8>"``, where each row that reaches a Linear without bias is
            quantised with a power of two of its own; for rules. None quantises no row.
        token_scale: That scale: ``"power_of_two"``, or ``"absmax"`` (float division, as published) for training alone.

    Raises:
        FormatError: if a key or a format is wrong; the message names it and the nearest right spelling.
    """

    input: Format | Mapping[str, Format] = "fixed<8>"
    weights: Format = "fixed<8>"
    bias: Format = "fixed<32>"
    activations: Format = "fixed<8>"
    outputs: Format | None = None
    per_channel_weights: bool = True
    batch_norm: str = "fold"
    every_layer: bool = False
    rules: Mapping[str | type, Mapping[str, Any]] = field(default_factory=dict)
    types: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    first: Mapping[str, Any] = field(default_factory=dict)
    last: Mapping[str, Any] = field(default_factory=dict)
    learn_widths: str = "none"
    weight_groups: str | int | None = None
    activation_groups: str = "tensor"
    khot: int | None = None
    accumulator: int | None = None
    accumulator_bound: str = "auto"
    points: str = "learned"
    ternary: str | None = None
    scale: str = "power_of_two"
    tokens: Format | None = None
    token_scale: str = "power_of_two"

    def __init__(self, **fields: Any) -> None:
        known = tuple(self.__dataclass_fields__)
        check_keys(fields, known, "Recipe")
        for key, declared in self.__dataclass_fields__.items():
            value = {} if key in MAPPINGS else declared.default
            object.__setattr__(self, key, fields.get(key, value))
        self._validate()

    def _validate(self) -> None:
        if isinstance(self.input, Mapping):
            if not self.input:
                raise FormatError("Recipe: input is an empty mapping, expected a format per input name")
            checked = {str(k): checked_format(v, f"input[{k!r}]") for k, v in self.input.items()}
            object.__setattr__(self, "input", checked)
        else:
            object.__setattr__(self, "input", checked_format(self.input, "input"))
        settings = {key: getattr(self, key) for key in RULE_KEYS if key != "input"}
        for key, value in checked_settings(settings, "Recipe", optional=("outputs",)).items():
            object.__setattr__(self, key, value)
        if self.activations_format.signed is False:
            raise FormatError(
                f"Recipe: activations is {self.activations}, expected a signed format such as "
                f"'fixed<{self.activations_format.width}>'; outputs proven non-negative become unsigned by "
                "themselves, and a rule can state 'ufixed' for one layer"
            )
        object.__setattr__(self, "rules", checked_rules(self.rules, "rules", (str, type)))
        object.__setattr__(self, "types", checked_rules(self.types, "types", (str,)))
        for position in POSITIONS:
            object.__setattr__(self, position, checked_rule(getattr(self, position), f"Recipe {position}"))
        self._check_token_scale()

    def _check_token_scale(self) -> None:
        """Refuses a scale of tokens where no layer has any."""
        stated = [{"tokens": self.tokens, "token_scale": self.token_scale}, *self.rules.values(), *self.types.values()]
        stated += [getattr(self, position) for position in POSITIONS]
        scales = [rule["token_scale"] for rule in stated if rule.get("token_scale", TOKEN_SCALES[0]) != TOKEN_SCALES[0]]
        if scales and not any(rule.get("tokens") for rule in stated):
            raise FormatError(
                f"Recipe: token_scale is {scales[0]!r} and no layer has tokens that it could scale, expected "
                "tokens='fixed<8>' with it; leave it out otherwise"
            )

    @classmethod
    def from_toml(cls, source: str | os.PathLike[str]) -> Recipe:
        """Reads a recipe from a TOML file, or from TOML text (anything with a line break or an ``=``).

        The keys are the recipe's own; rules are tables: ``[rules."stage1.*"]``, ``[types.Conv2d]``, ``[first]``. Text
        ``"none"`` stands for None: ``khot = "none"`` in a rule takes the recipe's `khot` back.

        Raises:
            FormatError: if the file cannot be read, is no TOML, or a key or value is wrong; names it and the nearest
                right spelling.
        """
        if not isinstance(source, str | os.PathLike):
            raise FormatError(f"Recipe: the source is {source!r}, expected TOML text or the path of a TOML file")
        text, label = str(source), "the TOML text"
        if isinstance(source, os.PathLike) or not ("\n" in text or "=" in text):
            label = repr(text)
            try:
                text = Path(source).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise FormatError(f"Recipe: {label} cannot be read ({error}); give the path of a TOML file") from None
        try:
            data = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise FormatError(f"Recipe: {label} is no TOML: {error}") from None
        return cls(**data)

    def to_toml(self) -> str:
        """The recipe as TOML, settings that differ from the defaults only; `from_toml` reads it back."""
        fields = {key: getattr(self, key) for key in self.__dataclass_fields__}
        standard = Recipe()
        return toml_text({key: value for key, value in fields.items() if value != getattr(standard, key)})

    @property
    def activations_format(self) -> Fixed:
        """The recipe's activation format."""
        assert isinstance(self.activations, Fixed)
        return self.activations

    def input_format(self, name: str) -> Fixed:
        """Format of the network input `name`.

        Raises:
            FormatError: if the recipe names formats per input and lacks this one.
        """
        if isinstance(self.input, Mapping):
            if name not in self.input:
                raise FormatError(
                    f"Recipe: input has no format for the network input {name!r}"
                    f"{nearest(name, self.input)}; it has {', '.join(self.input)}"
                )
            return self.input[name]  # type: ignore[return-value]
        return self.input  # type: ignore[return-value]

    def layer(self, named: Iterable[tuple[str, type | None]], positions: Iterable[str] = ()) -> LayerRecipe:
        """What holds for a layer (or a chain of layers that share one output).

        Args:
            named: Names and types of the chain's operations.
            positions: ``"first"`` and ``"last"`` where they apply to a layer of the chain.
        """
        chain = list(named)
        names = [name for name, _ in chain]
        chosen = [rule for where, rule in self.types.items() if any(is_a(kind, where) for _, kind in chain)]
        chosen += [rule for where, rule in self.rules.items() if any(matches(where, *layer) for layer in chain)]
        chosen += [getattr(self, position) for position in POSITIONS if position in positions]
        chosen += [rule for where, rule in self.rules.items() if where in names]
        merged: dict[str, Any] = {key: getattr(self, key) for key in RULE_KEYS if key != "input"}
        for rule in chosen:
            merged.update(rule)
        return LayerRecipe(stated=any("activations" in rule for rule in chosen), **merged)

    def unmatched(self, named: Iterable[tuple[str, type | None]]) -> list[str]:
        """One sentence for each rule that matches no layer of the network."""
        layers = list(named)
        names = [name for name, _ in layers]
        sentences = []
        for where in self.rules:
            if not any(matches(where, name, kind) for name, kind in layers):
                label = repr(where) if isinstance(where, str) else where.__name__
                hint = nearest(where, names) if isinstance(where, str) else ""
                sentences.append(f"Recipe: the rule {label} matches no layer of the network{hint}")
        kinds = sorted({kind.__name__ for _, kind in layers if kind is not None})
        for where in self.types:
            if not any(is_a(kind, where) for _, kind in layers):
                sentences.append(f"Recipe: the type {where!r} matches no layer of the network{nearest(where, kinds)}")
        return sentences
