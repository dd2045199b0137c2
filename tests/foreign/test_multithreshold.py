"""FINN's MultiThreshold: what the import computes is what the qonnx package computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgemat
from edgemat.errors import LoweringError
from edgemat.foreign.importing import import_onnx

QONNX = "qonnx.custom_op.general"


def network(
    thresholds: np.ndarray, scale: float, bias: float, weight: float = 0.5, layout: str = "NC"
) -> onnx.ModelProto:
    """x [N, 4] in 8 bits, times a matrix, through thresholds."""
    rng = np.random.default_rng(0)
    constants = {
        "s": np.float32(0.0625),
        "z": np.float32(0),
        "b": np.float32(8),
        "w": (rng.integers(-7, 8, (4, 3)) * weight).astype(np.float32),
        "t": thresholds.astype(np.float32),
    }
    attributes = {"out_dtype": "INT8", "out_scale": scale, "out_bias": bias, "data_layout": layout}
    nodes = [
        helper.make_node("Quant", ["x", "s", "z", "b"], ["q"], domain=QONNX, signed=1, narrow=0, rounding_mode="ROUND"),
        helper.make_node("MatMul", ["q", "w"], ["sums"]),
        helper.make_node("MultiThreshold", ["sums", "t"], ["y"], domain=QONNX, **attributes),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [64, size]) for n, size in (("x", 4), ("y", 3))]
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(QONNX, 1)])


def imported(model: onnx.ModelProto, folder: Path, x: np.ndarray) -> np.ndarray:
    """The Simulator's output of the imported model."""
    onnx.save(model, folder / "own.onnx")
    import_onnx(folder / "own.onnx", folder / "net.onnx")
    return edgemat.Simulator(folder / "net.onnx")(x)


RNG = np.random.default_rng(1)
CASES = {
    "one row for all": (np.sort(RNG.normal(0, 8, (1, 15))), 1.0, 0.0, 0.5),
    "a row for each channel": (np.sort(RNG.normal(0, 8, (3, 7))), 0.25, -1.0, 0.5),
    "unsorted, equal and infinite": (np.array([[3.0, -2.0, 3.0, np.inf, -np.inf]]), 1.0, -2.0, 0.5),
    "bipolar": (RNG.normal(0, 4, (3, 1)), 2.0, -1.0, 0.5),
    "real weights and levels": (np.sort(RNG.normal(0, 1, (3, 31))), 0.1, -1.6, 0.5),
    "on the sums": (np.arange(-8.0, 8.0)[None] * 0.5, 1.0, 0.0, 0.5),
}


@pytest.mark.parametrize("case", CASES)
def test_thresholds_count_as_qonnx_counts(case: str, tmp_path: Path) -> None:
    general = pytest.importorskip("qonnx.custom_op.general.multithreshold")
    thresholds, scale, bias, weight = CASES[case]
    x = np.random.default_rng(2).integers(-128, 128, (64, 4)).astype(np.float32) / 16
    model = network(thresholds, scale, bias, weight)
    w = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "w"))
    wanted = general.multithreshold(x @ w, thresholds.astype(np.float32), scale, bias)
    found = imported(model, tmp_path, x)
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
    moved = general.multithreshold(x @ w, thresholds.astype(np.float32) + np.float32(0.5), scale, bias)
    assert np.abs(found - moved).max() > 0.01 * scale  # the control


@pytest.mark.parametrize(
    ("thresholds", "scale", "bias", "message"),
    [
        (np.zeros((3, 0)), 1.0, 0.0, "expected numbers"),
        (np.full((1, 2), np.nan), 1.0, 0.0, "expected numbers"),
        (np.zeros((2, 3)), 1.0, 0.0, "2 rows of thresholds"),
        (np.zeros((1, 3)), -1.0, 0.0, "expected a positive scale"),
        (np.zeros((1, 3)), 1.0, 0.5, "no multiple of out_scale"),
    ],
)
def test_what_is_no_staircase_is_refused(
    thresholds: np.ndarray, scale: float, bias: float, message: str, tmp_path: Path
) -> None:
    with pytest.raises(LoweringError, match=message):
        imported(network(thresholds, scale, bias), tmp_path, np.zeros((64, 4), np.float32))
