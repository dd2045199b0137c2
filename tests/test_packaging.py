"""What travels in the wheel: every native file, every template, under the names the code looks for."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

DATA = (".c", ".h", ".hpp", ".cpp", ".j2", ".tcl", ".ld", ".S", ".cfg", ".txt", ".py", ".typed", ".cmake")


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    pytest.importorskip("setuptools", minversion="77", reason="pip install 'setuptools>=77'")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "edgemat", "hls_templates"):
        (source / name).symlink_to(repository / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True, capture_output=True, timeout=300)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def shipped(folder: Path) -> set[str]:
    """Files of a folder that are part of the source, by their path below it."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in DATA and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_every_file(repository: Path, wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    expected = {f"edgemat/{name}" for name in shipped(repository / "edgemat")}
    expected |= {f"edgemat/_hls_templates/{name}" for name in shipped(repository / "hls_templates")}
    assert expected - names == set()
    assert not any(name.startswith(("tests/", "docs/", "examples/")) for name in names)


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    text = wheel.read(name).decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: <3.14,>=3.11" in text
    assert "hls4ml" not in text
    entry = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "edgemat = edgemat.cli:main" in wheel.read(entry).decode()
