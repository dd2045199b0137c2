"""onnxruntime's integer kernels, one node at a time: on every pair of codes, at ties, in float32's corners."""

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
from tests.foreign.qoperator_form import qoperator_form

MICROSOFT = "com.microsoft"
KINDS = {np.dtype(np.uint8): TensorProto.UINT8, np.dtype(np.int8): TensorProto.INT8}
F = np.float32


@dataclass
class One:
    """A file of one node, and what it is given."""

    op: str
    inputs: list[str]
    data: dict[str, np.ndarray]
    constants: dict[str, np.ndarray]
    attributes: dict[str, object] = field(default_factory=dict)
    domain: str = MICROSOFT
    output: int = TensorProto.UINT8

    def save(self, path: Path) -> Path:
        node = helper.make_node(self.op, self.inputs, ["y"], name="one", domain=self.domain, **self.attributes)
        ends = [helper.make_tensor_value_info(k, KINDS[v.dtype], ["N", *v.shape[1:]]) for k, v in self.data.items()]
        constants = [numpy_helper.from_array(np.asarray(v), k) for k, v in self.constants.items()]
        out = helper.make_tensor_value_info("y", self.output, None)
        graph = helper.make_graph([node], "one", ends, [out], constants)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
        return path


def onnxruntime_runs(path: Path, data: dict[str, np.ndarray], precise: bool = True) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if precise:  # without it u8 x s8 saturates on x86 without VNNI
        options.add_session_config_entry("session.x64quantprecision", "1")
    return np.asarray(ort.InferenceSession(str(path), options).run(None, data)[0])


def edgemat_runs(path: Path, data: dict[str, np.ndarray]) -> np.ndarray:
    real = {key: value.astype(np.float32) for key, value in data.items()}
    found = edgemat.Simulator(path)(real if len(real) > 1 else next(iter(real.values())))
    return np.asarray(next(iter(found.values())) if isinstance(found, dict) else found)


def pairs(kind: type) -> dict[str, np.ndarray]:
    info = np.iinfo(kind)
    codes = np.arange(info.min, info.max + 1)
    a, b = np.meshgrid(codes, codes, indexing="ij")
    return {"a": a.reshape(-1, 16).astype(kind), "b": b.reshape(-1, 16).astype(kind)}


def scales(kind: type, tied: bool) -> dict[str, np.ndarray]:
    """Scales that make no ties, or powers of two that make many, behind an odd zero point."""
    low = np.iinfo(kind).min
    points = {"za": kind(low + 117), "zb": kind(low + 3), "zy": kind(low + 55)}
    given = (0.5, 0.25, 1.0) if tied else (0.02, 0.035, 0.041)
    return {**points, **dict(zip(("sa", "sb", "sy"), map(F, given), strict=True))}


def joined(op: str, kind: type, tied: bool) -> One:
    order = ["sy", "zy", "a", "sa", "za", "b", "sb", "zb"]
    inputs = order if op == "QLinearConcat" else ["a", "sa", "za", "b", "sb", "zb", "sy", "zy"]
    attributes = {"axis": 1} if op == "QLinearConcat" else {}
    return One(op, inputs, pairs(kind), scales(kind, tied), attributes, output=KINDS[np.dtype(kind)])


def unary(op: str, kind: type, tied: bool) -> One:
    constants = scales(kind, tied)
    if op in ("QLinearSigmoid", "QLinearSoftmax"):
        constants |= {"sy": F(1 / 256), "zy": kind(np.iinfo(kind).min)}
    attributes = {"QLinearLeakyRelu": {"alpha": 0.1}, "QLinearSoftmax": {"axis": 1, "opset": 13}}.get(op, {})
    data = {"a": np.concatenate(list(pairs(kind).values()))}
    return One(op, ["a", "sa", "za", "sy", "zy"], data, constants, attributes, output=KINDS[np.dtype(kind)])


def pooled(op: str, kind: type, tied: bool) -> One:
    info, rng = np.iinfo(kind), np.random.default_rng(4)
    constants = scales(kind, tied)
    constants["sy"] = F(constants["sy"] / 4)
    attributes = {"kernel_shape": [3, 3], "strides": [2, 2]} if op == "QLinearAveragePool" else {}
    data = {"a": rng.integers(info.min, info.max + 1, (64, 8, 9, 9)).astype(kind)}
    return One(op, ["a", "sa", "za", "sy", "zy"], data, constants, attributes, output=KINDS[np.dtype(kind)])


def layer(op: str, kind: type, weight: type, tied: bool) -> One:
    """Weights over the whole range, scales by output channel, a zero point of the weights where they are unsigned."""
    info, rng = np.iinfo(kind), np.random.default_rng(5)
    conv = op == "QLinearConv"
    w = rng.integers(np.iinfo(weight).min, np.iinfo(weight).max + 1, (6, 8, 3, 3) if conv else (16, 6)).astype(weight)
    zero = weight(120 if weight is np.uint8 else 0)
    sw = F(2**-6) if tied else rng.uniform(0.001, 0.01, 6).astype(F)
    shape = (16, 8, 9, 9) if conv else (2048, 16)
    constants = {
        **scales(kind, tied),
        "w": w,
        "sw": sw,
        "zw": zero if tied or conv else np.full(6, zero),
        "bias": rng.integers(-9999, 9999, 6).astype(np.int32),
        "sy": F(0.5),
    }
    inputs = {
        "QLinearConv": ["a", "sa", "za", "w", "sw", "zw", "sy", "zy", "bias"],
        "QLinearMatMul": ["a", "sa", "za", "w", "sw", "zw", "sy", "zy"],
        "QGemm": ["a", "sa", "za", "w", "sw", "zw", "bias", "sy", "zy"],
    }[op]
    attributes = {"pads": [1] * 4, "strides": [2, 2]} if conv else {}
    data = {"a": rng.integers(info.min, info.max + 1, shape).astype(kind)}
    used = {key: value for key, value in constants.items() if key in inputs}
    return One(op, inputs, data, used, attributes, MICROSOFT if op == "QGemm" else "", KINDS[np.dtype(kind)])


