"""Small float ONNX models with fixed seeds, for onnxruntime's quantiser to quantise."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


@dataclass
class Builder:
    """A graph under construction: each method appends one node and returns its output's name.

    Args:
        shape: Shape of a sample.
    """

    shape: tuple[int, ...]
    opset: int = 17
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(len(self.shape) * 1000 + sum(self.shape))

    def constant(self, array: np.ndarray) -> str:
        """An initializer."""
        name = f"c{len(self.constants)}"
        self.constants[name] = array
        return name

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: object) -> str:
        """A node; the name of its first output."""
        name = f"{op.lower()}{len(self.nodes)}"
        made = [name if i == 0 else f"{name}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), made, name=f"node_{name}", **attributes))
        return name

    def weights(self, *shape: int) -> str:
        """Random weights of about unit gain, their spread differing by output channel."""
        fan = int(np.prod(shape[1:]))
        spread = self.rng.uniform(0.3, 1.5, (shape[0],) + (1,) * (len(shape) - 1))
        return self.constant((self.rng.normal(0, 1, shape) * spread / np.sqrt(fan)).astype(np.float32))

    def conv(self, x: str, inputs: int, outputs: int, kernel: int = 3, group: int = 1, **attributes: object) -> str:
        """A convolution with a bias."""
        bias = self.constant(self.rng.normal(0, 0.1, outputs).astype(np.float32))
        attributes.setdefault("pads", [kernel // 2] * 4)
        w = self.weights(outputs, inputs // group, kernel, kernel)
        return self.add("Conv", x, w, bias, group=group, kernel_shape=[kernel, kernel], **attributes)

    def gemm(self, x: str, inputs: int, outputs: int) -> str:
        """A dense layer with a bias."""
        bias = self.constant(self.rng.normal(0, 0.1, outputs).astype(np.float32))
        return self.add("Gemm", x, self.weights(outputs, inputs), bias, transB=1)

    def matmul(self, x: str, inputs: int, outputs: int) -> str:
        """A dense layer without."""
        return self.add("MatMul", x, self.constant(self.constants.pop(self.weights(outputs, inputs)).T.copy()))

    def model(self, output: str) -> onnx.ModelProto:
        """The model that ends in this tensor, all shapes inferred."""
        ends = [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *self.shape]),
            helper.make_tensor_value_info(output, TensorProto.FLOAT, None),
        ]
        constants = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(self.nodes, "net", ends[:1], ends[1:], constants)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        return onnx.shape_inference.infer_shapes(made)

    def data(self, count: int, seed: int = 0) -> np.ndarray:
        """Samples: most about the calibrated range, some far beyond it, some constant."""
        x = np.random.default_rng(seed).normal(0, 1, (count, *self.shape)).astype(np.float32)
        x[::7] *= 4
        x[1::31] = np.sign(x[1::31]) * 9
        return x


def mlp(b: Builder) -> str:
    """Two dense layers with ReLU."""
    return b.gemm(b.add("Relu", b.gemm("x", 12, 16)), 16, 5)


def matmuls(b: Builder) -> str:
    """MatMul and Add, tanh, sigmoid."""
    h = b.add("Tanh", b.add("Add", b.matmul("x", 12, 16), b.constant(b.rng.normal(0, 0.1, 16).astype(np.float32))))
    return b.add("Sigmoid", b.matmul(h, 16, 5))


def residual(b: Builder) -> str:
    """Convolutions with padding and stride, a depthwise one, a residual sum, a global average, a dense layer."""
    stem = b.add("Relu", b.conv("x", 3, 8))
    h = b.add("Relu", b.conv(stem, 8, 8, group=8))
    joined = b.add("Relu", b.add("Add", b.conv(h, 8, 8, kernel=1), stem))
    down = b.add("Clip", b.conv(joined, 8, 12, strides=[2, 2]), b.constant(np.float32(0)), b.constant(np.float32(6)))
    return b.gemm(b.add("Flatten", b.add("GlobalAveragePool", down)), 12, 5)


def pools(b: Builder) -> str:
    """Maximum and average pools, a concatenation of tensors with different scales, a leaky ReLU."""
    h = b.add("LeakyRelu", b.conv("x", 3, 6), alpha=0.1)
    top = b.add("MaxPool", h, kernel_shape=[2, 2], strides=[2, 2])
    mean = b.add("AveragePool", h, kernel_shape=[2, 2], strides=[2, 2])
    both = b.add("Concat", top, mean, axis=1)
    return b.gemm(b.add("Flatten", b.conv(both, 12, 4, kernel=1)), 64, 5)


def gated(b: Builder) -> str:
    """A gate: sigmoid times the tensor, hard swish, a mean over the map, a softmax inside."""
    h = b.add("HardSwish", b.conv("x", 3, 6))
    gate = b.add("Sigmoid", b.conv(h, 6, 6, kernel=1))
    kept = b.add("Mul", h, gate)
    mean = b.add("ReduceMean", kept, axes=[2, 3], keepdims=0)
    share = b.add("Softmax", b.gemm(mean, 6, 8), axis=1)
    return b.gemm(share, 8, 5)


def moved(b: Builder) -> str:
    """A resize, a split, a padding, a transpose, a difference."""
    h = b.add("Relu", b.conv("x", 3, 4, strides=[2, 2]))
    scales = b.constant(np.array([1, 1, 2, 2], np.float32))
    large = b.add(
        "Resize", h, "", scales, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )
    first = b.add("Split", large, b.constant(np.array([2, 2], np.int64)), outputs=2, axis=1)
    less = b.add("Sub", first, f"{first}_1")
    padded = b.add("Pad", less, b.constant(np.array([0, 0, 1, 1, 0, 0, 0, 1], np.int64)))
    turned = b.add("Transpose", padded, perm=[0, 2, 3, 1])
    return b.gemm(b.add("Flatten", turned), 2 * 9 * 10, 5)


MODELS = {
    "mlp": (mlp, (12,)),
    "matmuls": (matmuls, (12,)),
    "residual": (residual, (3, 8, 8)),
    "pools": (pools, (3, 8, 8)),
    "gated": (gated, (3, 8, 8)),
    "moved": (moved, (3, 8, 8)),
}
"""Model functions and the shape of their samples."""
