"""QONNX's quantisers, imported and run by the Simulator, against the executor of qonnx on every code of their input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgemat
from edgemat.foreign.importing import ImportRefused

from .qonnx_executor import execute

DOMAIN = "qonnx.custom_op.general"
FLOATS = {"rounding_mode": "ROUND", "has_inf": 0, "has_nan": 0, "has_subnormal": 1, "saturation": 1}
MODES = ("ROUND", "HALF_EVEN", "CEIL", "FLOOR", "UP", "DOWN", "HALF_UP", "HALF_DOWN")


class File:
    """A file of nodes in a row, its data [N, 2] or [N, 2, 2, 2]."""

    def __init__(self, *shape: int, opset: int = 11) -> None:
        self.shape, self.opset = shape, opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.last = "x"

    def then(self, op: str, *constants: object, domain: str = "", **attributes: Any) -> File:
        names = [f"c{len(self.constants) + i}" for i in range(len(constants))]
        self.constants += [
            numpy_helper.from_array(np.asarray(c, np.float32), n) for c, n in zip(constants, names, strict=True)
        ]
        made = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [self.last, *names], [made], made, domain=domain, **attributes))
        self.last = made
        return self

    def quant(self, scale: object, zero: float = 0, bits: int = 8, mode: str = "ROUND", **attributes: int) -> File:
        full = {"signed": 1, "narrow": 0, **attributes}
        return self.then("Quant", scale, zero, bits, domain=DOMAIN, rounding_mode=mode, **full)

    def model(self, samples: int, version: int = 1) -> onnx.ModelProto:
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [samples, *self.shape]) for name in ("x", self.last)
        ]
        graph = helper.make_graph(self.nodes, "file", ends[:1], ends[1:], self.constants)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(DOMAIN, version)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def every_code(*shape: int, unit: float = 1 / 8) -> np.ndarray:
    """float32 values [256, ...]: each of the codes of a signed byte in each place, at the grid `unit`."""
    codes = np.arange(-128, 128, dtype=np.float32) * np.float32(unit)
    return np.stack([np.roll(codes, place) for place in range(int(np.prod(shape)))], axis=1).reshape(256, *shape)


def shaped(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the shapes qonnx wants of every tensor."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.infer_shapes import InferShapes

    return ModelWrapper(model).transform(InferShapes()).model


def both(file: File, x: np.ndarray, folder: Path, version: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """What qonnx computes, and what the imported file does."""
    model = file.model(len(x), version)
    onnx.save(model, folder / "file.onnx")
    edgemat.import_onnx(folder / "file.onnx", folder / "net.onnx", strict=True)
    (wanted,) = execute(shaped(model), {"x": x}).values()
    return np.asarray(wanted), np.asarray(edgemat.Simulator(folder / "net.onnx")(x))


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("mode", MODES)
def test_rounding_modes_do_what_qonnx_does(mode: str, zero: int, tmp_path: Path) -> None:
    """Ties and rails: the second quantiser has a quarter of the grid of the first."""
    x = every_code(2)
    file = File(2).quant(1 / 8).quant(0.5, zero, 6, mode)
    wanted, found = both(file, x, tmp_path)
    assert np.array_equal(found, wanted)
    assert len(np.unique(wanted)) > 40


@pytest.mark.parametrize("mode", ["CEIL", "UP", "HALF_UP"])
def test_rounding_behind_a_real_scale(mode: str, tmp_path: Path) -> None:
    """A factor for each channel, and a scale that is no power of two."""
    x = every_code(2)
    file = File(2).quant(1 / 8).then("Mul", [[0.3, 1.7]]).quant(0.11, 0, 5, mode, narrow=1)
    wanted, found = both(file, x, tmp_path)
    assert np.array_equal(found, wanted)


def test_another_mode_is_another_function(tmp_path: Path) -> None:
    """The control: what the parity above compares does tell modes apart, at ties and elsewhere."""
    x = every_code(2)
    results = {}
    for mode in MODES:
        results[mode] = both(File(2).quant(1 / 8).quant(0.5, 0, 6, mode), x, tmp_path)[1]
    same = {(a, b) for a in MODES for b in MODES if a < b and np.array_equal(results[a], results[b])}
    assert same == {("HALF_EVEN", "ROUND")}


@pytest.mark.parametrize("zero", [0, 16])
@pytest.mark.parametrize("mode", ["FLOOR", "ROUND", "CEIL"])
@pytest.mark.parametrize("scale", [0.125, 0.3])
def test_trunc_drops_bits(scale: float, mode: str, zero: int, tmp_path: Path) -> None:
    """The first form: behind a sum of four, two bits go."""
    x = every_code(2, 2, 2, unit=scale)
    file = File(2, 2, 2).quant(scale).then("GlobalAveragePool").then("Mul", 4.0)
    file.then("Trunc", scale, zero, 10, 8, domain=DOMAIN, rounding_mode=mode)
    wanted, found = both(file, x, tmp_path)
    assert np.array_equal(found, wanted)
    assert len(np.unique(wanted)) > 60


@pytest.mark.parametrize(("signed", "zero"), [(1, 0), (1, 8), (0, 8)])
@pytest.mark.parametrize("mode", ["FLOOR", "ROUND"])
@pytest.mark.parametrize("scale", [0.125, 0.3])
def test_trunc_with_an_output_scale(scale: float, mode: str, zero: int, signed: int, tmp_path: Path) -> None:
    """The second form clips: the sum of four has ten bits, of which three go and six are kept."""
    x = every_code(2, 2, 2, unit=scale)
    file = File(2, 2, 2).quant(scale).then("GlobalAveragePool").then("Mul", 4.0)
    attributes = {"rounding_mode": mode, "signed": signed, "narrow": 0}
    file.then("Trunc", scale, zero, 10, np.float32(scale) * np.float32(8), 6, domain=DOMAIN, **attributes)
    wanted, found = both(file, x, tmp_path, 2)
    assert np.array_equal(found, wanted)
    assert len(np.unique(wanted)) > 20


def test_floats_on_one_grid_are_fixed_point(tmp_path: Path) -> None:
    """One exponent bit: the leading bit is the mantissa's carry, and the largest number lies on the finest grid."""
    x = every_code(2, unit=1 / 32)
    file = File(2).quant(1 / 32).then("FloatQuant", 1.0, 1, 3, 0, 3.5, domain=DOMAIN, **FLOATS)
    wanted, found = both(file, x, tmp_path)
    assert np.array_equal(found, wanted)
    assert len(np.unique(wanted)) > 20


