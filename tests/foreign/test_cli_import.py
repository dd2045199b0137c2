"""Foreign files on the command line: import, every command that imports on the way, and verify --against."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgemat
from edgemat import cli
from edgemat.errors import EdgematError
from edgemat.foreign.execution import Execution
from edgemat.foreign.opening import is_foreign, open_model
from edgemat.foreign.source import load
from edgemat.lower.graph import Graph

QONNX = "qonnx.custom_op.general"


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as leaving:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(leaving.value.code or 0, captured.out, captured.err)

    return run


def saved(path: Path, nodes: list[onnx.NodeProto], size: int, **constants: object) -> Path:
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", size])]
    last = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid(QONNX, 1)]
    graph = helper.make_graph(nodes, "g", ends, last, stored)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def quant(source: str, made: str, scale: str, **attributes: object) -> onnx.NodeProto:
    full = {"signed": 1, "narrow": 0, "rounding_mode": "ROUND", **attributes}
    return helper.make_node("Quant", [source, scale, "zero", "bits"], [made], f"quant_{made}", domain=QONNX, **full)


@pytest.fixture
def qonnx_file(tmp_path: Path) -> Path:
    """Powers of two: a dense layer between quantisers, and a closing softmax."""
    w = np.random.default_rng(0).integers(-8, 8, (6, 4)).astype(np.float32) / 8
    nodes = [
        quant("x", "a", "fine"),
        helper.make_node("MatMul", ["a", "w"], ["sums"], "fc"),
        helper.make_node("Relu", ["sums"], ["r"], "relu"),
        quant("r", "b", "coarse"),
        helper.make_node("Softmax", ["b"], ["y"], "softmax"),
    ]
    scalars = {"fine": 1 / 16, "coarse": 1 / 4, "zero": 0, "bits": 8}
    return saved(tmp_path / "dense.onnx", nodes, 6, w=w, **{k: np.float32(v) for k, v in scalars.items()})


@pytest.fixture
def unstated(tmp_path: Path) -> Path:
    """A float input that is multiplied before any quantiser, and a node nobody knows: two refusals without a format."""
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["v"], "scaling"),
        quant("v", "y", "fine"),
    ]
    constants = {"two": 2, "fine": 1 / 16, "zero": 0, "bits": 8}
    return saved(tmp_path / "unstated.onnx", nodes, 3, **{k: np.float32(v) for k, v in constants.items()})


@pytest.fixture
def hopeless(tmp_path: Path) -> Path:
    """Two nodes that cannot be taken, side by side, and one behind them."""
    nodes = [
        quant("x", "a", "fine"),
        helper.make_node("Mystery", ["a"], ["b"], "first", domain="a.b"),
        helper.make_node("Einsum", ["a"], ["c"], "second", equation="ij->ji"),
        helper.make_node("Add", ["b", "c"], ["y"], "behind"),
    ]
    return saved(tmp_path / "no.onnx", nodes, 3, fine=np.float32(0.5), zero=np.float32(0), bits=np.float32(8))


def test_import_says_what_it_did(invoke: Any, qonnx_file: Path, tmp_path: Path) -> None:
    outcome = invoke("import", qonnx_file, "-o", tmp_path / "net.onnx")
    assert outcome.code == 0, outcome.err
    assert "dense.onnx: 5 nodes, 3 taken, 2 folded, all exact\n" in outcome.out
    assert "what 'softmax' (Softmax) takes" in outcome.out
    assert outcome.out.endswith(f"{tmp_path / 'net.onnx'}\n")
    outcome = invoke("import", qonnx_file, "-o", tmp_path / "net.onnx", "--report")
    assert "quant_a" in outcome.out
    assert "folded" in outcome.out
    outcome = invoke("import", qonnx_file, "-o", tmp_path / "net.onnx", "--json")
    assert [row["node"] for row in json.loads(outcome.out)["rows"]][:2] == ["quant_a", "fc"]


def test_every_refusal_at_once(invoke: Any, hopeless: Path, tmp_path: Path) -> None:
    outcome = invoke("import", hopeless, "-o", tmp_path / "net.onnx")
    assert (outcome.code, outcome.out) == (1, "")
    assert "'first'" in outcome.err
    assert "'second'" in outcome.err
    assert not (tmp_path / "net.onnx").exists()
    outcome = invoke("import", hopeless, "-o", tmp_path / "net.onnx", "--json")
    assert outcome.code == 1
    fates = {row["node"]: row["fate"] for row in json.loads(outcome.out)["rows"]}
    assert fates["first"] == fates["second"] == "refused"
    assert fates["behind"] == "not reached"
    outcome = invoke("import", hopeless, "-o", tmp_path / "net.onnx", "--report")
    assert (outcome.code, "not reached" in outcome.out) == (1, True)
    with pytest.raises(edgemat.ImportRefused) as caught:
        edgemat.import_onnx(hopeless, tmp_path / "net.onnx")
    assert [row.node for row in caught.value.report.refused] == ["first", "second"]


def test_names_are_shown_as_they_are(invoke: Any, tmp_path: Path) -> None:
    """Brackets in names are no markup of the terminal's."""
    nodes = [quant("x", "a", "fine"), helper.make_node("Mystery", ["a"], ["y"], "[/bold]", domain="[red]")]
    path = saved(tmp_path / "[b].onnx", nodes, 3, fine=np.float32(0.5), zero=np.float32(0), bits=np.float32(8))
    outcome = invoke("import", path, "-o", tmp_path / "net.onnx", "--report")
    assert outcome.code == 1
    assert "[/bold]" in outcome.out
    assert "[red]::Mystery" in outcome.out


