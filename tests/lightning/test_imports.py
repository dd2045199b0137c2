"""edgemat without Lightning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

WITHOUT = """
import sys

import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "lightning" else found(name, *rest)
import edgemat
try:
    from edgemat.lightning import QATCallback
except ImportError as error:
    assert isinstance(error, edgemat.EdgematError)
    print(error)
assert "torch" not in sys.modules
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_missing_lightning_is_one_sentence() -> None:
    assert run(WITHOUT) == (
        "edgemat.lightning needs the package lightning, which is not installed; run pip install 'edgemat[lightning]'"
    )


def test_edgemat_itself_does_not_import_it() -> None:
    assert run("import edgemat, edgemat.nn, sys; print('lightning' in sys.modules)") == "False"
