"""QDQ groups one at a time, against onnxruntime node by node and as it optimises them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgemat
from edgemat.foreign.importing import ImportRefused, import_onnx

F, U8, S8, S16 = np.float32, np.uint8, np.int8, np.int16
SHAPE = (3, 6, 6)


@dataclass
class Group:
    """A graph under construction: pairs of quantisers around operators."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(3))

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        """One operator; its output's name."""
        name = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=f"n_{name}", **attributes))
        return name

    def constant(self, value: object) -> str:
        """An initializer."""
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(value)
        return name

    def pair(self, x: str, scale: float, zero: np.generic) -> str:
        """QuantizeLinear and DequantizeLinear."""
        s, z = self.constant(F(scale)), self.constant(zero)
        return self.node("DequantizeLinear", self.node("QuantizeLinear", x, s, z), s, z)

    def weights(self, *shape: int, kind: type = S8, zero: int = 0, axis: int | None = None) -> str:
        """Stored weights over the whole range, with one scale or one for each entry of an axis."""
        info = np.iinfo(kind)
        q = self.rng.integers(info.min + (kind is S8), info.max + 1, shape).astype(kind)
        count = 1 if axis is None else shape[axis]
        scale = (self.rng.uniform(0.5, 1.5, count) * 0.02).astype(F)
        points = np.full(count, zero, kind)
        given = (q, scale, points) if axis is not None else (q, scale[0], points[0])
        return self.node("DequantizeLinear", *(self.constant(v) for v in given), axis=axis or 0)

    def layer(self, x: str, kernel: int = 1, outputs: int = 3) -> str:
        """A convolution without a bias."""
        return self.node("Conv", x, self.weights(outputs, 3, kernel, kernel))


def concat(g: Group) -> str:
    x = g.pair("x", 0.03, U8(120))
    c = g.pair(g.layer(x, outputs=2), 0.07, U8(90))
    return g.pair(g.node("Relu", g.node("Concat", x, c, axis=1)), 0.05, U8(0))


def concat_of_a_sum(g: Group) -> str:
    x = g.pair("x", 0.03, U8(120))
    c = g.pair(g.layer(x), 0.07, U8(90))
    joined = g.node("Concat", x, g.node("Add", x, c), axis=1)
    return g.pair(g.node("Transpose", joined, perm=[0, 2, 3, 1]), 0.05, U8(60))


def difference(g: Group) -> str:
    x = g.pair("x", 0.031, S8(12))
    return g.pair(g.node("Sub", x, g.pair(g.layer(x), 0.0717, S8(-9))), 0.0613, S8(3))


def gate(g: Group) -> str:
    x = g.pair("x", 0.031, S8(12))
    return g.pair(g.node("Mul", x, g.pair(g.layer(x), 0.0717, S8(-9))), 0.0613, S8(3))


def curve(op: str, *constants: float, **attributes: object) -> Callable[[Group], str]:
    def made(g: Group) -> str:
        x = g.pair("x", 0.03, S8(12))
        given = [g.constant(F(value)) for value in constants]
        return g.pair(g.node(op, x, *given, **attributes), 0.02, S8(-3))

    return made


def swish_in_pieces(g: Group) -> str:
    """x * hardsigmoid(x) without a quantiser between, as older operator sets write it."""
    x = g.pair("x", 0.03, U8(121))
    return g.pair(g.node("Mul", x, g.node("HardSigmoid", x, alpha=1 / 6, beta=0.5)), 0.02, U8(15))


def slopes(g: Group) -> str:
    x = g.pair("x", 0.03, S8(12))
    return g.pair(g.node("PRelu", x, g.constant(np.array([0.1, 0.2, 0.5], F).reshape(3, 1, 1))), 0.02, S8(-3))


def curve_of_sums(g: Group) -> str:
    return g.pair(g.node("Sigmoid", g.layer(g.pair("x", 0.03, S8(12)))), 1 / 256, S8(-128))


def quantised_weights(g: Group) -> str:
    """Float weights behind a pair of their own, as PyTorch writes them."""
    w = g.constant(g.rng.normal(0, 0.3, (4, 3, 3, 3)).astype(F))
    s, z = g.constant(g.rng.uniform(0.002, 0.01, 4).astype(F)), g.constant(np.zeros(4, S8))
    stored = g.node("DequantizeLinear", g.node("QuantizeLinear", w, s, z, axis=0), s, z, axis=0)
    return g.pair(g.node("Conv", g.pair("x", 0.03, S8(12)), stored), 0.05, S8(0))


