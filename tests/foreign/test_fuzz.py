"""Strangers' files at the import: an EdgematError in one sentence, or a correct lowered file; never anything else.

``python -m tests.foreign.campaign`` runs the same cases by the ten thousand.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgemat.errors import EdgematError, LoweringError
from edgemat.foreign.importing import import_onnx, imported
from edgemat.foreign.source import load, parse
from tests.foreign.campaign import SECONDS, TooSlow, case, judge
from tests.foreign.strangers import QONNX, damaged_bytes, damaged_graph, small_graph

ROOT = Path(__file__).resolve().parents[2]
FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
randoms = st.randoms(use_true_random=False)


@contextmanager
def limited() -> Iterator[None]:
    """Processor time of a case: `TooSlow` behind it."""

    def ring(number: int, frame: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@given(randoms)
@FUZZ
def test_small_networks_are_taken_correctly_or_refused(r: Random) -> None:
    with limited():
        judge(small_graph(r).SerializeToString())


@given(randoms)
@FUZZ
def test_networks_with_damaged_nodes(r: Random) -> None:
    with limited():
        judge(damaged_graph(small_graph(r), r).SerializeToString())


@given(randoms)
@FUZZ
def test_networks_with_damaged_bytes(r: Random) -> None:
    with limited():
        judge(damaged_bytes(small_graph(r).SerializeToString(), r))


def test_the_campaign_takes_and_refuses() -> None:
    """A control: the generators reach both ends, so that neither all are refused nor nothing is damaged."""
    with limited():
        found = Counter(judge(case(seed, [])).partition(",")[0] for seed in range(80))
    assert found["taken"] > 12
    assert found["refused"] > 12


def test_a_wrong_import_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of `judge`: a quantiser that rounds another way is called exact, and is caught."""
    from edgemat.foreign import quantisers

    monkeypatch.setitem(quantisers.ROUNDING_NAMES, "ROUND", "TRN")
    x, y = ends()
    inputs = ["x", "scale", "zero", "bits"]
    nodes = [helper.make_node("Quant", inputs, ["y"], "q", domain=QONNX, signed=1, narrow=0, rounding_mode="ROUND")]
    with pytest.raises(AssertionError, match="called exact, but not"):
        judge(model(nodes, x, y, scale=np.float32(0.5), zero=np.float32(0), bits=np.float32(8)))


# -- real files ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("folder", ["qonnx_zoo", "qonnx_testdata", "mlperf_qdq_onnx"])
def test_damaged_real_files(folder: str) -> None:
    data = os.environ.get("EDGEMAT_DATA")
    if not data or not Path(data, folder).is_dir():
        pytest.skip("EDGEMAT_DATA does not name the real data")
    paths = [p for p in sorted(Path(data, folder).rglob("*.onnx")) if p.stat().st_size < 1 << 18]
    r = Random(5)
    for path in paths:
        for _ in range(3):
            with limited():
                judge(damaged_bytes(path.read_bytes(), r))


@pytest.mark.slow
def test_a_campaign_in_little_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.foreign.campaign", "700000", "1500"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


# -- by hand ------------------------------------------------------------------------------------------------------
def ends(shape: tuple[int | str, ...] = ("N", 3), kind: int = TensorProto.FLOAT) -> tuple[list, list]:
    return [helper.make_tensor_value_info("x", kind, shape)], [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    ]


