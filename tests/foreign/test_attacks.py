"""Files a hostile reader made: each was taken, called exact, and wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgemat
from edgemat.foreign.importing import ImportRefused, import_onnx


class File:
    """A QDQ file under construction: one float input `x`, one output `y`."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, array: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"n_{name}", **attributes))
        return name

    def quantised(self, value: str, scale: float, zero: np.generic) -> str:
        ends = self.constant(np.float32(scale)), self.constant(np.asarray(zero))
        return self.op("DequantizeLinear", self.op("QuantizeLinear", value, *ends), *ends)

    def save(self, path: Path, shape: list[object], output: str, opset: int = 17) -> Path:
        self.nodes.append(helper.make_node("Identity", [output], ["y"], name="last"))
        ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
        outs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
        graph = helper.make_graph(self.nodes, "g", ends, outs, self.constants)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
        return path


def both(path: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """What edgemat and onnxruntime (its integer kernels in their exact mode) make of a file; and what is inexact."""
    report = import_onnx(path, path.with_suffix(".net.onnx"))
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    expected = ort.InferenceSession(str(path), options).run(None, {"x": x})[0]
    found = np.asarray(edgemat.Simulator(path.with_suffix(".net.onnx"))(x))
    return found, expected, [row.fidelity for row in report.inexact]


@pytest.mark.parametrize("scales", [(0.003, 0.02), (0.0013, 0.5), (0.011, 0.05)])
def test_channels_with_far_scales_lose_nothing_between_two_roundings(tmp_path: Path, scales: tuple[float, ...]) -> None:
    file = File()
    data = file.quantised("x", 0.05, np.uint8(0))
    codes = file.constant(np.full((1, 2), 100, np.int8))
    by_channel = file.constant(np.array(scales, np.float32)), file.constant(np.zeros(2, np.int8))
    product = file.op("MatMul", data, file.op("DequantizeLinear", codes, *by_channel, axis=1))
    path = file.save(tmp_path / "far.onnx", ["N", 1], file.quantised(product, 0.1, np.uint8(10)))
    found, expected, inexact = both(path, (np.arange(256)[:, None] * 0.05).astype(np.float32))
    assert np.array_equal(found, expected) and not inexact


@pytest.mark.parametrize(("number", "kind"), [(2, np.uint8), (3, np.int8), (4, np.uint16), (5, np.int16)])
def test_a_quantiser_may_state_its_type(tmp_path: Path, number: int, kind: type) -> None:
    file = File()
    scale = file.constant(np.float32(0.5))
    stored = file.op("QuantizeLinear", "x", scale, output_dtype=number)
    path = file.save(tmp_path / "typed.onnx", ["N", 4], file.op("DequantizeLinear", stored, scale), 21)
    x = np.linspace(-200, 40_000, 400, dtype=np.float32).reshape(100, 4)
    found, expected, inexact = both(path, x)
    assert np.array_equal(found, expected) and not inexact
    assert float(expected.max()) == min(np.iinfo(kind).max * 0.5, 20_000 * 2)


def test_a_type_of_four_bits_is_refused(tmp_path: Path) -> None:
    file = File()
    scale = file.constant(np.float32(0.5))
    stored = file.op("QuantizeLinear", "x", scale, output_dtype=22)
    path = file.save(tmp_path / "typed.onnx", ["N", 4], file.op("DequantizeLinear", stored, scale), 21)
    with pytest.raises(ImportRefused, match="output_dtype"):
        import_onnx(path, tmp_path / "net.onnx")


@pytest.mark.parametrize("limit", ["relu", "clip"])
def test_a_relu_behind_a_sum_keeps_signed_codes_above_zero(tmp_path: Path, limit: str) -> None:
    file = File()
    a = file.quantised("x", 0.1, np.int8(0))
    b = file.quantised(file.op("Neg", a), 0.07, np.int8(0))
    total = file.op("Add", a, b)
    if limit == "relu":
        kept = file.op("Relu", total)
    else:
        kept = file.op("Clip", total, file.constant(np.float32(-0.5)), file.constant(np.float32(0.25)))
    path = file.save(tmp_path / "sum.onnx", ["N", 1], file.quantised(kept, 0.05, np.int8(0)))
    x = (np.arange(-128, 128)[:, None] * 0.1).astype(np.float32)
    found, expected, _ = both(path, x)
    assert found.min() == expected.min() and found.max() == expected.max()
    assert np.abs(found - expected).max() <= 0.0501


def test_an_input_rounded_beside_an_odd_zero_point_is_not_called_exact(tmp_path: Path) -> None:
    values = [np.float32(0.25), np.float32(3), np.float32(8)]
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in zip("szb", values, strict=True)]
    node = helper.make_node(
        "Quant", ["x", "s", "z", "b"], ["y"], "q", domain="qonnx.custom_op.general", rounding_mode="ROUND", signed=0
    )
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in ("x", "y")]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("qonnx.custom_op.general", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "odd.onnx")
    assert import_onnx(tmp_path / "odd.onnx", tmp_path / "net.onnx").inexact
    with pytest.raises(ImportRefused, match="tie"):
        import_onnx(tmp_path / "odd.onnx", tmp_path / "net.onnx", strict=True)


def test_a_layer_that_is_always_off_gives_its_constant(tmp_path: Path) -> None:
    file = File()
    data = file.quantised("x", 0.05, np.uint8(0))
    codes = file.constant(np.array([[-100, -50, -1]] * 20, np.int8))
    scales = file.constant(np.array([0.003, 0.02, 0.01], np.float32)), file.constant(np.zeros(3, np.int8))
    product = file.op("MatMul", data, file.op("DequantizeLinear", codes, *scales, axis=1))
    path = file.save(tmp_path / "off.onnx", ["N", 20], file.quantised(file.op("Relu", product), 0.1, np.uint8(0)))
    x = np.random.default_rng(3).uniform(0, 12, (50, 20)).astype(np.float32)
    found, expected, inexact = both(path, x)
    assert np.array_equal(found, expected) and not inexact and not found.any()
