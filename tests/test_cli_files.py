"""The command line on real files: every command once, what it prints, what it writes, and what it leaves behind."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgemat
from edgemat import cli
from edgemat.targets.toolchain import Compiler, compilers

JSON_KEYS = {"ok", "samples", "backends", "first_mismatch", "overflow"}
BACKEND_KEYS = {"status", "compared", "mismatches", "reason"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``one.onnx`` (6 inputs, 3 outputs) and ``two.onnx`` (inputs a and b, two outputs)."""
    torch = pytest.importorskip("torch")

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = torch.nn.Linear(4, 5)
            self.right = torch.nn.Linear(3, 5)
            self.head = torch.nn.Linear(5, 2)

        def forward(self, a: Any, b: Any) -> Any:
            hidden = torch.relu(self.left(a) + self.right(b))
            return self.head(hidden), hidden

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    recipe = edgemat.Recipe(input="fixed<6,1>", weights="fixed<4>", activations="fixed<5>")
    one = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    for name, model, example in (
        ("one", one, (torch.rand(16, 6),)),
        ("two", Two(), (torch.rand(16, 4), torch.rand(16, 3))),
    ):
        quantised = edgemat.quantize(model, recipe)
        edgemat.calibrate(quantised, [example if len(example) > 1 else example[0]])
        quantised.eval()
        edgemat.to_onnx(quantised, example if len(example) > 1 else example[0], folder / f"{name}.onnx")
    return folder


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object, code: int = 0) -> str:
        with pytest.raises(SystemExit) as leaving:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert (leaving.value.code or 0) == code, captured.err
        if code:
            assert captured.err.startswith("edgemat: ")
            assert captured.err.strip().count("\n") == 0
            return captured.err
        return captured.out

    return run


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.smoke
def test_simulate_writes_what_the_simulator_computes(models: Path, invoke: Any, tmp_path: Path) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (7, 6))
    np.save(tmp_path / "x.npy", x)
    invoke("simulate", models / "one.onnx", "--inputs", tmp_path / "x.npy", "-o", tmp_path / "y.npy")
    y = np.load(tmp_path / "y.npy")
    assert y.shape == (7, 3)
    assert np.array_equal(y, edgemat.Simulator(models / "one.onnx")(x))
    own = tmp_path / "own.onnx"
    own.write_bytes((models / "one.onnx").read_bytes())
    invoke("simulate", own, "--inputs", tmp_path / "x.npy", "-o", own, code=1)
    assert own.read_bytes() == (models / "one.onnx").read_bytes()


def test_integer_files_are_codes_only_where_it_is_said(models: Path, invoke: Any, tmp_path: Path) -> None:
    """Code 1 of fixed<6,1> is the value 1/32; the value 1 saturates at code 31. Codes in give codes out."""
    simulator = edgemat.Simulator(models / "one.onnx")
    np.save(tmp_path / "x.npy", np.ones((1, 6), dtype=np.int8))
    command = ("simulate", models / "one.onnx", "--inputs", tmp_path / "x.npy", "-o", tmp_path / "y.npy")
    invoke(*command)
    values = np.load(tmp_path / "y.npy")
    assert values.dtype == np.float32
    assert np.array_equal(values, simulator(np.full((1, 6), 31 / 32)))
    invoke(*command, "--codes")
    codes = np.load(tmp_path / "y.npy")
    assert codes.dtype == np.int64
    assert np.array_equal(codes, simulator.codes(np.full((1, 6), 1 / 32)))
    assert not np.array_equal(codes, simulator.codes(np.ones((1, 6))))