def model(nodes: list, ins: list, outs: list, opset: int = 13, **constants: np.ndarray | TensorProto) -> bytes:
    stored = [
        c if isinstance(c, TensorProto) else numpy_helper.from_array(np.asarray(c), name)
        for name, c in constants.items()
    ]
    graph = helper.make_graph(nodes, "g", ins, outs, stored)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(QONNX, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def quantised(
    scale: object = 0.25, zero: object = 0, bits: object = 8, name: str = "q", source: str = "x", **attributes: object
) -> bytes:
    """One Quant between input and output."""
    full = {"signed": 1, "narrow": 0, "rounding_mode": "ROUND", **attributes}
    node = helper.make_node("Quant", [source, "scale", "zero", "bits"], ["y"], name, domain=QONNX, **full)
    arrays = {"scale": scale, "zero": zero, "bits": bits}
    return model([node], *ends(), **{k: np.asarray(v, np.float32) for k, v in arrays.items()})


def dense(weights: object, **more: object) -> bytes:
    """x, quantised, times weights."""
    quant = helper.make_node("Quant", ["x", "scale", "zero", "bits"], ["v"], "q", domain=QONNX, signed=1, narrow=0)
    nodes = [quant, helper.make_node("MatMul", ["v", "w"], ["y"], "fc")]
    constants = {"scale": np.float32(0.25), "zero": np.float32(0), "bits": np.float32(8)}
    return model(nodes, *ends(), w=weights, **constants, **more)  # type: ignore[arg-type]


def external() -> TensorProto:
    tensor = numpy_helper.from_array(np.ones((3, 2), np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../../etc/passwd")
    return tensor


def hollow(*dims: int) -> TensorProto:
    return TensorProto(name="w", dims=dims, data_type=TensorProto.FLOAT)


def chain(*nodes: onnx.NodeProto, **options: object) -> bytes:
    ins, outs = ends(**options)  # type: ignore[arg-type]
    return model(list(nodes), ins, outs)


def node(op: str, inputs: list[str], outputs: list[str], **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, f"n_{op}", **attributes)


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "a scale that is NaN": (lambda: quantised(scale=np.nan), "scale"),
    "an infinite scale": (lambda: quantised(scale=np.inf), "scale"),
    "a scale of 0": (lambda: quantised(scale=0), "scale"),
    "a negative scale": (lambda: quantised(scale=-1), "scale"),
    "no scale at all": (lambda: quantised(scale=np.zeros(0)), "q"),
    "a width of 0": (lambda: quantised(bits=0), "bit width"),
    "a width of 33": (lambda: quantised(bits=33), "bit width"),
    "a width of 2.5": (lambda: quantised(bits=2.5), "bit width"),
    "an infinite width": (lambda: quantised(bits=np.inf), "bit width"),
    "a zero point that is NaN": (lambda: quantised(zero=np.nan), "zero point"),
    "an unknown rounding": (lambda: quantised(rounding_mode="x" * 9000), "rounds by"),
    "a rounding of the wrong type": (lambda: quantised(rounding_mode=3), "rounding_mode"),
    "a sign of the wrong type": (lambda: quantised(signed="yes"), "signed"),
    "weights that are NaN": (lambda: dense(np.full((3, 2), np.nan, np.float32)), "float weights|NaN|number"),
    "infinite weights": (lambda: dense(np.full((3, 2), np.inf, np.float32)), "float weights|number"),
    "weights without rows": (lambda: dense(np.zeros((0, 2), np.float32)), "element|shape|fit"),
    "weights without columns": (lambda: dense(np.zeros((3, 0), np.float32)), "element|shape|fit"),
    "weights of strings": (lambda: dense(np.array([["a"] * 2] * 3, dtype=object)), "holds no numbers"),
    "weights outside the file": (lambda: dense(external()), "outside the file"),
    "weights that are not there": (lambda: dense(hollow(3, 2)), "is damaged: it holds none"),
    "2**62 weights": (lambda: dense(hollow(1 << 31, 1 << 31)), "is damaged: it holds none"),
    "weights of -1 rows": (lambda: dense(hollow(-1, 2)), "damaged|element|fit|well-formed|negative"),
    "a circle": (lambda: chain(node("Relu", ["y"], ["v"]), node("Relu", ["v"], ["y"])), "well-formed|cycl"),
    "a value from nowhere": (lambda: chain(node("Add", ["x", "nowhere"], ["y"])), "'nowhere'"),
    "an output from nowhere": (lambda: chain(node("Relu", ["x"], ["z"])), "output 'y'"),
    "one value twice": (lambda: chain(node("Relu", ["x"], ["y"]), node("Relu", ["x"], ["y"])), "more than once"),
    "a node without inputs": (lambda: chain(node("Relu", [], ["y"])), "n_Relu|output"),
    "a node of a strange domain": (lambda: chain(node("Relu", ["x"], ["y"], domain="a.b")), "a.b::Relu"),
    "a float network": (lambda: chain(node("Relu", ["x"], ["y"])), "quanti"),
    "an input without a shape": (
        lambda: model([node("Relu", ["x"], ["y"])], [helper.make_tensor_value_info("x", 1, None)], ends()[1]),
        "shape",
    ),
    "an input of unknown sizes": (lambda: chain(node("Relu", ["x"], ["y"]), shape=("N", "C")), "shape"),
    "an input of no size": (lambda: chain(node("Relu", ["x"], ["y"]), shape=("N", 0)), "quanti|element|shape|length"),
    "an input of strings": (lambda: chain(node("Relu", ["x"], ["y"]), kind=TensorProto.STRING), "type|quanti|STRING"),
    "an output that is the input": (
        lambda: model([], ends()[0], ends()[0]),
        "quanti",
    ),
    "operator set 6": (lambda: model([node("Relu", ["x"], ["y"])], *ends(), opset=6), "operator set 6"),
    "operator set 99": (lambda: model([node("Relu", ["x"], ["y"])], *ends(), opset=99), "operator set 99"),
    "a loop": (lambda: chain(node("If", ["x"], ["y"], then_branch=helper.make_graph([], "g", [], []))), "of its own"),
    "nothing": (lambda: b"", "no graph"),
    "text": (lambda: b"hello, world", "not an ONNX file"),
    "an empty graph": (lambda: model([], [], []), "no graph"),
    "thresholds for a million channels": (
        lambda: model(
            [
                helper.make_node("Quant", ["x", "one", "zero", "bits"], ["v"], "q", domain=QONNX, signed=1, narrow=0),
                node("Conv", ["v", "w"], ["u"], group=1 << 20, kernel_shape=[1, 1]),
                node("Mul", ["u", "scale"], ["s"]),
                helper.make_node("Quant", ["s", "real", "zero", "bits"], ["y"], "p", domain=QONNX, signed=1, narrow=0),
            ],
            *ends(("N", 1 << 20, 1, 1)),
            one=np.float32(1),
            zero=np.float32(0),
            bits=np.float32(8),
            w=np.ones((1 << 20, 1, 1, 1), np.float32),
            scale=np.linspace(0.3, 0.7, 1 << 20, dtype=np.float32).reshape(1, -1, 1, 1),
            real=np.float32(0.3),
        ),
        "thresholds for each of 1048576 channels",
    ),
    "a huge constant out of a small one": (
        lambda: model(
            [
                node("Expand", ["one", "dims"], ["v"]),
                helper.make_node("MatMul", ["x", "v"], ["y"], "fc"),
            ],
            *ends(),
            one=np.float32(1),
            dims=np.array([1 << 20, 1 << 20]),
        ),
        "very large",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_sentence(name: str) -> None:
    make, pattern = HOSTILE[name]
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with limited(), pytest.raises(EdgematError, match=pattern) as caught:
        imported(parse(make()), {})
    assert len(str(caught.value)) < 2000
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 19  # KiB


@pytest.mark.parametrize(
    "name", ["int main(){}", "q\"; system('rm')", "a\nb\\", "../../up", "x" * 3000, "ключ", "if", "0"]
)
def test_names_are_only_names(name: str, tmp_path: Path) -> None:
    """Names of a stranger come out as identifiers in C, and nothing else in the file changes."""
    from edgemat.exporting import export

    (tmp_path / "in.onnx").write_bytes(quantised(name=name))
    import_onnx(tmp_path / "in.onnx", tmp_path / "net.onnx", name=name)
    built = export(tmp_path / "net.onnx", "mcu", tmp_path / "c")
    text = "".join(p.read_text() for p in built.rglob("model.[ch]"))
    assert "system(" not in text
    assert "int main(){}" not in text
    assert judge(quantised(name=name)) == "taken"


def test_a_folder_or_nothing_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.onnx"):
        with pytest.raises(LoweringError, match="cannot be read"):
            load(path)
