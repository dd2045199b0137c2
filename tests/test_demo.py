"""The demonstration runs from start to end, with the compilers of this machine and with zig alone."""

import os
import subprocess
import sys

import numpy as np
import pytest

from edgemat import demo
from edgemat.errors import ToolchainError

pytest.importorskip("sklearn", reason="the demonstration's digits come with scikit-learn: pip install 'edgemat[demo]'")


def test_digits_are_exact_in_the_input_format():
    split = demo.load_digits()
    assert split.x_train.shape == (1_300, 1, 8, 8)
    assert split.x_test.shape == (497, 1, 8, 8)
    assert np.array_equal(split.x_test * 16, np.round(split.x_test * 16))
    assert set(split.y_train) == set(split.y_test) == set(range(10))


def test_demo_agrees_everywhere_and_says_so(tmp_path, capsys):
    result = demo.run(tmp_path / "demo", quick=True)
    shown, progress = capsys.readouterr()
    assert result.ok
    assert all(path.exists() for path in result.files.values())
    for backend in demo.BACKENDS:
        row = next(line for line in shown.splitlines() if f" {backend} " in line)
        assert " exact " in row or " unavailable" in row
    for backend in ("torch", "reference", "onnx"):
        assert " exact " in next(line for line in shown.splitlines() if f" {backend} " in line)
    assert "proved" in shown
    assert "Training" not in shown
    assert "Training in float32" in progress


@pytest.mark.slow
def test_demo_learns(tmp_path):
    result = demo.run(tmp_path / "demo")
    assert result.ok
    assert result.float_accuracy >= 0.98
    assert result.quantised_accuracy >= result.float_accuracy - 0.01


def test_demo_needs_no_compiler(tmp_path):
    pytest.importorskip("ziglang", reason="the compiler from pip: pip install ziglang")
    empty = tmp_path / "bin"
    empty.mkdir()
    environment = {**os.environ, "PATH": str(empty)}
    for name in ("CC", "CXX"):
        environment.pop(name, None)
    # Zig takes a minute for the parallel C++; tests/test_cli_files.py has it compile a smaller one.
    backends = [name for name in demo.BACKENDS if name != "hls:parallel"]
    script = (
        f"from edgemat import demo; demo.BACKENDS = {backends}; "
        f"raise SystemExit(not demo.run({str(tmp_path / 'demo')!r}, quick=True).ok)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " exact " in next(line for line in done.stdout.splitlines() if " mcu " in line)


def test_a_missing_toolchain_becomes_a_row(tmp_path, monkeypatch):
    import edgemat

    def verify(*args, **options):
        raise ToolchainError("backend 'mcu' cannot run: no compiler")

    monkeypatch.setattr(edgemat, "verify", verify)
    row = demo.compare("mcu", tmp_path / "net.onnx", np.zeros((1, 1, 8, 8), np.float32), None)
    assert (row.status, row.compared) == ("unavailable", 0)
    assert "no compiler" in row.reason


def test_a_mismatch_makes_the_demo_fail(tmp_path, monkeypatch):
    """The control: a backend that differs must not pass."""
    compare = demo.compare

    def differing(backend, onnx_file, samples, quantised):
        if backend == "torch":
            for parameter in quantised.parameters():
                parameter.data.neg_()
        return compare(backend, onnx_file, samples, quantised)

    monkeypatch.setattr(demo, "BACKENDS", ("torch",))
    monkeypatch.setattr(demo, "compare", differing)
    assert not demo.run(tmp_path / "demo", quick=True).ok
