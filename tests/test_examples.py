"""The example scripts run from start to end."""

import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

import edgemat

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(ROOT.joinpath("examples").glob("*.py"))
LANGUAGE_MODELS = ("ternary", "float", "transformer")
PRINTED = {
    "keyword_ternary": [
        r"^test accuracy: float \d+\.\d\d%, ternary \d+\.\d\d%$",
        *(rf"^{backend}: [1-9]\d* integers compared, 0 mismatches$" for backend in ("torch", "onnx", "mcu", "hls")),
    ],
    "shakespeare_lm": [
        *(rf"^  {name} +\[#{{24}}\] 3/3, loss \d\.\d+, 0 s left$" for name in LANGUAGE_MODELS),
        r"^ +parameters +validation loss, nats per character +ternary / it$",
        r"^12 characters, drawn under onnxruntime one by one: those of torch\n-{60}\n(?s:.{12})\n-{60}$",
        r"^the text, 13 steps, and \d+ corner sequences of 13 steps:$",
        *(
            rf"^{backend}: [1-9]\d* integers compared, 0 mismatches$"
            for backend in ("torch", "onnx", "hls", "mcu:cortex-m4")
        ),
        *(rf"^{backend}: 12 of 12 equal$" for backend in ("torch", "onnx", "hls", "mcu:cortex-m4")),
        r"^the texts of torch, onnx, hls, mcu:cortex-m4 are equal$",
    ],
}


def run(script, *arguments, **variables):
    """Runs a script against this checkout; a variable that is None is removed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    environment = {key: value for key, value in environment.items() if value is not None}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def needs_data():
    if not os.environ.get("EDGEMAT_DATA"):
        pytest.skip("EDGEMAT_DATA is unset: the examples train on real data")


def test_examples_are_found():
    assert {path.stem for path in EXAMPLES} >= {"mnist_lenet", "keyword_dscnn", "tabular_mlp_hls"}


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(script, tmp_path):
    needs_data()
    done = run(script, "--quick", "--output", str(tmp_path / "out"))
    if "cannot run" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "written:" in done.stdout
    assert " 0 mismatches" in done.stdout
    assert list((tmp_path / "out").glob("*.onnx"))
    for line in PRINTED.get(script.stem, ()):
        assert re.search(line, done.stdout, re.MULTILINE), (line, done.stdout)
    if script.stem == "shakespeare_lm":
        rows = dict(re.findall(r"^  (\w+) +[\d,]+ +(\d\.\d{4}.*)$", done.stdout, re.MULTILINE))
        assert tuple(rows) == LANGUAGE_MODELS
        for name in LANGUAGE_MODELS[1:]:
            loss, ratio = map(float, rows[name].split())
            assert abs(ratio - float(rows["ternary"]) / loss) < 1e-3


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_names_the_missing_variable(script):
    done = run(script, "--quick", EDGEMAT_DATA=None)
    assert done.returncode == 2
    assert "EDGEMAT_DATA" in done.stderr


def main_of(name, monkeypatch, *arguments):
    """Runs an example in this process; the exit status of `main`."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    return example.main()


def one_trit_less(file, weight):
    """Makes the first trit of a weight that is not 0 one."""
    model = ir.load(file)
    tensor = model.graph.initializers[weight]
    codes = tensor.const_value.numpy().copy()
    assert set(np.unique(codes)) <= {-1, 0, 1}
    codes.flat[np.flatnonzero(codes)[0]] = 0
    tensor.const_value = ir.tensor(codes, name=weight)
    ir.save(model, file)


@pytest.mark.parametrize(
    ("name", "weight"), [("shakespeare_lm", "head.weight_codes"), ("keyword_ternary", "3.weight_codes")]
)
def test_an_example_finds_a_trit_that_differs(name, weight, tmp_path, monkeypatch, capsys):
    needs_data()
    export, verify = edgemat.to_onnx, edgemat.verify

    def flipped(model, example, file):
        export(model, example, file)
        one_trit_less(file, weight)

    monkeypatch.setattr(edgemat, "to_onnx", flipped)
    monkeypatch.setattr(edgemat, "verify", lambda file, backends, **given: verify(file, backends=("onnx",), **given))
    monkeypatch.setattr(edgemat, "export", lambda *_, **__: None)
    try:
        assert main_of(name, monkeypatch, "--quick", "--output", tmp_path) == 3
        assert re.search(r"^torch: \d+ integers compared, [1-9]\d* mismatches$", capsys.readouterr().out, re.MULTILINE)
    except AssertionError as error:
        if str(error) != "onnxruntime differs":  # what the language model says of a text that differs
            raise


def test_the_language_model_writes_from_the_codes_a_backend_returned(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("shakespeare_lm")
    codes = np.random.default_rng(3).integers(-40, 40, (21, 1, 7))
    draws = np.random.default_rng(4).random(18)
    rows = iter(codes[:, 0] / 8)
    tokens = example.write(lambda _: next(rows), [2, 5, 1], draws, 0.7)
    fmt = edgemat.Fixed.parse("fixed<8,5>")
    assert example.written(codes, fmt, [2, 5, 1], draws, 0.7) == tokens
    assert example.equal_tokens(tokens, tokens) == 21
    codes[10] += np.eye(7, dtype=np.int64)[(tokens[11] + 1) % 7] * 90  # control: another character after step 10
    changed = example.written(codes, fmt, [2, 5, 1], draws, 0.7)
    assert example.equal_tokens(tokens, changed) == 11 and changed[12:] == tokens[12:]


def test_the_language_model_stops_and_goes_on_as_if_it_had_not(tmp_path, monkeypatch, capsys):
    needs_data()
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("shakespeare_lm")
    plain = example.progress
    arguments = ("--quick", "--models", "float", "--output")

    def pressed(name, step, *rest):
        plain(name, step, *rest)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(example, "progress", pressed)
    with pytest.raises(SystemExit, match="130"):
        main_of("shakespeare_lm", monkeypatch, *arguments, tmp_path / "stopped")
    assert "float: stopped at step 2, kept in" in capsys.readouterr().out
    monkeypatch.setattr(example, "progress", plain)
    assert main_of("shakespeare_lm", monkeypatch, *arguments, tmp_path / "stopped") == 0
    assert "float: resumed at step 2" in capsys.readouterr().out
    assert main_of("shakespeare_lm", monkeypatch, *arguments, tmp_path / "whole") == 0
    kept = [torch.load(tmp_path / run / "float.pt", weights_only=True)["model"] for run in ("stopped", "whole")]
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])
