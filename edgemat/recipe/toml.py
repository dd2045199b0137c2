"""A recipe as TOML text (the standard library reads TOML and does not write it)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from edgemat.errors import FormatError

NONE = "none"
"""What stands for None in a file, where a rule takes a setting back."""

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def toml_text(fields: Mapping[str, Any]) -> str:
    """TOML of nested mappings of texts, formats, numbers and truth values; None is written as ``"none"``.

    Raises:
        FormatError: if a rule is keyed by a type or by a text that is no Unicode, which no file can hold.
    """
    return "\n".join(_table(fields, ())).lstrip("\n") + "\n"


def _table(fields: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    plain = {k: v for k, v in fields.items() if not isinstance(v, Mapping)}
    tables = {k: v for k, v in fields.items() if isinstance(v, Mapping)}
    lines = []
    if path and (plain or not tables):
        lines = ["", f"[{'.'.join(path)}]"]
    lines += [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    for key, value in tables.items():
        lines += _table(value, (*path, _key(key)))
    return lines


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise FormatError(f"Recipe: a rule is keyed by the type {key.__name__}, which TOML cannot hold; use types=")
    return key if _BARE.fullmatch(key) else _text(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else _text(NONE if value is None else str(value))


def _text(text: str) -> str:
    """A basic string: JSON's, but for characters beyond 16 bits (TOML knows no surrogates) and DEL."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise FormatError(f"Recipe: {text!r} is no Unicode text, which TOML cannot hold; rename the rule")
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
