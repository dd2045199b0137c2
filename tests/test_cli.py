"""The command line: what it passes to the library, what it prints, and how it leaves."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgemat
from edgemat import cli
from edgemat.errors import LoweringError, ParityError

COMMANDS = ("demo", "export", "headers", "import", "inspect", "ops", "report", "simulate", "verify")


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@dataclass
class Library:
    """Stands for the library: records every call and answers what it is told to."""

    calls: list[tuple[str, tuple, dict]] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)

    def function(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append((name, arguments, options))
            answer = self.answers.get(name)
            if isinstance(answer, BaseException):
                raise answer
            return answer

        return call


class Report:
    """What verify and inspect return, as far as the command line looks at it."""

    def __init__(self, ok: bool = True) -> None:
        self.ok = ok

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok}

    def render(self) -> str:
        return f"every backend agrees: {self.ok}"


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    for name in ("export", "verify"):
        monkeypatch.setitem(vars(edgemat), name, library.function(name))

    class Simulator:
        def __init__(self, path: Path) -> None:
            self.path = path

        def __call__(self, x: Any, codes: bool) -> Any:
            return library.function("simulate")(self.path, x, codes=codes)

    monkeypatch.setitem(vars(edgemat), "Simulator", Simulator)
    return library


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"never read here")
    return path


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as leaving:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(leaving.value.code or 0, captured.out, captured.err)

    return run


def test_help_names_every_command(invoke: Any) -> None:
    outcome = invoke("--help")
    assert outcome.code == 0
    assert sorted(cli.cli.commands) == sorted(COMMANDS)
    for name in COMMANDS:
        assert f"\n  {name} " in outcome.out
        described = invoke(name, "--help")
        assert described.code == 0
        assert f"Usage: edgemat {name}" in described.out
    assert "..." not in outcome.out.split("Commands:")[1]


def test_version(invoke: Any) -> None:
    assert invoke("--version").out == f"edgemat {edgemat.__version__}\n"


def test_export_passes_what_was_given_and_nothing_else(invoke: Any, library: Library, model: Path) -> None:
    outcome = invoke("export", model, "--target", "hls", "-o", "build", "--io", "stream", "--reuse", 4)
    assert (outcome.code, outcome.out) == (0, "build\n")
    outcome = invoke("export", model, "--target", "hls", "-o", "b", "--clock-ns", "3.3", "--part", "xcu250")
    assert outcome.code == 0
    assert invoke("export", model, "--target", "mcu", "-o", "build").code == 0
    assert library.calls == [
        ("export", (model,), {"target": "hls", "output": Path("build"), "io": "stream", "reuse": 4}),
        ("export", (model,), {"target": "hls", "output": Path("b"), "clock_ns": 3.3, "part": "xcu250"}),
        ("export", (model,), {"target": "mcu", "output": Path("build")}),
    ]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["export", "{model}", "-o", "b"], "Missing option '--target'"),
        (["export", "{model}", "--target", "gpu", "-o", "b"], "'gpu' is not one of 'hls', 'mcu'"),
        (["export", "nowhere.onnx", "--target", "hls", "-o", "b"], "'nowhere.onnx' does not exist"),
        (["export", "{model}", "--target", "hls", "-o", "b", "--reuse", "0"], "0 is not in the range x>=1"),
        (
            ["export", "{model}", "--target", "hls", "-o", "b", "--clock-ns", "0"],
            "0.0 is not in the range x>0",
        ),
        (
            ["export", "{model}", "--target", "mcu", "-o", "b", "--io", "stream"],
            "--io belongs to --target hls",
        ),
        (
            ["export", "{model}", "--target", "mcu", "-o", "b", "--clock-ns", "5"],
            "--clock-ns belongs to --target hls",
        ),
        (
            ["export", "{model}", "--target", "hls", "-o", "b", "--reuse", "2", "--plan", "{model}"],
            "--reuse and --plan exclude each other",
        ),
        (
            ["verify", "{model}", "--backends", "reference,fpga"],
            "'fpga' is no backend; choose from reference",
        ),
        (["verify", "{model}", "--backends", ","], "the list is empty"),
        (["verify", "{model}", "--codes"], "give --inputs"),
        (["verify", "{model}", "--samples", "0"], "0 is not in the range x>=1"),
        (["simulate", "{model}", "--inputs", "{model}", "-o", "y.npy"], "is not a .npy or .npz file"),
        (["simulate", "{model}", "--inputs", "x.npy", "-o", "y.npy"], "x.npy: No such file or directory"),
        (["simulate", "{model}", "-o", "y.npy"], "Missing option '--inputs'"),
        (["bake"], "No such command 'bake'"),
    ],
)
def test_wrong_usage_exits_2(invoke: Any, library: Library, model: Path, arguments: list[str], complaint: str) -> None:
    outcome = invoke(*(argument.format(model=model) for argument in arguments))
    assert outcome.code == 2
    assert complaint in outcome.err
    assert outcome.out == ""
    assert library.calls == []


def test_inputs_that_hold_pickles_are_refused(invoke: Any, library: Library, model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    outcome = invoke("simulate", model, "--inputs", tmp_path / "x.npy", "-o", tmp_path / "y.npy")
    assert outcome.code == 2
    assert "of plain arrays" in outcome.err


def test_simulate_one_array(invoke: Any, library: Library, model: Path, tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.int8).reshape(2, 3)
    np.save(tmp_path / "x.npy", x)
    library.answers["simulate"] = np.array([[1.5], [2.5]], dtype=np.float32)
    outcome = invoke("simulate", model, "--inputs", tmp_path / "x.npy", "-o", tmp_path / "y.npy", "--codes")
    assert outcome.code == 0
    (_, (path, given), options) = library.calls[0]
    assert path == model
    assert options == {"codes": True}
    assert given.dtype == np.int8
    assert np.array_equal(given, x)
    y = np.load(tmp_path / "y.npy")
    assert y.dtype == np.float32
    assert y.tolist() == [[1.5], [2.5]]
    assert (tmp_path / "y.npy").stat().st_mode & 0o400


def test_simulate_several_arrays(invoke: Any, library: Library, model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones(2), b=np.zeros(3))
    library.answers["simulate"] = {"p": np.ones(1), "q": np.zeros(1)}
    outcome = invoke("simulate", model, "--inputs", tmp_path / "x.npz", "-o", tmp_path / "y.npz")
    assert outcome.code == 0
    given = library.calls[0][1][1]
    assert sorted(given) == ["a", "b"]
    assert sorted(np.load(tmp_path / "y.npz")) == ["p", "q"]
    outcome = invoke("simulate", model, "--inputs", tmp_path / "x.npz", "-o", tmp_path / "y.npy")
    assert outcome.code == 2
    assert "2 outputs (p, q)" in outcome.err
    assert not (tmp_path / "y.npy").exists()


def test_verify(invoke: Any, library: Library, model: Path, tmp_path: Path) -> None:
    library.answers["verify"] = Report()
    outcome = invoke("verify", model, "--samples", 50, "--backends", "reference, mcu:cortex-m4", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out) == {"ok": True}
    unset = {"inputs": None, "steps": None, "corner_steps": None, "codes": False}
    options = {**unset, "samples": 50, "backends": ("reference", "mcu:cortex-m4")}
    assert library.calls == [("verify", (model,), options)]
    outcome = invoke("verify", model)
    assert library.calls[1][2] == {**unset, "samples": None, "backends": None}
    assert "every backend agrees: True" in outcome.out


def test_the_command_line_knows_every_backend_of_the_library() -> None:
    from edgemat.verification import backends

    assert {*cli.BACKENDS, "torch"} == set(backends.NAMES)


def test_a_mismatch_exits_3_and_still_prints_the_report(invoke: Any, library: Library, model: Path) -> None:
    library.answers["verify"] = Report(ok=False)
    outcome = invoke("verify", model, "--json")
    assert outcome.code == 3
    assert json.loads(outcome.out) == {"ok": False}
    library.answers["verify"] = ParityError("node 'fc' differs.")
    outcome = invoke("verify", model)
    assert (outcome.code, outcome.out, outcome.err) == (3, "", "edgemat: node 'fc' differs.\n")


@pytest.mark.parametrize(
    ("raised", "code", "sentence"),
    [
        (LoweringError("node 'fc': no."), 1, "edgemat: node 'fc': no.\n"),
        (KeyboardInterrupt(), 130, "edgemat: interrupted.\n"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "build/top.cpp"),
            1,
            "the disk is full while writing build/top",
        ),
        (
            PermissionError(errno.EACCES, os.strerror(errno.EACCES), "build"),
            1,
            "edgemat: build: Permission denied; check",
        ),
        (MemoryError(), 1, "edgemat: memory ran out"),
    ],
)
def test_errors_are_one_sentence(
    invoke: Any, library: Library, model: Path, raised: BaseException, code: int, sentence: str
) -> None:
    library.answers["export"] = raised
    outcome = invoke("export", model, "--target", "mcu", "-o", "build")
    assert outcome.code == code
    assert outcome.out == ""
    assert sentence in outcome.err
    assert outcome.err.strip().count("\n") == 0


def test_a_full_disk_leaves_no_half_written_output(
    invoke: Any, library: Library, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "x.npy", np.zeros(3))
    (tmp_path / "y.npy").write_bytes(b"the old result")
    library.answers["simulate"] = np.zeros(1000)

    def save(file: Any, array: np.ndarray, **options: Any) -> None:
        file.write(b"the first block")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "save", save)
    outcome = invoke("simulate", model, "--inputs", tmp_path / "x.npy", "-o", tmp_path / "y.npy")
    assert outcome.code == 1
    assert "the disk is full" in outcome.err
    assert (tmp_path / "y.npy").read_bytes() == b"the old result"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx", "x.npy", "y.npy"]


def test_headers_prints_the_folder(invoke: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ap_int.h", "ap_fixed.h"):
        (tmp_path / name).write_text("")
    monkeypatch.setenv("EDGEMAT_AP_INCLUDE", str(tmp_path))
    assert invoke("headers").out == f"{tmp_path.resolve()}\n"


@pytest.mark.smoke
def test_help_answers_within_half_a_second(edgemat_command: list[str]) -> None:
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        done = subprocess.run([*edgemat_command, "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - started)
    assert "Usage: edgemat" in done.stdout
    assert min(seconds) < 0.5


def test_a_reader_that_leaves_causes_no_traceback(edgemat_command: list[str]) -> None:
    process = subprocess.Popen([*edgemat_command, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait(timeout=30)


def test_ctrl_c_in_a_running_command(tmp_path: Path, model: Path) -> None:
    """A real signal to a real process in the middle of a library call."""
    program = (
        "import signal, sys, time, edgemat\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # CI may start us with it ignored
        "def export(*arguments, **options):\n"
        "    print('started', flush=True)\n"
        "    time.sleep(60)\n"
        "edgemat.export = export\n"
        "from edgemat import cli\n"
        "cli.main(sys.argv[1:])\n"
    )
    arguments = [
        sys.executable,
        "-c",
        program,
        "export",
        str(model),
        "--target",
        "mcu",
        "-o",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == "edgemat: interrupted."
