"""The example scripts run from start to end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(ROOT.joinpath("examples").glob("*.py"))


def run(script, *arguments, **variables):
    """Runs a script against this checkout; a variable that is None is removed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    environment = {key: value for key, value in environment.items() if value is not None}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def test_examples_are_found():
    assert {path.stem for path in EXAMPLES} >= {"mnist_lenet", "keyword_dscnn", "tabular_mlp_hls"}


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(script, tmp_path):
    if not os.environ.get("EDGEMAT_DATA"):
        pytest.skip("EDGEMAT_DATA is unset: the examples train on real data")
    done = run(script, "--quick", "--output", str(tmp_path / "out"))
    if "cannot run" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "written:" in done.stdout
    assert " 0 mismatches" in done.stdout
    assert list((tmp_path / "out").glob("*.onnx"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_names_the_missing_variable(script):
    done = run(script, "--quick", EDGEMAT_DATA=None)
    assert done.returncode == 2
    assert "EDGEMAT_DATA" in done.stderr
