"""The documentation runs: every python and console block of README and docs/, in order, a folder per page.

A ``console`` block holds ``$ command`` lines, each followed by what it prints; a line ``...`` stands for any
lines, a block without output lines only has to succeed. A block after ``<!-- not run: why -->`` is skipped
and has to say why; ``<!-- needs: data -->`` and ``<!-- needs: headers -->`` skip where those are missing.
"""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgemat import cli
from edgemat.targets.apheaders import find_ap_headers

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(?:<!-- (?P<note>[^>]*) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)")
LANGUAGES = {"python", "console", "text", "toml", "cpp", "c", "sh", "tcl", "make", "json"}


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    note: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(match["language"], match["text"], match["note"] or "", text[: match.start()].count("\n") + 1)
        for match in FENCE.finditer(text)
    ]


def runnable(page: Path) -> list[Block]:
    """The blocks to run here; a page whose needs are missing has none of the blocks that have them."""
    found = []
    for block in blocks(page):
        if block.language not in ("python", "console") or block.note.startswith("not run: "):
            continue
        if block.note == "needs: data" and not os.environ.get("EDGEMAT_DATA"):
            continue
        if block.note == "needs: headers" and find_ap_headers() is None:
            continue
        found.append(block)
    return found


def commands(block: Block) -> list[tuple[str, list[str]]]:
    """Each command of a console block with the lines it should print."""
    found: list[tuple[str, list[str]]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif line.strip():
            found[-1][1].append(line.rstrip())
    return found


def matches(printed: str, expected: list[str]) -> bool:
    """Whether the printed lines are the expected ones; ``...`` stands for any lines or text."""
    lines = [line.rstrip() for line in printed.splitlines() if line.strip()]
    pattern = "\n".join("*" if line.strip() == "..." else _literal(line) for line in expected)
    return fnmatch.fnmatchcase("\n".join(lines), pattern)


def _literal(line: str) -> str:
    return "*".join(re.sub(r"([*?[])", r"[\1]", part) for part in line.split("..."))


def run_console(block: Block, folder: Path, page: Path) -> None:
    for command, expected in commands(block):
        words = command.split()
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        environment |= {"PYTHONPATH": str(ROOT), "COLUMNS": "160", "NO_COLOR": "1"}
        if words[0] == "edgemat":  # also where the package was not installed
            words = [sys.executable, "-m", *words]
        elif words[0] == "python":
            words[0] = sys.executable
        done = subprocess.run(
            words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        place = f"{page.relative_to(ROOT)}:{block.line}: {command}"
        assert done.returncode == 0, f"{place}\n{done.stdout}\n{done.stderr}"
        assert not expected or matches(done.stdout, expected), f"{place} printed\n{done.stdout}"


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.stem)
def test_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in runnable(page):
        if block.language == "python":
            source = "\n" * block.line + block.text  # so that a traceback names the page's own line
            exec(compile(source, str(page), "exec"), names)
        else:
            run_console(block, tmp_path, page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_is_well_formed(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("\n```") % 2 == 0
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page.name}:{block.line}: {block.language}"
        if block.note.startswith("not run"):
            assert block.note.startswith("not run: "), f"{page.name}:{block.line} does not say why it is not run"
    missing = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    assert missing == []


def test_every_command_is_documented() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in cli.cli.commands if f"edgemat {name}" not in text] == []


def test_the_comparison_of_printed_lines() -> None:
    assert matches("one\n\ntwo [3]\nfour\n", ["one", "two [3]", "four"])
    assert matches("one\ntwo\nthree\n", ["one", "...", "three"])
    assert matches("took 3.5 s\n", ["took ... s"])
    assert not matches("one\ntwo\n", ["one"])
    assert not matches("two [4]\n", ["two [3]"])
    block = Block("console", "$ edgemat ops\na\n\n$ edgemat demo\n", "", 1)
    assert commands(block) == [("edgemat ops", ["a"]), ("edgemat demo", [])]
