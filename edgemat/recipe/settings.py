"""The keys of a recipe and its rules, and the checks of their values."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from edgemat.errors import FormatError
from edgemat.formats import BIPOLAR, Fixed
from edgemat.recipe.toml import NONE

BATCH_NORMS = ("fold", "affine")
LEARN_WIDTHS = ("none", "weights", "activations", "all")
WEIGHT_GROUPS = ("tensor", "channel", "weight")
ACTIVATION_GROUPS = ("tensor", "channel")
ACCUMULATOR_BOUNDS = ("auto", "a2q", "a2q+")
POINTS = ("learned", "statistics")
KHOT_LIMIT = 3
TERNARY = Fixed(2, None, True, "RND", "SAT_SYM")
"""The format of ternary weights, its binary point (a power-of-two scale) left open."""
TERNARY_KINDS = ("absmean", "learned", "b1.58", "binary", "onebit")
BINARY_KINDS = ("binary", "onebit")
SCALES = ("power_of_two", "free")
SCALE_BITS = 24
TOKEN_SCALES = ("power_of_two", "absmax")
_WORDS: dict[str, tuple[Fixed, str]] = {"ternary": (TERNARY, "absmean"), "binary": (BIPOLAR, "binary")}
_FORMAT_KEYS = ("input", "weights", "bias", "activations", "outputs")
_CHOICES: dict[str, tuple[str, ...]] = {
    "batch_norm": BATCH_NORMS,
    "learn_widths": LEARN_WIDTHS,
    "activation_groups": ACTIVATION_GROUPS,
    "accumulator_bound": ACCUMULATOR_BOUNDS,
    "points": POINTS,
    "token_scale": TOKEN_SCALES,
}
_OPTIONAL: dict[str, tuple[str, ...]] = {"ternary": TERNARY_KINDS}
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
    "ternary",
    "scale",
    "tokens",
    "token_scale",
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


def named_weights(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which the words ``"ternary"`` and ``"binary"`` for weights are spelled out as format and kind."""
    word = settings.get("weights")
    if not isinstance(word, str) or word not in _WORDS:
        return dict(settings)
    fmt, kind = _WORDS[word]
    stated = settings.get("ternary")
    if stated in TERNARY_KINDS and (stated in BINARY_KINDS) != (word == "binary"):
        raise FormatError(f"weights is {word!r} with ternary={stated!r}, expected a kind of {word} weights: {kind!r}")
    return {**settings, "weights": fmt, "ternary": kind if stated in (None, NONE) else stated}


def checked_ternary(value: Any) -> tuple[str, bool]:
    """A kind of ternary weights, and whether it has no 0.

    Raises:
        FormatError: for anything else.
    """
    if value not in TERNARY_KINDS:
        names = " or ".join(map(repr, TERNARY_KINDS))
        raise FormatError(f"ternary is {value!r}, expected {names}{nearest(str(value), TERNARY_KINDS)}")
    return value, value in BINARY_KINDS


def checked_scale(value: Any, label: str) -> str:
    """Checks how a ternary scale is deployed: ``"power_of_two"``, ``"free"``, or a format of at most 24 bits.

    Raises:
        FormatError: for anything else.
    """
    if value in SCALES:
        return str(value)
    try:
        fmt = Fixed.parse(value) if isinstance(value, str) else None
    except FormatError:
        fmt = None
    wrong = fmt is None or fmt.per_channel or fmt.bipolar or not 2 <= fmt.width <= SCALE_BITS
    if wrong or (fmt is not None and (fmt.rounding != "RND" or fmt.overflow not in ("SAT", "SAT_SYM"))):
        raise FormatError(
            f"{label} is {value!r}, expected 'power_of_two', 'free' or a multiplier such as 'fixed<8>' (2 to "
            f"{SCALE_BITS} bits, RND, SAT){nearest(str(value), SCALES)}"
        )
    return str(fmt)


def checked_tokens(value: Any, label: str) -> Fixed:
    """Checks the format of a token's codes, which have a power of two of each token's own: signed, 2 to 24 bits, SAT.

    Raises:
        FormatError: for anything else.
    """
    fmt = checked_format(value, label)
    plain = fmt.signed and fmt.int_bits is None and not fmt.per_channel and not fmt.bipolar and fmt.overflow == "SAT"
    if not plain or not 2 <= fmt.width <= SCALE_BITS:
        raise FormatError(
            f"{label} is {fmt}, expected 'fixed<W>' with 2 to {SCALE_BITS} bits; it is signed, SAT, and its binary "
            "point is the input's"
        )
    return fmt


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
    for key, value in named_weights(given).items():
        if value == NONE and (key in optional or key in _NUMBERS or key in _OPTIONAL):  # as a file says it
            value = None
        if key in _FORMAT_KEYS:
            checked[key] = None if value is None and key in optional else checked_format(value, f"{label}: {key}")
            if key == "bias":
                _check_bias(checked[key], label)
            elif checked[key] is not None and key != "weights" and checked[key].per_channel:
                raise FormatError(f"{label}: {key} is {value}, expected one binary point for the whole tensor")
        elif key == "scale":
            checked[key] = checked_scale(value, f"{label}: scale")
        elif key == "tokens":
            checked[key] = None if value in (None, NONE) else checked_tokens(value, f"{label}: tokens")
        elif key in _CHOICES or (key in _OPTIONAL and value is not None):
            choices = _CHOICES.get(key) or _OPTIONAL[key]
            if value not in choices:
                names = " or ".join(map(repr, choices))
                raise FormatError(f"{label}: {key} is {value!r}, expected {names}{nearest(str(value), choices)}")
            checked[key] = value
        elif key in _OPTIONAL:
            checked[key] = None
        elif key in _NUMBERS:
            low, high, words = _NUMBERS[key]
            whole = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
            if key == "accumulator" and "fixed<" in str(value):
                raise FormatError(
                    f"{label}: accumulator is {str(value)!r}, expected a width alone, such as 16: the binary point is "
                    "the sum's, and an accumulator that saturates or drops low bits is refused, because its result "
                    "would depend on the order of the sum"
                )
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
