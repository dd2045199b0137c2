"""What to quantise, and how: the one argument of :func:`edgemat.quantize`.

A recipe states formats for whole classes of tensors and, by rules, for single layers. It needs no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from edgemat.errors import FormatError
from edgemat.formats import Fixed

Format = str | Fixed
BATCH_NORMS = ("fold", "affine")
RULE_KEYS = ("input", "weights", "bias", "activations", "outputs", "per_channel_weights", "batch_norm", "every_layer")
_FORMAT_KEYS = ("input", "weights", "bias", "activations", "outputs")


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

    def activation(self, non_negative: bool) -> Fixed:
        """Format of an output; unsigned of the same width where it is proven non-negative, unless a rule states it."""
        if self.stated or not non_negative:
            return self.activations
        return replace(self.activations, signed=False)


@dataclass(frozen=True)
class Recipe:
    """Formats of a network.

    Formats are texts such as ``"fixed<8,1>"`` or :class:`edgemat.Fixed`. Without ``int_bits`` (``"fixed<6>"``) the
    binary point is learned; modes left out mean RND, SAT.

    Attributes:
        input: Format of the inputs; a mapping gives one per input name.
        weights: Format of the weights.
        bias: Width of the biases, at most 32 bits, signed, RND, SAT; the binary point is always the accumulator's.
        activations: Format of the layer outputs. Outputs proven non-negative become unsigned of that width.
        outputs: Format of the network's outputs; None keeps the last layer's exact accumulator.
        per_channel_weights: Whether learned binary points of weights differ by output channel.
        batch_norm: ``"fold"`` folds batch norm into the layer before it; ``"affine"`` keeps it as a fixed-point
            affine ``Requantize(a * x + b)``.
        every_layer: Whether every layer's output is quantised, even where an activation function follows directly.
        rules: Settings for single layers: a name pattern (``"stage1.*"``, as in :mod:`fnmatch`) or a module type,
            mapped to any of ``input``, ``weights``, ``bias``, ``activations``, ``outputs``,
            ``per_channel_weights``, ``batch_norm`` and ``every_layer``. Later rules win. Activations stated by a
            rule are taken as written: ``fixed`` is signed, ``ufixed`` unsigned.

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

    def __init__(self, **fields: Any) -> None:
        known = tuple(self.__dataclass_fields__)
        _check_keys(fields, known, "Recipe")
        for key, declared in self.__dataclass_fields__.items():
            value = {} if key == "rules" else declared.default
            object.__setattr__(self, key, fields.get(key, value))
        self._validate()

    def _validate(self) -> None:
        if isinstance(self.input, Mapping):
            if not self.input:
                raise FormatError("Recipe: input is an empty mapping, expected a format per input name")
            checked = {str(k): _format(v, f"input[{k!r}]") for k, v in self.input.items()}
            object.__setattr__(self, "input", checked)
        else:
            object.__setattr__(self, "input", _format(self.input, "input"))
        settings = {key: getattr(self, key) for key in RULE_KEYS if key != "input"}
        for key, value in _settings(settings, "Recipe", optional=("outputs",)).items():
            object.__setattr__(self, key, value)
        if self.activations_format.signed is False:
            raise FormatError(
                f"Recipe: activations is {self.activations}, expected a signed format such as "
                f"'fixed<{self.activations_format.width}>'; outputs proven non-negative become unsigned by "
                "themselves, and a rule can state 'ufixed' for one layer"
            )
        if not isinstance(self.rules, Mapping):
            raise FormatError(
                f"Recipe: rules is {type(self.rules).__name__}, expected a mapping of name pattern or type"
            )
        rules: dict[str | type, dict[str, Any]] = {}
        for where, rule in self.rules.items():
            if not isinstance(where, str | type):
                raise FormatError(f"Recipe: the rule key {where!r} is neither a name pattern nor a module type")
            label = f"Recipe rule {where!r}" if isinstance(where, str) else f"Recipe rule {where.__name__}"
            if not isinstance(rule, Mapping):
                raise FormatError(f"{label} is {rule!r}, expected a mapping such as {{'weights': 'fixed<4>'}}")
            _check_keys(rule, RULE_KEYS, label)
            rules[where] = _settings(rule, label, optional=("outputs",))
        object.__setattr__(self, "rules", rules)

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

    def layer(self, named: Iterable[tuple[str, type | None]]) -> LayerRecipe:
        """What holds for a layer (or a chain of layers that share one output) given its names and types."""
        chain = list(named)
        merged: dict[str, Any] = {key: getattr(self, key) for key in RULE_KEYS if key != "input"}
        stated = False
        for where, rule in self.rules.items():
            if any(_matches(where, name, kind) for name, kind in chain):
                merged.update(rule)
                stated = stated or "activations" in rule
        return LayerRecipe(stated=stated, **merged)

    def unmatched(self, named: Iterable[tuple[str, type | None]]) -> list[str]:
        """One sentence for each rule that matches no layer of the network."""
        layers = list(named)
        names = [name for name, _ in layers]
        sentences = []
        for where in self.rules:
            if not any(_matches(where, name, kind) for name, kind in layers):
                label = repr(where) if isinstance(where, str) else where.__name__
                hint = nearest(where, names) if isinstance(where, str) else ""
                sentences.append(f"Recipe: the rule {label} matches no layer of the network{hint}")
        return sentences


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known spelling, or an empty text."""
    close = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _matches(where: str | type, name: str, kind: type | None) -> bool:
    if isinstance(where, str):
        return fnmatchcase(name, where)
    return kind is not None and issubclass(kind, where)


def _check_keys(given: Iterable[Any], known: tuple[str, ...], label: str) -> None:
    for key in given:
        if key not in known:
            raise FormatError(
                f"{label} has the unknown key {key!r}{nearest(str(key), known)}; the keys are {', '.join(known)}"
            )


def _format(value: Any, label: str) -> Fixed:
    if isinstance(value, Fixed):
        return value
    if not isinstance(value, str):
        raise FormatError(f"{label} is {value!r}, expected a format such as 'fixed<8,1>' or 'fixed<6>'")
    try:
        return Fixed.parse(value)
    except FormatError as error:
        raise FormatError(f"{label}: {error}") from None


def _settings(given: Mapping[str, Any], label: str, optional: tuple[str, ...]) -> dict[str, Any]:
    """Checks the values of the keys both the recipe and its rules have."""
    checked: dict[str, Any] = {}
    for key, value in given.items():
        if key in _FORMAT_KEYS:
            checked[key] = None if value is None and key in optional else _format(value, f"{label}: {key}")
            if key == "bias":
                _check_bias(checked[key], label)
            elif checked[key] is not None and key != "weights" and checked[key].per_channel:
                raise FormatError(f"{label}: {key} is {value}, expected one binary point for the whole tensor")
        elif key == "batch_norm":
            if value not in BATCH_NORMS:
                raise FormatError(
                    f"{label}: batch_norm is {value!r}, expected 'fold' or 'affine'{nearest(str(value), BATCH_NORMS)}"
                )
            checked[key] = value
        else:
            if not isinstance(value, bool):
                raise FormatError(f"{label}: {key} is {value!r}, expected True or False")
            checked[key] = value
    return checked


def _check_bias(bias: Fixed, label: str) -> None:
    if (
        bias.width > 32
        or not bias.signed
        or bias.int_bits is not None
        or (bias.rounding, bias.overflow) != ("RND", "SAT")
    ):
        raise FormatError(
            f"{label}: bias is {bias}, expected 'fixed<W>' with at most 32 bits; it is signed, RND, SAT, and its "
            "binary point is the accumulator's"
        )