def matmul(g: Group) -> str:
    """Scales by output channel behind data of rank 4, a float bias."""
    bias = g.constant(g.rng.normal(0, 1, 5).astype(F))
    product = g.node("MatMul", g.pair("x", 0.03, U8(121)), g.weights(6, 5, axis=1))
    return g.pair(g.node("Add", product, bias), 0.05, U8(100))


def unsigned_weights(g: Group) -> str:
    bias = g.constant(g.rng.normal(0, 1, 5).astype(F))
    product = g.node("MatMul", g.pair("x", 0.03, U8(121)), g.weights(6, 5, kind=U8, zero=117))
    return g.pair(g.node("Add", bias, product), 0.05, U8(100))


def gemm(g: Group) -> str:
    x = g.pair(g.node("Flatten", "x"), 0.03, U8(121))
    bias = g.constant(g.rng.normal(0, 1, 5).astype(F))
    return g.pair(g.node("Gemm", x, g.weights(108, 5, axis=1), bias, alpha=0.5, beta=2.0), 0.2, U8(100))


def another_scale(g: Group) -> str:
    """Integers that are read with another scale and zero point than they were written with."""
    x = g.node("QuantizeLinear", "x", g.constant(F(0.03)), g.constant(U8(121)))
    read = g.node("DequantizeLinear", x, g.constant(F(0.05)), g.constant(U8(100)))
    return g.pair(g.layer(read, kernel=3), 0.31, U8(100))


def sixteen_bits(g: Group) -> str:
    return g.pair(g.layer(g.pair("x", 0.0003, S16(0)), kernel=3, outputs=1), 0.002, S16(0))


def attention(g: Group) -> str:
    x = g.pair("x", 0.03, S8(12))
    scores = g.pair(g.node("MatMul", x, g.node("Transpose", x, perm=[0, 1, 3, 2])), 0.1, S8(0))
    shares = g.pair(g.node("Softmax", scores, axis=-1), 1 / 256, S8(-128))
    return g.pair(g.node("MatMul", shares, x), 0.03, S8(0))


def average(pads: int, included: int = 0) -> Callable[[Group], str]:
    def made(g: Group) -> str:
        x = g.pair("x", 0.031, U8(121))
        given = {"kernel_shape": [3, 3], "pads": [pads] * 4, "strides": [2, 2], "count_include_pad": included}
        return g.pair(g.node("AveragePool", x, **given), 0.0213, U8(121))

    return made


CASES: dict[str, tuple[Callable[[Group], str], float]] = {
    # What it is, and the share of output codes that may differ: float32 convolutions round their sums.
    "concat": (concat, 0.001),
    "concat_of_a_sum": (concat_of_a_sum, 0.001),
    "difference": (difference, 0.001),
    "gate": (gate, 0.001),
    **{op: (curve(op), 0.0) for op in ("Relu", "HardSwish", "Sigmoid", "Tanh", "Elu", "Softplus", "Exp", "Abs", "Erf")},
    "LeakyRelu": (curve("LeakyRelu", alpha=0.2), 0.0),
    "HardSigmoid": (curve("HardSigmoid", alpha=0.3), 0.0),
    "Clip": (curve("Clip", -1.0, 2.2), 0.0),
    "slopes": (slopes, 0.0),
    "swish_in_pieces": (swish_in_pieces, 0.0),
    "curve_of_sums": (curve_of_sums, 0.0005),
    "quantised_weights": (quantised_weights, 0.0005),
    "matmul": (matmul, 0.0005),
    "unsigned_weights": (unsigned_weights, 0.0005),
    "gemm": (gemm, 0.0005),
    "another_scale": (another_scale, 0.0005),
    "sixteen_bits": (sixteen_bits, 0.002),
    "attention": (attention, 0.001),
    "average": (average(0), 0.001),
    "average_without_padding": (average(1), 0.001),
    "average_with_padding": (average(1, 1), 0.001),
}


def saved(build: Callable[[Group], str], path: Path) -> Path:
    group = Group()
    output = build(group)
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *SHAPE]),
        helper.make_tensor_value_info(output, TensorProto.FLOAT, None),
    ]
    constants = [numpy_helper.from_array(value, name) for name, value in group.constants.items()]
    graph = helper.make_graph(group.nodes, "group", ends[:1], ends[1:], constants)
    opset = 21 if any(value.dtype == S16 for value in group.constants.values()) else 17
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def onnxruntime_runs(path: Path, x: np.ndarray, optimised: bool) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return np.asarray(ort.InferenceSession(str(path), options).run(None, {"x": x})[0])


def data(count: int) -> np.ndarray:
    x = np.random.default_rng(1).normal(0, 1.5, (count, *SHAPE)).astype(F)
    x[::5] *= 6
    return x


