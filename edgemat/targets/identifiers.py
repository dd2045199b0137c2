"""The one way from a name in a model file to an identifier in C, C++, Tcl, a Makefile or a path.

A lowered file may come from a stranger: its names hold anything. What leaves this module matches
``[a-z][a-z0-9_]*``, is at most 48 characters long, is no keyword, and is unique in its table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_LONGEST = 48
_KEYWORDS = """alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl concept const
    consteval constexpr constinit continue decltype default delete do double else enum explicit export extern false
    float for friend goto if inline int long main mutable namespace new noexcept not not_eq nullptr operator or or_eq
    private protected public register reinterpret_cast requires restrict return short signed sizeof static
    static_assert struct switch template this thread_local throw true try typedef typeid typename union unsigned using
    virtual void volatile wchar_t while xor xor_eq"""
_RESERVED = frozenset(_KEYWORDS.split())


def identifier(name: str, fallback: str = "x") -> str:
    """One name as an identifier; different names may give the same one (see `Identifiers`)."""
    text = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:_LONGEST].strip("_")
    if not text:
        text = fallback
    if not text[0].isalpha():
        text = f"{fallback}_{text}"
    return f"{text}_" if text in _RESERVED else text


class Identifiers:
    """A table in which every name gets an identifier of its own, the same one each time it is asked for.

    Args:
        taken: identifiers that must not be given out.
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)
        self._given: dict[str, str] = {}

    def __getitem__(self, name: str) -> str:
        if name not in self._given:
            base = identifier(name)
            text, count = base, 1
            while text in self._taken:
                count += 1
                text = f"{base}_{count}"
            self._taken.add(text)
            self._given[name] = text
        return self._given[name]
