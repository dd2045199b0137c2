"""What an operator set, an automatic padding or a constant says is done, or refused; nothing is read past."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgemat
from edgemat.foreign.execution import _thresholds
from edgemat.foreign.importing import ImportRefused, import_onnx
from edgemat.foreign.joins import _fitted

X = TensorProto.FLOAT


def written(path: Path, nodes: list, shapes: dict, constants: dict, outputs: list[str], opset: int) -> Path:  # type: ignore[type-arg]
    """A file of one float input `x`, with its constants."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", X, shapes["x"])],
        [helper.make_tensor_value_info(name, X, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("sizes", [(1, 3), (3, 1), (2, 2)])
def test_split_before_operator_set_13_states_its_sizes(tmp_path: Path, sizes: tuple[int, int]) -> None:
    node = helper.make_node("Split", ["x"], ["a", "b"], axis=1, split=list(sizes))
    path = written(tmp_path / "split.onnx", [node], {"x": ["N", 4]}, {}, ["a", "b"], 11)
    import_onnx(path, tmp_path / "net.onnx", inputs={"x": "fixed<8,8>"})
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    found = edgemat.Simulator(tmp_path / "net.onnx")(x)
    expected = ort.InferenceSession(str(path)).run(None, {"x": x})
    assert isinstance(found, dict)
    for name, array in zip(("a", "b"), expected, strict=True):
        assert np.array_equal(found[name], array)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
def test_automatic_padding_of_a_transposed_convolution_is_refused(tmp_path: Path, auto_pad: str) -> None:
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], auto_pad=auto_pad, strides=[2])
    weights = np.arange(3, dtype=np.float32).reshape(1, 1, 3)
    path = written(tmp_path / "up.onnx", [node], {"x": ["N", 1, 5]}, {"w": weights}, ["y"], 13)
    with pytest.raises(ImportRefused, match="explicit pads"):
        import_onnx(path, tmp_path / "net.onnx", inputs={"x": "fixed<8,8>"})


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize(("stride", "size"), [(1, 5), (2, 5), (2, 6), (3, 7)])
def test_automatic_padding_of_a_convolution(tmp_path: Path, auto_pad: str, stride: int, size: int) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], auto_pad=auto_pad, strides=[stride], kernel_shape=[4])
    weights = np.array([[[1, -2, 3, 5]]], np.float32)
    path = written(tmp_path / "conv.onnx", [node], {"x": ["N", 1, size]}, {"w": weights}, ["y"], 13)
    import_onnx(path, tmp_path / "net.onnx", inputs={"x": "fixed<8,8>"})
    x = np.arange(2 * size, dtype=np.float32).reshape(2, 1, size)
    expected = ort.InferenceSession(str(path)).run(None, {"x": x})[0]
    assert np.array_equal(np.asarray(edgemat.Simulator(tmp_path / "net.onnx")(x)), expected)


def test_a_constant_made_large_is_refused_before_it_is_made(tmp_path: Path) -> None:
    nodes = [helper.make_node("Mul", ["a", "b"], ["c"]), helper.make_node("Add", ["x", "c"], ["y"])]
    sides = {"a": np.ones((1 << 16, 1), np.float32), "b": np.ones((1, 1 << 16), np.float32)}
    path = written(tmp_path / "large.onnx", nodes, {"x": ["N", 4]}, sides, ["y"], 13)
    with pytest.raises(ImportRefused, match="4294967296 elements"):
        import_onnx(path, tmp_path / "net.onnx", inputs={"x": "fixed<8,8>"})


def test_thresholds_of_rank_3_lie_along_the_last_axis_unless_the_node_says_otherwise() -> None:
    qonnx = pytest.importorskip("qonnx.custom_op.general.multithreshold")
    x, thresholds = np.arange(12, dtype=np.float32).reshape(1, 3, 4), np.arange(8, dtype=np.float32).reshape(4, 2)
    expected = qonnx.multithreshold(np.moveaxis(x, -1, 1), thresholds, 1.0, 0.0)
    assert np.array_equal(_thresholds({}, x, thresholds), np.moveaxis(expected, 1, -1))
    first = qonnx.multithreshold(np.moveaxis(x, -1, 1), thresholds, 1.0, 0.0)
    assert np.array_equal(_thresholds({"data_layout": b"NCW"}, np.moveaxis(x, -1, 1), thresholds), first)


def test_how_far_a_sum_is_off_is_measured() -> None:
    z = np.arange(8, dtype=np.int64) << 4
    expected = np.array([0, 1, 2, 3, 4, 5, 6, 40])
    _, wrong, far = _fitted(z, expected, 4, (0, 255))
    assert (wrong, far) == (1, 33)


FLOAT = {
    "mean": ("ReduceMean", {}, [1, 3, 4], {}),
    "moved": ("Reshape", {}, [1, 4, 8], {"s": np.array([-1, 8])}),
    "joined": ("Concat", {"axis": 0}, [1, 4], {"s": np.ones((1, 4), np.float32)}),
    "spread": ("AveragePool", {"kernel_shape": [2, 2], "dilations": [2, 2]}, [1, 1, 5, 5], {}),
}


@pytest.mark.parametrize("kind", list(FLOAT))
def test_float_files_that_move_the_batch_are_refused(tmp_path: Path, kind: str) -> None:
    op, attributes, shape, constants = FLOAT[kind]
    node = helper.make_node(op, ["x", *constants], ["y"], name=kind, **attributes)
    path = written(tmp_path / "f.onnx", [node], {"x": shape}, constants, ["y"], 19 if kind == "spread" else 13)
    with pytest.raises(edgemat.EdgematError, match=kind):
        edgemat.float_model(path)