def test_several_inputs_and_outputs(models: Path, invoke: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    simulator = edgemat.Simulator(models / "two.onnx")
    names = ["a", "b"]
    inputs = {name: rng.uniform(-1, 1, (5, n)).astype(np.float32) for name, n in zip(names, (4, 3))}
    np.savez(tmp_path / "x.npz", **inputs)
    invoke("simulate", models / "two.onnx", "--inputs", tmp_path / "x.npz", "-o", tmp_path / "y.npz")
    expected = simulator(inputs)
    with np.load(tmp_path / "y.npz") as found:
        assert sorted(found) == sorted(expected)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_verify_prints_the_agreed_json(models: Path, invoke: Any) -> None:
    found = json.loads(invoke("verify", models / "one.onnx", "--samples", 20, "--backends", "reference,onnx", "--json"))
    assert set(found) >= JSON_KEYS
    assert found["ok"] is True
    assert found["overflow"] == {"proved": True}
    assert found["first_mismatch"] is None
    assert found["samples"] >= 20
    assert set(found["backends"]) == {"reference", "onnx"}
    for row in found["backends"].values():
        assert set(row) == BACKEND_KEYS
        assert (row["status"], row["mismatches"]) == ("exact", 0)
        assert row["compared"] > 0
    assert "exact" in invoke("verify", models / "two.onnx", "--backends", "onnx")


@pytest.mark.parametrize("pair", list(zip(compilers("c"), compilers("c++"))), ids=lambda pair: pair[1].name)
def test_every_compiler_gives_the_same_integers(
    models: Path, invoke: Any, ap_headers: Path, monkeypatch: pytest.MonkeyPatch, pair: tuple[Compiler, Compiler]
) -> None:
    """The hidden tensor of this network is an output and has a reader: copies of it are made, too."""
    for variable, compiler in zip(("EDGEMAT_CC", "EDGEMAT_CXX"), pair):
        monkeypatch.setenv(variable, shlex.join(compiler.command))
    names = ("hls:parallel", "hls:stream", "mcu")
    found = json.loads(invoke("verify", models / "two.onnx", "--samples", 10, "--backends", ",".join(names), "--json"))
    assert {name: row["status"] for name, row in found["backends"].items()} == dict.fromkeys(names, "exact")


def test_inspect_and_ops(models: Path, invoke: Any) -> None:
    table = invoke("inspect", models / "one.onnx")
    assert "fixed<6,1" in table
    assert isinstance(json.loads(invoke("inspect", models / "one.onnx", "--json")), dict)
    for target in ("hls", "mcu"):
        assert isinstance(json.loads(invoke("inspect", models / "one.onnx", "--target", target, "--json")), dict)
    assert "model" in invoke("inspect", models / "one.onnx", "--target", "hls").lower()
    table = invoke("ops")
    for word in ("Linear", "Conv", "hls", "mcu"):
        assert word.lower() in table.lower()


@pytest.mark.parametrize("options", [("hls",), ("hls", "--io", "stream"), ("mcu",)], ids="-".join)
def test_export_is_the_same_every_time(models: Path, invoke: Any, tmp_path: Path, options: tuple[str, ...]) -> None:
    for name in ("first", "second"):
        invoke("export", models / "one.onnx", "--target", *options, "-o", tmp_path / name)
    first = tree(tmp_path / "first")
    assert len(first) > 3
    assert first == tree(tmp_path / "second")
    invoke("export", models / "one.onnx", "--target", *options, "-o", tmp_path / "first")
    assert first == tree(tmp_path / "first")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


@pytest.mark.parametrize("command", ["export", "simulate", "verify", "inspect"])
def test_a_corrupt_file_is_one_sentence(models: Path, invoke: Any, tmp_path: Path, command: str) -> None:
    whole = (models / "one.onnx").read_bytes()
    np.save(tmp_path / "x.npy", np.zeros((1, 6)))
    more = {
        "export": ("--target", "mcu", "-o", tmp_path / "out"),
        "simulate": ("--inputs", tmp_path / "x.npy", "-o", tmp_path / "y.npy"),
        "verify": ("--samples", 1, "--backends", "reference"),
        "inspect": (),
    }[command]
    for name, content in (("cut", whole[: len(whole) // 2]), ("text", b"no model"), ("empty", b"")):
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        assert name in invoke(command, path, *more, code=1)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "y.npy").exists()


def limited(statement: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own after a statement that spoils something."""
    program = f"import sys\n{statement}\nfrom edgemat import cli\ncli.main(sys.argv[1:])\n"
    command = [sys.executable, "-c", program, *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("target", ["hls", "mcu"])
def test_a_disk_that_fills_up_leaves_nothing(models: Path, tmp_path: Path, target: str) -> None:
    """No file may grow beyond 300 bytes: the first larger one fails in the middle, as on a full disk."""
    output = tmp_path / "out"
    limit = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "sys.dont_write_bytecode = True"
    )
    done = limited(limit, "export", models / "one.onnx", "--target", target, "-o", output)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("edgemat: ")
    assert done.stderr.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["hls", "mcu"])
def test_ctrl_c_half_way_leaves_nothing(models: Path, tmp_path: Path, target: str) -> None:
    """The interrupt arrives when the third file below the test's folder is opened for writing."""
    interrupt = (
        "opened = []\n"
        "def spoil(event, arguments):\n"
        "    if event != 'open' or not isinstance(arguments[0], str) or not arguments[2] & 1:\n"
        "        return\n"
        f"    opened.append(arguments[0].startswith({str(tmp_path)!r}))\n"
        "    if opened[-1] and sum(opened) == 3:\n"
        "        raise KeyboardInterrupt\n"
        "sys.addaudithook(spoil)\n"
    )
    done = limited(interrupt, "export", models / "one.onnx", "--target", target, "-o", tmp_path / "out")
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip() == "edgemat: interrupted."
    assert list(tmp_path.iterdir()) == []
