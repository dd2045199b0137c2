"""The example scripts run from start to end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted(Path(__file__).parents[1].joinpath("examples").glob("*.py"))


def test_examples_are_found():
    assert {path.stem for path in EXAMPLES} >= {"mnist_lenet", "keyword_dscnn", "tabular_mlp_hls"}


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(script, tmp_path):
    if not os.environ.get("EDGEMAT_DATA"):
        pytest.skip("EDGEMAT_DATA is unset: the examples train on real data")
    command = [sys.executable, str(script), "--quick", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "written:" in done.stdout
    assert " 0 mismatches" in done.stdout
    assert list((tmp_path / "out").glob("*.onnx"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_names_the_missing_variable(script):
    environment = {key: value for key, value in os.environ.items() if key != "EDGEMAT_DATA"}
    command = [sys.executable, str(script), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2
    assert "EDGEMAT_DATA" in done.stderr
