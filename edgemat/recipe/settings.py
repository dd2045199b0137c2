"""The keys of a recipe and its rules, and the checks of their values."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.recipe.toml import NONE

BATCH_NORMS = ("fold", "affine")
LEARN_WIDTHS = ("none", "weights", "activations", "all")
WEIGHT_GROUPS = ("tensor", "channel", "weight")
ACTIVATION_GROUPS = ("tensor", "channel")
ACCUMULATOR_BOUNDS = ("auto", "a2q", "a2q+")
POINTS = ("learned", "statistics")
KHOT_LIMIT = 3
_FORMAT_KEYS = ("input", "weights", "bias", "activations", "outputs")
_CHOICES: dict[str, tuple[str, ...]] = {
    "batch_norm": BATCH_NORMS,
    "learn_widths": LEARN_WIDTHS,
    "activation_groups": ACTIVATION_GROUPS,
    "accumulator_bound": ACCUMULATOR_BOUNDS,
    "points": POINTS,
}
POSITIONS = ("first", "last")
_NUMBERS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "khot": (1, KHOT_LIMIT, ()),
    "accumulator": (2, 64, ()),
    "weight_groups": (1, 1 << 31, WEIGHT_GROUPS),
}
MAPPINGS = ("rules", "types", "first", "last")
RULE_KEYS = (
    *_FORMAT_KEYS,
    "per_channel_weights",
    "batch_norm",
    "every_layer",
    "learn_widths",
    "weight_groups",
    "activation_groups",
    "khot",
    "accumulator",
    "accumulator_bound",
    "points",
)


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known spelling, or an empty text."""
    close = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def matches(where: str | type, name: str, kind: type | None) -> bool:
    """Whether a rule's name pattern or type means a layer."""
    if isinstance(where, str):
        return fnmatchcase(name, where)
    return kind is not None and issubclass(kind, where)


def is_a(kind: type | None, name: str) -> bool:
    """Whether a type or a base of it has this name, bare or with its module."""
    return kind is not None and any(
        name in (base.__name__, f"{base.__module__}.{base.__name__}") for base in kind.__mro__
    )


def checked_rules(given: Any, label: str, kinds: tuple[type, ...]) -> dict[Any, dict[str, Any]]:
    """Checks a mapping of rules, keyed by texts or, where `kinds` says so, by types."""
    expected = "name pattern or module type" if type in kinds else "class name"
    if not isinstance(given, Mapping):
        raise FormatError(f"Recipe: {label} is {type(given).__name__}, expected a mapping of {expected}")
    checked = {}
    for where, rule in given.items():
        if not isinstance(where, kinds):
            raise FormatError(f"Recipe: the rule key {where!r} of {label} is no {expected}")
        name = where.__name__ if isinstance(where, type) else repr(where)
        checked[where] = checked_rule(rule, f"Recipe rule {name}")
    return checked


def checked_rule(given: Any, label: str) -> dict[str, Any]:
    """Checks the settings of one rule."""
    if not isinstance(given, Mapping):
        raise FormatError(f"{label} is {given!r}, expected a mapping such as {{'weights': 'fixed<4>'}}")
    check_keys(given, RULE_KEYS, label)
    return checked_settings(given, label, optional=("outputs",))


def check_keys(given: Iterable[Any], known: tuple[str, ...], label: str) -> None:
    for key in given:
        if key not in known:
            raise FormatError(
                f"{label} has the unknown key {key!r}{nearest(str(key), known)}; the keys are {', '.join(known)}"
            )


def checked_format(value: Any, label: str) -> Fixed:
    if isinstance(value, Fixed):
        return value
    if not isinstance(value, str):
        raise FormatError(f"{label} is {value!r}, expected a format such as 'fixed<8,1>' or 'fixed<6>'")
    try:
        return Fixed.parse(value)
    except FormatError as error:
        raise FormatError(f"{label}: {error}") from None


def checked_settings(given: Mapping[str, Any], label: str, optional: tuple[str, ...]) -> dict[str, Any]:
    """Checks the values of the keys both the recipe and its rules have."""
    checked: dict[str, Any] = {}
    for key, value in given.items():
        if value == NONE and (key in optional or key in _NUMBERS):  # as a file says it
            value = None
        if key in _FORMAT_KEYS:
            checked[key] = None if value is None and key in optional else checked_format(value, f"{label}: {key}")
            if key == "bias":
                _check_bias(checked[key], label)
            elif checked[key] is not None and key != "weights" and checked[key].per_channel:
                raise FormatError(f"{label}: {key} is {value}, expected one binary point for the whole tensor")
        elif key in _CHOICES:
            if value not in _CHOICES[key]:
                names = " or ".join(map(repr, _CHOICES[key]))
                raise FormatError(f"{label}: {key} is {value!r}, expected {names}{nearest(str(value), _CHOICES[key])}")
            checked[key] = value
        elif key in _NUMBERS:
            low, high, words = _NUMBERS[key]
            whole = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
            if value is not None and not whole and value not in words:
                names = "".join(f", {word!r}" for word in words)
                raise FormatError(
                    f"{label}: {key} is {value!r}, expected None{names} or a whole number from {low} to {high}"
                    f"{nearest(str(value), words)}"
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
