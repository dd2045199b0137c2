"""Names from a file stay names through every door, and an export that fails leaves nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import edgemat
from edgemat.lower import read
from edgemat.lower.reader import read_bytes
from edgemat.lower.writer import finish, write
from tests.core.graphs import Sketch, residual, weights
from tests.core.tampering import DATA

HOSTILE_NAMES = [
    'a"; system("rm -rf /"); "',
    "../../../etc/passwd",
    "two\nlines",
    "*/ int main(void) { return 1; } /*",
    "while",
    "é\u202e\u0000x",
    "%s%n{{ 7 * 7 }}",
    "[red]x[/]",
    "x" * 5000,
]


def hostile(name: str) -> Sketch:
    """A correct file whose every name is `name` with a number."""
    made = Sketch(name)
    x = made.input(f"{name} 0", (2, 4, 4))
    y = made.conv(x, weights((3, 2, 3, 3)), f"{name} 1")
    z = made.requantize(y, "ufixed<6,4,RND,SAT>", f"{name} 2")
    flat = made.add("Reshape", [z], f"{name} 3", shape=(48,))
    made.output(made.linear(flat, weights((2, 48)), f"{name} 4"), f"{name} 5")
    return made


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=range(len(HOSTILE_NAMES)))
@pytest.mark.parametrize("target", ["mcu", "hls"])
def test_hostile_names_stay_inside_the_output_folder(name: str, target: str, tmp_path: Path) -> None:
    model = hostile(name).finished()
    path = tmp_path / "in" / "net.onnx"
    write(model, path)
    graph = read(path)
    assert graph.name == name
    before = sorted(p for p in tmp_path.rglob("*"))
    output = tmp_path / "out"
    edgemat.export(path, target=target, output=output)
    outside = [p for p in sorted(tmp_path.rglob("*")) if output not in (p, *p.parents) and p not in before]
    assert outside == []
    for file in output.rglob("*"):
        assert re.fullmatch(r"[\w.\-]{1,120}", file.name), file.name
        if file.is_file() and file.suffix != ".bin":
            text = file.read_bytes().decode("ascii")
            for harm in ("system(", "../../..", "return 1; } /*", "two\nlines 1", "49", "\u202e"):
                assert harm == "49" or harm not in text, (file, harm)
    x = np.random.default_rng(0).normal(0, 2, (3, 2, 4, 4)).astype(np.float32)
    assert edgemat.Simulator(path)(x).shape == (3, 2)


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while files are written: no folder under the final name, no temporary one beside it."""
    path = residual().write(tmp_path / "in" / "net.onnx")
    whole = Path.write_text

    def interrupt(self: Path, *args: object, **kwargs: object) -> int:
        if "model" in self.name or "top" in self.name or "parameters" in self.name:
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)  # type: ignore[arg-type]

    def interrupt_bytes(self: Path, *args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupt)
    monkeypatch.setattr(Path, "write_bytes", interrupt_bytes)
    for target in ("mcu", "hls"):
        with pytest.raises(KeyboardInterrupt):
            edgemat.export(path, target=target, output=tmp_path / target / "out")
        assert list((tmp_path / target).iterdir()) == []


@pytest.mark.parametrize("target", ["mcu", "hls"])
def test_an_export_to_a_full_disk_leaves_nothing(target: str, tmp_path: Path) -> None:
    """The kernel refuses files of more than 1,000 bytes, in a process of its own."""
    path = residual().write(tmp_path / "in" / "net.onnx")
    program = (
        "import resource, signal, sys\n"
        "import edgemat\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    edgemat.export(sys.argv[1], target=sys.argv[2], output=sys.argv[3])\n"
        "except edgemat.EdgematError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", program, str(path), target, str(tmp_path / "out" / "project")]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "cannot be written" in done.stdout and len(done.stdout.splitlines()) == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_a_second_reading_of_what_was_read_is_the_same() -> None:
    """Writing what the reader gave back gives the same bytes."""
    graph = read_bytes(DATA)
    again = ir.from_proto(ir.to_proto(graph.model))
    finish(again)
    assert ir.to_proto(again).SerializeToString(deterministic=True) == DATA
