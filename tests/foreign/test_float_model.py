"""Float ONNX files as torch modules: the same numbers as onnxruntime's, and refusals that name every node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import edgemat
from edgemat.errors import LoweringError

from .real_files import by_onnxruntime


class File:
    """Nodes in a row on x [1, ...], with random constants."""

    def __init__(self, *shape: int, opset: int = 13) -> None:
        self.shape, self.opset = shape, opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.last = "x"
        self.rng = np.random.default_rng(0)

    def constant(self, value: object) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def random(self, *shape: int) -> np.ndarray:
        return self.rng.normal(0, 1, shape).astype(np.float32)

    def then(self, op: str, *more: str, **attributes: Any) -> File:
        made = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [self.last, *more], [made], f"{op}_{len(self.nodes)}", **attributes))
        self.last = made
        return self

    def save(self, folder: Path) -> Path:
        ends = [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, *self.shape]),
            helper.make_tensor_value_info(self.last, TensorProto.FLOAT, None),
        ]
        graph = helper.make_graph(self.nodes, "file", ends[:1], ends[1:], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        onnx.save(model, folder / "file.onnx")
        return folder / "file.onnx"


def image_network() -> File:
    f = File(3, 11, 9)
    f.then("Conv", f.constant(f.random(8, 3, 3, 3)), auto_pad="SAME_UPPER", strides=[2, 2])
    f.then("Add", f.constant(f.random(8, 1, 1)))
    statistics = [f.constant(np.abs(f.random(8)) + 0.5) for _ in range(4)]
    f.then("BatchNormalization", *statistics, epsilon=1e-3).then("Relu")
    skip = f.last
    f.then("Conv", f.constant(f.random(8, 1, 3, 3)), f.constant(f.random(8)), group=8, pads=[0, 1, 2, 1])
    f.then("LeakyRelu", alpha=0.125).then("Add", skip)
    f.then("Concat", skip, axis=1).then("MaxPool", kernel_shape=[2, 2], strides=[2, 1], pads=[1, 1, 1, 1])
    f.then("Resize", "", f.constant(np.array([1, 1, 2, 2], np.float32)), mode="nearest",
           coordinate_transformation_mode="asymmetric", nearest_mode="floor")  # fmt: skip
    f.then("AveragePool", kernel_shape=[2, 2], strides=[2, 2]).then("Clip", f.constant(np.float32(0)),
                                                                    f.constant(np.float32(6)))  # fmt: skip
    f.then("Transpose", perm=[0, 2, 3, 1]).then("Reshape", f.constant(np.array([1, -1, 16])))
    f.then("ReduceMean", axes=[1], keepdims=0)
    f.then("Gemm", f.constant(f.random(5, 16)), f.constant(f.random(5)), alpha=0.5, beta=2.0, transB=1)
    return f.then("Tanh").then("MatMul", f.constant(f.random(5, 4))).then("Add", f.constant(f.random(1, 4)))


def signal_network() -> File:
    f = File(12, 4)
    f.then("Transpose", perm=[0, 2, 1]).then("Conv", f.constant(f.random(6, 4, 3)), pads=[2, 0], dilations=[2])
    f.then("HardSwish").then("MaxPool", kernel_shape=[2], strides=[2])
    f.then("GlobalAveragePool").then("Flatten", axis=0)
    return f.then("Gemm", f.constant(f.random(6, 3))).then("Add", f.constant(f.random(3))).then("Sigmoid")


@pytest.mark.parametrize("network", [image_network, signal_network])
def test_the_module_computes_what_the_file_does(network: Any, tmp_path: Path) -> None:
    file = network()
    file.opset = 14
    path = file.save(tmp_path)
    model = edgemat.float_model(path)
    assert not model.training
    x = np.random.default_rng(1).normal(0, 1, (5, *file.shape)).astype(np.float32)
    wanted = np.concatenate([by_onnxruntime(onnx.load(path), one[None]) for one in x])
    with torch.no_grad():
        found = model(torch.from_numpy(x)).numpy()
    assert np.abs(found - wanted).max() <= 2e-6 * np.abs(wanted).max()
    kinds = [type(layer) for layer in model.children()]
    assert all(layer.bias is not None for layer in model.children() if isinstance(layer, nn.Linear | nn.Conv2d))
    assert nn.Linear in kinds


def test_a_closing_softmax_is_left_out(tmp_path: Path) -> None:
    f = File(4)
    path = f.then("MatMul", f.constant(f.random(4, 3))).then("Softmax", axis=-1).save(tmp_path)
    x = torch.randn(7, 4)
    with torch.no_grad():
        found = torch.softmax(edgemat.float_model(path)(x), 1).numpy()
    wanted = np.concatenate([by_onnxruntime(onnx.load(path), one[None].numpy()) for one in x])
    assert np.abs(found - wanted).max() < 1e-6


def test_all_that_layers_cannot_stand_for_is_named(tmp_path: Path) -> None:
    f = File(4, 6)
    f.then("Det", domain="").then("Softmax", axis=-1)
    f.last = "x"
    f.then("Add", f.constant(f.random(4, 6))).then("Relu")
    f.last = "x"
    f.then("Transpose", perm=[1, 0, 2])
    with pytest.raises(LoweringError) as refusal:
        edgemat.float_model(f.save(tmp_path))
    text = str(refusal.value)
    assert "'Det_0' is Det" in text and "'Add_2' (Add): a constant of shape (4, 6)" in text
    assert "'Transpose_4' (Transpose): perm (1, 0, 2) moves the batch" in text
    assert "Softmax_1" not in text and "Relu_3" not in text


def test_files_without_one_input_and_output_are_refused(tmp_path: Path) -> None:
    f = File(4)
    path = f.then("Relu").save(tmp_path)
    model = onnx.load(path)
    model.graph.output.append(onnx.ValueInfoProto(name="x"))
    onnx.save(model, path)
    with pytest.raises(LoweringError, match="1 inputs and 2 outputs, expected one of each"):
        edgemat.float_model(path)


def test_a_node_that_lacks_its_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"'Conv_0' \(Conv\): its inputs or attributes do not fit each other"):
        edgemat.float_model(File(3, 8, 8).then("Conv", kernel_shape=[3, 3]).save(tmp_path))