@pytest.mark.parametrize("name", CASES)
def test_groups(name: str, tmp_path: Path) -> None:
    """One of onnxruntime's two ways to run the group is met but for the stated share."""
    build, rate = CASES[name]
    path = saved(build, tmp_path / "group.onnx")
    report = import_onnx(path, tmp_path / "net.onnx")
    x = data(96)
    found = np.asarray(edgemat.Simulator(tmp_path / "net.onnx")(x))
    shares = [(found != onnxruntime_runs(path, x, optimised)).mean() for optimised in (False, True)]
    assert min(shares) <= rate, (shares, report.to_dict())
    assert len(np.unique(found)) > 10


@pytest.mark.parametrize("name", ["concat_of_a_sum", "average_without_padding", "attention"])
def test_backends(name: str, tmp_path: Path) -> None:
    import_onnx(saved(CASES[name][0], tmp_path / "group.onnx"), tmp_path / "net.onnx")
    report = edgemat.verify(tmp_path / "net.onnx", samples=8, backends=("reference", "onnx", "mcu"))
    assert report.ok, report


def root(g: Group) -> str:
    return g.pair(g.node("Sqrt", g.pair("x", 0.03, S8(12))), 0.02, S8(-3))


def turning(g: Group) -> str:
    return g.pair(g.node("HardSwish", g.layer(g.pair("x", 0.03, S8(12)))), 0.05, S8(-3))


def wide_sum(g: Group) -> str:
    x = g.pair("x", 0.0003, S16(0))
    return g.pair(g.node("Add", x, g.node("Transpose", x, perm=[0, 1, 3, 2])), 0.0009, S16(0))


@pytest.mark.parametrize(
    ("build", "reason"), [(root, "make NaN"), (turning, "not monotone"), (wide_sum, "too many to compare")]
)
def test_refusals(build: Callable[[Group], str], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match=reason):
        import_onnx(saved(build, tmp_path / "group.onnx"), tmp_path / "net.onnx")


def test_where_onnxruntime_saturates_is_said(tmp_path: Path) -> None:
    """s8 weights over the whole range, and such as no pair of products makes saturate."""

    def small(g: Group) -> str:
        q = g.constant(g.rng.integers(-60, 61, (6, 5)).astype(S8))
        weights = g.node("DequantizeLinear", q, g.constant(F(0.021)), g.constant(S8(0)))
        return g.pair(g.node("MatMul", g.pair("x", 0.03, U8(121)), weights), 0.05, U8(100))

    for build, said in ((matmul, True), (small, False)):
        report = import_onnx(saved(build, tmp_path / "group.onnx"), tmp_path / "net.onnx")
        note = next(row.note for row in report.rows if row.op == "MatMul")
        assert ("without VNNI" in note) == said


def test_a_factor_that_is_not_positive_is_refused(tmp_path: Path) -> None:
    def build(g: Group) -> str:
        x = g.pair(g.node("Flatten", "x"), 0.03, U8(121))
        return g.pair(g.node("Gemm", x, g.weights(108, 5), alpha=-1.0), 0.2, U8(100))

    with pytest.raises(ImportRefused, match=r"alpha -1\.0"):
        import_onnx(saved(build, tmp_path / "group.onnx"), tmp_path / "net.onnx")


def test_integer_ends(tmp_path: Path) -> None:
    """A file whose first and last quantisers were cut off, as conversions for microcontrollers have them."""
    g = Group()
    s, z, t = g.constant(F(0.03)), g.constant(S8(-7)), g.constant(F(0.4))
    y = g.node("QuantizeLinear", g.layer(g.node("DequantizeLinear", "x", s, z), kernel=3), t, z)
    ends = [
        helper.make_tensor_value_info("x", TensorProto.INT8, ["N", *SHAPE]),
        helper.make_tensor_value_info(y, TensorProto.INT8, None),
    ]
    constants = [numpy_helper.from_array(value, name) for name, value in g.constants.items()]
    graph = helper.make_graph(g.nodes, "ends", ends[:1], ends[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), tmp_path / "e.onnx")
    report = import_onnx(tmp_path / "e.onnx", tmp_path / "net.onnx")
    assert any("stored integers" in note for note in report.notes)
    x = np.random.default_rng(2).integers(-128, 128, (64, *SHAPE)).astype(S8)
    found = np.asarray(edgemat.Simulator(tmp_path / "net.onnx")(x.astype(F)))
    differ = found != onnxruntime_runs(tmp_path / "e.onnx", x, False)
    assert differ.mean() <= 0.0005