def test_formats_of_inputs(invoke: Any, unstated: Path, tmp_path: Path) -> None:
    outcome = invoke("import", unstated, "-o", tmp_path / "net.onnx")
    assert outcome.code == 1
    assert "--input x=ufixed<8,0>" in outcome.err
    assert invoke("import", unstated, "-o", tmp_path / "net.onnx", "--input", "x=fixed<8,4>").code == 0
    assert invoke("inspect", unstated, "--input", "x=fixed<8,4>", "--json").code == 0
    for wrong in ("x", "=fixed<8,4>", "x="):
        assert invoke("import", unstated, "-o", tmp_path / "net.onnx", "--input", wrong).code == 2
    for wrong in ("x=fixed<8>", "z=fixed<8,4>"):
        assert invoke("import", unstated, "-o", tmp_path / "net.onnx", "--input", wrong).code == 1
    assert invoke("inspect", tmp_path / "net.onnx", "--input", "x=fixed<8,4>").code == 1  # lowered already
    assert invoke("inspect", tmp_path / "net.onnx", "--strict").code == 1


def test_the_source_is_never_replaced(invoke: Any, qonnx_file: Path) -> None:
    before = qonnx_file.read_bytes()
    for command in (["import"], ["report"], ["simulate", "--inputs", qonnx_file.with_suffix(".npy")]):
        np.save(qonnx_file.with_suffix(".npy"), np.zeros((1, 6), np.float32))
        assert invoke(*command[:1], qonnx_file, "-o", qonnx_file, *command[1:]).code == 1
    assert qonnx_file.read_bytes() == before


def test_every_command_takes_a_foreign_file(invoke: Any, qonnx_file: Path, tmp_path: Path) -> None:
    """And gives what it gives for the imported one; what the import did is said on stderr."""
    lowered = tmp_path / "lowered" / "dense.onnx"
    edgemat.import_onnx(qonnx_file, lowered)
    np.save(tmp_path / "x.npy", np.random.default_rng(1).normal(0, 2, (5, 6)).astype(np.float32))
    for model, place in ((qonnx_file, tmp_path / "a"), (lowered, tmp_path / "b")):
        place.mkdir()
        outcome = invoke("simulate", model, "--inputs", tmp_path / "x.npy", "-o", place / "y.npy")
        assert outcome.code == 0
        assert ("5 nodes, 3 taken" in outcome.err) == (model == qonnx_file)
        assert invoke("export", model, "--target", "mcu", "-o", place / "c").code == 0
        assert invoke("report", model, "-o", place / "page.html").code == 0
        assert invoke("inspect", model, "--json").code == 0
        assert invoke("verify", model, "--backends", "reference,onnx", "--samples", 3).code == 0
    made = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(made) > 4
    for name in (name for name in made if name.suffix != ".html"):  # the page names the file it is about
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_lowered_foreign_and_other_files_are_told_apart(qonnx_file: Path, tmp_path: Path) -> None:
    edgemat.import_onnx(qonnx_file, tmp_path / "net.onnx")
    assert is_foreign(qonnx_file)
    assert not is_foreign(tmp_path / "net.onnx")
    assert open_model(tmp_path / "net.onnx").model == tmp_path / "net.onnx"
    assert isinstance(open_model(qonnx_file).model, Graph)
    data = qonnx_file.read_bytes()
    for name, text in {"empty": b"", "text": b"hello", "cut": data[:-3], "zip": b"PK\3\4" + b"\0" * 40}.items():
        (tmp_path / name).write_bytes(text)
        assert not is_foreign(tmp_path / name)
    assert not is_foreign(tmp_path / "nowhere")
    assert not is_foreign(tmp_path)