def check(one: One, folder: Path, most: int = 0) -> np.ndarray:
    """edgemat and onnxruntime give the same stored integers; returns them."""
    path = one.save(folder / "one.onnx")
    report = import_onnx(path, folder / "net.onnx")
    weights = one.constants.get("w", np.zeros(1, np.uint8)).dtype
    precise = not (weights == np.int8 and one.output == TensorProto.INT8)  # there are no s8 x u8 kernels
    expected, found = onnxruntime_runs(path, one.data, precise), edgemat_runs(folder / "net.onnx", one.data)
    differ = int((found != expected).sum())
    assert differ <= most, report.to_dict()
    if differ:
        assert report.inexact
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize("op", ["QLinearAdd", "QLinearMul", "QLinearConcat"])
def test_joins_on_every_pair_of_codes(op: str, kind: type, tied: bool, tmp_path: Path) -> None:
    """Where ratios of powers of two make ties, half of the sums' may differ, counted in the report."""
    check(joined(op, kind, tied), tmp_path, 1 << 14 if (op, tied) == ("QLinearAdd", True) else 0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize("op", ["QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax"])
def test_tables_and_softmax(op: str, kind: type, tied: bool, tmp_path: Path) -> None:
    check(unary(op, kind, tied), tmp_path, 4 if op == "QLinearSoftmax" else 0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize("op", ["QLinearAveragePool", "QLinearGlobalAveragePool"])
def test_average_pools(op: str, kind: type, tied: bool, tmp_path: Path) -> None:
    check(pooled(op, kind, tied), tmp_path)


LAYERS = [(np.uint8, np.int8), (np.uint8, np.uint8), (np.int8, np.int8)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kind", "weight"), LAYERS)
@pytest.mark.parametrize("op", ["QLinearConv", "QLinearMatMul", "QGemm"])
def test_layers(op: str, kind: type, weight: type, tied: bool, tmp_path: Path) -> None:
    check(layer(op, kind, weight, tied), tmp_path)


@pytest.mark.parametrize(
    ("make", "control"),
    [
        (lambda: joined("QLinearMul", np.uint8, True), "zy"),
        (lambda: pooled("QLinearAveragePool", np.uint8, True), "zy"),
        (lambda: layer("QGemm", np.uint8, np.uint8, False), "zw"),
    ],
)
def test_another_zero_point_is_noticed(make: Callable[[], One], control: str, tmp_path: Path) -> None:
    """The control: one more in a zero point (which moves the ties, too) gives other integers."""
    before = check(make(), tmp_path)
    changed = make()
    changed.constants[control] = changed.constants[control] + np.asarray(1, changed.constants[control].dtype)
    after = check(changed, tmp_path)
    assert (before != after).any()
    if "Mul" in changed.op:
        inside = (before > 0) & (before < 254)
        assert (after[inside] != before[inside].astype(int) + 1).any()


def test_channels_last(tmp_path: Path) -> None:
    one = pooled("QLinearGlobalAveragePool", np.uint8, False)
    one.attributes["channels_last"] = 1
    check(one, tmp_path)


@pytest.mark.parametrize("weight", [np.int8, np.uint8])
def test_integer_products(weight: type, tmp_path: Path) -> None:
    """MatMulInteger gives the int32 sums themselves."""
    one = layer("QLinearMatMul", np.uint8, weight, True)
    constants = {key: one.constants[key] for key in ("w", "za", "zw")}
    made = One("MatMulInteger", ["a", "w", "za", "zw"], one.data, constants, {}, "", TensorProto.INT32)
    check(made, tmp_path)


def test_scales_found_at_run_time_are_refused(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])
    y = helper.make_tensor_value_info("y", TensorProto.UINT8, ["N", 4])
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"], name="dynamic")
    graph = helper.make_graph([node], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "d.onnx")
    with pytest.raises(ImportRefused, match=r"'dynamic'.*quantise statically"):
        import_onnx(tmp_path / "d.onnx", tmp_path / "net.onnx")


def test_a_real_network_is_its_integer_kernels(data_dir: Path, tmp_path: Path) -> None:
    """MLPerf Tiny's ResNet8 with real images: every code of every layer, of the QDQ file and of its integer form."""
    qdq = data_dir / "mlperf_qdq_onnx" / "resnet.onnx"
    images = np.load(data_dir / "cifar10_raw" / "cifar10_raw.npz")["x"][:24].astype(F)
    model = qoperator_form(str(qdq))
    onnx.save(model, tmp_path / "one.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(tmp_path / "one.onnx"), options)
    names = [output.name for output in session.get_outputs()]
    runs = [session.run(names, {session.get_inputs()[0].name: image[None]}) for image in images]
    expected = {name: np.concatenate([run[i] for run in runs]) for i, name in enumerate(names)}
    assert not import_onnx(tmp_path / "one.onnx", tmp_path / "net.onnx").inexact
    found = edgemat.Simulator(tmp_path / "net.onnx")(images)
    for name, values in zip(names, found.values(), strict=True):
        assert (np.asarray(values) == expected[name]).all(), name
    import_onnx(qdq, tmp_path / "qdq.onnx")
    logits = np.asarray(edgemat.Simulator(tmp_path / "qdq.onnx")(images))
    assert (logits == expected[names[0]]).mean() >= 0.995