def test_floats_with_an_exponent_are_refused_for_data_and_taken_for_weights(tmp_path: Path) -> None:
    x = every_code(2)
    file = File(2).quant(1 / 8).then("FloatQuant", 1.0, 4, 3, 7, 240.0, domain=DOMAIN, **FLOATS)
    onnx.save(file.model(1), tmp_path / "file.onnx")
    with pytest.raises(ImportRefused, match=r"floating-point format of 4 exponent and 3 mantissa bits"):
        edgemat.import_onnx(tmp_path / "file.onnx", tmp_path / "net.onnx")
    weights = np.random.default_rng(0).normal(0, 1, (2, 3)).astype(np.float32)
    file = File(2).quant(1 / 8)
    for number, value in enumerate((weights, 1.0, 3, 2, 3, 8.0)):
        file.constants.append(numpy_helper.from_array(np.asarray(value, np.float32), f"w{number}"))
    names = [f"w{number}" for number in range(6)]
    file.nodes.append(helper.make_node("FloatQuant", names, ["w"], "w", domain=DOMAIN, **FLOATS))
    file.nodes.append(helper.make_node("MatMul", [file.last, "w"], ["y"], "y"))
    model = file.model(len(x))
    model.graph.output[0].name = "y"
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 3
    onnx.save(model, tmp_path / "file.onnx")
    edgemat.import_onnx(tmp_path / "file.onnx", tmp_path / "net.onnx", strict=True)
    (wanted,) = execute(shaped(model), {"x": x}).values()
    assert np.array_equal(edgemat.Simulator(tmp_path / "net.onnx")(x), wanted)


@pytest.mark.parametrize(("layout", "shape"), [("NHWC", (2, 2, 3)), ("", (3, 3)), ("NWC", (2, 3)), ("NCHW", (3, 2, 2))])
def test_thresholds_by_the_layout_that_the_node_names(layout: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Without a name qonnx takes rank 3 for channels last."""
    x = every_code(*shape)
    rows = np.array([[-9, -1, 2], [-4, 0.3, 8], [1, 5, 11]]) + 1 / 16
    file = File(*shape).quant(1 / 8)
    attributes = {"out_dtype": "INT4", "out_scale": 0.5, "out_bias": -1.0, "data_layout": layout}
    wanted, found = both(file.then("MultiThreshold", rows, domain=DOMAIN, **attributes), x, tmp_path)
    assert np.array_equal(found, wanted)
    assert len(np.unique(wanted)) == 4