# -- fidelity -----------------------------------------------------------------------------------------------------
def test_against_the_original(invoke: Any, qonnx_file: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(1).normal(0, 2, (40, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    edgemat.import_onnx(qonnx_file, tmp_path / "net.onnx")
    for model in (tmp_path / "net.onnx", qonnx_file):
        out = invoke("verify", model, "--against", qonnx_file, "--inputs", tmp_path / "x.npy", "--json")
        assert out.code == 0, out.err
        found = json.loads(out.out)
        assert found["outputs"][0]["compared"] == "what enters Softmax"
        assert found["outputs"][0]["equal_numbers"] == found["outputs"][0]["numbers"] == 160
        assert [node["node"] for node in found["nodes"]] == ["quant_a", "quant_b"]
        assert found["first"] is None
    out = invoke("verify", tmp_path / "net.onnx", "--against", qonnx_file, "--inputs", tmp_path / "x.npy")
    assert "No node differs: 2 tensors have the same codes." in out.out
    assert invoke("verify", tmp_path / "net.onnx", "--against", qonnx_file).code == 2
    samples = ("--inputs", tmp_path / "x.npy", "--codes")
    assert invoke("verify", tmp_path / "net.onnx", "--against", qonnx_file, *samples).code == 2


def test_a_file_that_is_not_the_original_exits_3(invoke: Any, qonnx_file: Path, tmp_path: Path) -> None:
    """The control: one weight by one step."""
    np.save(tmp_path / "x.npy", np.random.default_rng(1).normal(0, 2, (40, 6)).astype(np.float32))
    changed = onnx.load(qonnx_file)
    for tensor in changed.graph.initializer:
        if tensor.name == "w":
            w = numpy_helper.to_array(tensor).copy()
            w[0, 0] += 1
            tensor.CopyFrom(numpy_helper.from_array(w, "w"))
    onnx.save(changed, tmp_path / "other.onnx")
    edgemat.import_onnx(tmp_path / "other.onnx", tmp_path / "net.onnx")
    out = invoke("verify", tmp_path / "net.onnx", "--against", qonnx_file, "--inputs", tmp_path / "x.npy")
    assert out.code == 3
    assert "The first node that differs: 'quant_b'" in out.out
    assert "Called exact, and different from codes that are equal: quant_b." in out.out


def test_formats_are_those_of_the_lowered_file(unstated: Path, tmp_path: Path) -> None:
    edgemat.import_onnx(unstated, tmp_path / "net.onnx", inputs={"x": "fixed<8,4>"})
    report = edgemat.compare(tmp_path / "net.onnx", unstated, np.arange(-24, 24, dtype=np.float32).reshape(16, 3) / 4)
    assert report.unpaired == ""
    assert report.ok
    assert report.outputs[0].equal_numbers == 48


def test_both_executors_of_qonnx_agree(tmp_path: Path) -> None:
    """edgemat's own operators beside those of the qonnx package, on every rounding mode, ties among the numbers."""
    pytest.importorskip("qonnx")
    x = np.arange(-40, 41, dtype=np.float32).reshape(-1, 1) / 8
    scalars: dict[str, np.ndarray] = {"fine": np.float32(0.25), "zero": np.float32(0), "bits": np.float32(4)}
    scalars |= {"in_bits": np.float32(4), "out_bits": np.float32(2), "t": np.array([[-1, 0, 0.5]], np.float32)}
    trunc = ["a", "fine", "zero", "in_bits", "out_bits"]
    for mode in ("ROUND", "CEIL", "FLOOR", "UP", "DOWN", "HALF_UP", "HALF_DOWN"):
        nodes = [
            quant("x", "a", "fine", rounding_mode=mode, narrow=1),
            quant("x", "b", "fine", rounding_mode=mode, signed=0),
            helper.make_node("BipolarQuant", ["x", "fine"], ["c"], "c", domain=QONNX),
            helper.make_node("Trunc", trunc, ["d"], "d", domain=QONNX, rounding_mode="FLOOR"),
            helper.make_node("MultiThreshold", ["x", "t"], ["e"], "e", domain=QONNX, out_scale=2.0, out_bias=-1.0),
            helper.make_node("Sum", ["a", "b", "c", "d", "e"], ["y"], "sum"),
        ]
        source = load(saved(tmp_path / "each.onnx", nodes, 1, **scalars))
        found = [Execution(source, list("abcde"), who)({"x": x}) for who in ("qonnx", "edgemat")]
        for name in "abcdey":
            assert np.array_equal(found[0][name], found[1][name]), (mode, name)
    with pytest.raises(EdgematError, match="expected 'qonnx' or 'edgemat'"):
        Execution(source, [], "brevitas")


def test_importing_never_imports_torch(qonnx_file: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from edgemat import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", program, "import", str(qonnx_file), "-o", str(tmp_path / "net.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
