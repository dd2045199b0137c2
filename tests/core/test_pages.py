"""The tables of docs/operators.md and docs/lowered-format.md follow the code.

``python -m tests.core.test_pages`` writes them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from edgemat import report
from edgemat.body import IR_VERSION, OPSET
from edgemat.lower.writer import FORMAT_VERSION, VERSION_KEY
from edgemat.op import Attr, Op
from edgemat.ops import OPS

DOCS = Path(__file__).resolve().parents[2] / "docs"
KINDS = {int: "int", str: "text", tuple: "ints"}


def described(key: str, attr: Attr) -> str:
    """A required attribute, an optional one in brackets, a default behind its equals sign."""
    text = f"`{key}` {KINDS[attr.kind]}"
    if attr.optional:
        return f"[{text}]"
    return text if attr.default is None else f"{text} = {attr.default}"


def row(op: Op) -> str:
    low, high = op.arity
    attrs = [described(key, attr) for key, attr in op.attributes.items()]
    attrs += ["[`requantize` text]"] if op.has_epilogue else []
    return f"| {op.name} | {low if low == high else f'{low} to {high}'} | {', '.join(attrs)} |\n"


def attribute_table() -> str:
    return "| operator | inputs | attributes |\n|---|---|---|\n" + "".join(map(row, OPS))


PAGES = {"operators.md": report.ops_table().markdown, "lowered-format.md": attribute_table}


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_up_to_date(name: str) -> None:
    assert PAGES[name]() in (DOCS / name).read_text("utf-8"), "run: python -m tests.core.test_pages"


def test_the_page_names_the_versions() -> None:
    page = (DOCS / "lowered-format.md").read_text("utf-8")
    assert f"`{VERSION_KEY}` = `{FORMAT_VERSION}`" in page
    assert f"IR version {IR_VERSION}" in page and f"opset {OPSET}" in page


def rewrite() -> None:
    """Puts the present tables in the place of the pages' first ones."""
    for name, table in PAGES.items():
        lines = (DOCS / name).read_text("utf-8").splitlines(keepends=True)
        first = next(i for i, line in enumerate(lines) if line.startswith("| operator"))
        last = next((i for i in range(first, len(lines)) if not lines[i].startswith("|")), len(lines))
        (DOCS / name).write_text("".join(lines[:first]) + table() + "".join(lines[last:]), "utf-8")


if __name__ == "__main__":
    rewrite()
