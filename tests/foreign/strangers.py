"""Files as strangers write them: small random quantised graphs, and files that were damaged."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

QONNX = "qonnx.custom_op.general"
LIMITS = (0, 1, -1, 2, 3, 7, 255, -128, 1 << 20, (1 << 31) - 1, 1 << 31, -(1 << 63), (1 << 63) - 1)
REALS = (0.0, -1.0, 1.0, 0.3, float("nan"), float("inf"), -float("inf"), 1e-45, 1e38, 2.5)
MODES = ("ROUND", "FLOOR", "CEIL", "DOWN", "UP", "HALF_UP", "HALF_DOWN")
TEXTS = ("", "NOTSET", "SAME_UPPER", "ROUND", "x" * 5000, '"; rm -rf ~ #', "a\nb", "\0", "int main(){}", "../../x")
OPERATORS = (
    *("Conv", "MatMul", "Gemm", "Relu", "Clip", "Add", "Mul", "Div", "Sub", "Concat", "MaxPool", "AveragePool"),
    *("GlobalAveragePool", "Transpose", "Reshape", "Flatten", "Squeeze", "Sigmoid", "Softmax", "Slice", "Split", "Pad"),
    *("Resize", "Gather", "ConvTranspose", "BatchNormalization", "QuantizeLinear", "DequantizeLinear", "Cast", "Shape"),
    *("Constant", "Loop", "If", "Identity", "ReduceMean", "Floor", "Round", "PRelu", "Tanh", "ArgMax", "QLinearConv"),
    *("LSTM", "NonZero", "Einsum", "Expand", "Tile", "Range", "Quant", "BipolarQuant", "Trunc", "MultiThreshold"),
)


class Writer:
    """A graph under construction: nodes, constants, and the tensor that the next node reads."""

    def __init__(self, r: Random, dialect: str) -> None:
        self.r, self.dialect = r, dialect
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self.shape: tuple[int, ...] = ()
        self.at = "x"
        self.binary = r.random() < 0.5

    def name(self, stem: str) -> str:
        return f"{stem}{len(self.nodes)}_{len(self.constants)}"

    def constant(self, array: Any) -> str:
        name = self.name("c")
        self.constants.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def node(self, op: str, inputs: list[str], domain: str = "", **attributes: Any) -> str:
        made = self.name("v")
        self.nodes.append(helper.make_node(op, inputs, [made], name=self.name(op), domain=domain, **attributes))
        return made

    def real(self, low: float = -1.0, high: float = 1.0) -> float:
        return self.r.uniform(low, high)

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.array([self.real() for _ in range(int(np.prod(shape)))], np.float32).reshape(shape)

    def scale(self) -> float:
        return 2.0 ** self.r.randint(-6, 1) if self.binary else self.real(0.004, 0.4)

    def quantised(self, at: str, channels: int = 0, axis: int = 0, rank: int = 2) -> str:
        """A quantiser of data (no channels) or of weights."""
        r = self.r
        if self.dialect == "qonnx":
            scale: Any = np.float32(self.scale())
            if channels and r.random() < 0.4:
                shape = [1] * rank
                shape[axis] = channels
                scale = np.array([self.scale() for _ in range(channels)], np.float32).reshape(shape)
            if r.random() < 0.1:
                return self.node("BipolarQuant", [at, self.constant(scale)], QONNX)
            signed = int(channels > 0 or r.random() < 0.6)
            operands = [np.asarray(scale, np.float32), np.float32(0), np.float32(r.randint(2, 8))]
            mode = "ROUND" if self.at == "x" else r.choice(MODES)
            inputs = [at, *(self.constant(v) for v in operands)]
            return self.node(
                "Quant", inputs, QONNX, signed=signed, narrow=int(r.random() < 0.3 and signed), rounding_mode=mode
            )
        kind = np.int8 if channels or r.random() < 0.5 else np.uint8
        attributes = {}
        scales: Any = np.float32(self.scale())
        zero: Any = kind(0 if channels or r.random() < 0.4 else r.randint(-20, 20) % 100)
        if channels and r.random() < 0.4:
            scales, zero = np.array([self.scale() for _ in range(channels)], np.float32), np.zeros(channels, kind)
            attributes = {"axis": axis}
        operands = [self.constant(scales), self.constant(zero)]
        stored = self.node("QuantizeLinear", [at, *operands], **attributes)
        return self.node("DequantizeLinear", [stored, *operands], **attributes)

    def quantise(self) -> None:
        self.at = self.quantised(self.at)

    def layer(self) -> None:
        kinds = ["dense"] if len(self.shape) == 1 else ["conv", "conv", "pool", "flatten", "transpose"]
        kinds += ["relu", "clip", "affine", "sigmoid", "residual", "concat"]
        getattr(self, f"_{self.r.choice(kinds)}")()

    def _dense(self) -> None:
        outputs = self.r.randint(1, 5)
        weights = self.quantised(self.constant(self.array((self.shape[0], outputs))), outputs, 1)
        self.at = self.node("MatMul", [self.at, weights])
        self.shape = (outputs,)
        if self.r.random() < 0.5:
            self.at = self.node("Add", [self.at, self.constant(self.array((outputs,)))])

    def _conv(self) -> None:
        r, (channels, height, width) = self.r, self.shape
        outputs, k = r.randint(1, 4), r.randint(1, min(3, height, width))
        pad = r.randint(0, 1) if k > 1 else 0
        weights = self.quantised(self.constant(self.array((outputs, channels, k, k))), outputs, 0, 4)
        self.at = self.node("Conv", [self.at, weights], kernel_shape=[k, k], pads=[pad] * 4)
        self.shape = (outputs, height + 2 * pad - k + 1, width + 2 * pad - k + 1)

    def _pool(self) -> None:
        channels, height, width = self.shape
        op = self.r.choice(("MaxPool", "AveragePool", "GlobalAveragePool"))
        if op == "GlobalAveragePool":
            self.at, self.shape = self.node(op, [self.at]), (channels, 1, 1)
        elif min(height, width) >= 2:
            self.at = self.node(op, [self.at], kernel_shape=[2, 2], strides=[2, 2])
            self.shape = (channels, height // 2, width // 2)

    def _flatten(self) -> None:
        self.at, self.shape = self.node("Flatten", [self.at]), (int(np.prod(self.shape)),)

    def _transpose(self) -> None:
        if len(set(self.shape)) == 1:
            self.at = self.node("Transpose", [self.at], perm=[0, 2, 3, 1])

    def _relu(self) -> None:
        self.at = self.node("Relu", [self.at])

    def _clip(self) -> None:
        self.at = self.node("Clip", [self.at, self.constant(np.float32(-1)), self.constant(np.float32(6))])

    def _affine(self) -> None:
        op = self.r.choice(("Mul", "Div", "Add", "Sub"))
        shape = (self.shape[0],) + (1,) * (len(self.shape) - 1) if self.r.random() < 0.5 else ()
        self.at = self.node(op, [self.at, self.constant(self.array(shape) + np.float32(1.5))])

    def _sigmoid(self) -> None:
        self.at = self.node("Sigmoid", [self.at])

    def _residual(self) -> None:
        before = self.at = self.quantised(self.at)
        self.at = self.quantised(self.node("Relu", [before]))
        self.at = self.node("Add", [before, self.at])

    def _concat(self) -> None:
        before = self.at = self.quantised(self.at)
        self.at = self.node("Concat", [before, before], axis=1)
        self.shape = (2 * self.shape[0], *self.shape[1:])


def small_graph(r: Random) -> onnx.ModelProto:
    """A small quantised network, QONNX or QDQ."""
    dialect = r.choice(("qonnx", "qdq"))
    writer = Writer(r, dialect)
    shape = writer.shape = r.choice(((3,), (5,), (1, 4, 4), (2, 3, 5), (4, 4, 4)))
    writer.quantise()
    for _ in range(r.randint(1, 4)):
        writer.layer()
        if r.random() < 0.7:
            writer.quantise()
    if r.random() < 0.6:
        writer.quantise()
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape])]
    last = [helper.make_tensor_value_info(writer.at, TensorProto.FLOAT, None)]
    graph = helper.make_graph(writer.nodes, "g", ends, last, writer.constants)
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid(QONNX, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


# -- damage ---------------------------------------------------------------------------------------------------------
def damaged_bytes(data: bytes, r: Random) -> bytes:
    """Some bytes of a file flipped, cut out, repeated or overwritten."""
    made = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 5, 20))):
        at = r.randrange(max(len(made), 1))
        kind = r.randrange(5)
        if kind == 0 and made:
            made[at] ^= 1 << r.randrange(8)
        elif kind == 1 and made:
            made[at] = r.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            del made[at : at + r.choice((1, 4, 100, len(made)))]
        elif kind == 3:
            made[at:at] = made[at : at + r.choice((1, 8, 64))]
        else:
            other = r.randrange(max(len(made), 1))
            made[at : at + 16] = made[other : other + 16]
    return bytes(made)


def damaged_graph(model: onnx.ModelProto, r: Random) -> onnx.ModelProto:
    """A model whose nodes, attributes, constants or shapes were changed; it is still a protobuf."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for _ in range(r.choice((1, 1, 1, 2, 4))):
        r.choice((_node, _node, _attribute, _attribute, _constant, _constant, _wire, _wire, _shape, _file))(made, r)
    return made


def _node(model: onnx.ModelProto, r: Random) -> None:
    nodes = model.graph.node
    if not nodes:
        return
    node = r.choice(nodes)
    kind = r.randrange(6)
    if kind == 0:
        node.op_type = r.choice(OPERATORS)
    elif kind == 1:
        nodes.remove(node)
    elif kind == 2:
        nodes.add().CopyFrom(node)
    elif kind == 3:
        node.domain = r.choice(("", QONNX, "onnx.brevitas", "finn.custom_op.general", "com.microsoft", "edgemat"))
    elif kind == 4:
        node.name = r.choice(TEXTS)
    else:
        nodes.insert(0, node)


def _attribute(model: onnx.ModelProto, r: Random) -> None:
    node = r.choice(model.graph.node) if model.graph.node else None
    if node is None:
        return
    if not node.attribute or r.random() < 0.2:
        name = r.choice(("axis", "axes", "perm", "pads", "strides", "group", "alpha", "to", "mode", "kernel_shape"))
        node.attribute.append(helper.make_attribute(name, r.choice(LIMITS)))
    attribute = r.choice(node.attribute)
    name = attribute.name
    if r.random() < 0.2:
        node.attribute.remove(attribute)
        return
    value: Any = r.choice(
        (r.choice(LIMITS), r.choice(REALS), r.choice(TEXTS), [r.choice(LIMITS)] * r.randint(1, 4), None)
    )
    if value is None:
        value = numpy_helper.from_array(np.zeros((2, 0), np.float32))
    elif attribute.type == AttributeProto.INTS and r.random() < 0.6:
        attribute.ints[:] = [r.choice(LIMITS[:8]) for _ in range(r.randint(0, 5))]
        return
    attribute.CopyFrom(helper.make_attribute(name, value))


def _constant(model: onnx.ModelProto, r: Random) -> None:
    constants = model.graph.initializer
    if not constants:
        return
    tensor = r.choice(constants)
    name = tensor.name
    kind = r.randrange(8)
    try:
        array = numpy_helper.to_array(tensor).copy()
    except Exception:
        return
    if kind == 0 and array.size:
        array.reshape(-1)[r.randrange(array.size)] = r.choice(REALS) if array.dtype.kind == "f" else 1
    elif kind == 1:
        array = np.full_like(array, r.choice(REALS) if array.dtype.kind == "f" else r.choice((0, 1)))
    elif kind == 2:
        array = array.astype(r.choice((np.float64, np.float16, np.int64, np.uint8, np.int32, np.bool_)), copy=False)
    elif kind == 3:
        array = array.reshape((*array.shape, 1)) if r.random() < 0.5 else array.reshape(-1)
    elif kind == 4:
        array = np.zeros((0, 3), array.dtype)
    elif kind == 5:
        tensor.dims[:] = [r.choice(LIMITS) for _ in range(r.randint(0, 3))]
        return
    elif kind == 6:
        tensor.data_type = r.randrange(30)
        return
    else:
        array = np.array(["a", "b"], dtype=object) if r.random() < 0.3 else np.resize(array, (r.randint(1, 5),))
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def _wire(model: onnx.ModelProto, r: Random) -> None:
    graph = model.graph
    names = [n for node in graph.node for n in (*node.input, *node.output)] + [t.name for t in graph.initializer]
    if not graph.node or not names:
        return
    node = r.choice(graph.node)
    kind = r.randrange(6)
    if kind == 0 and node.input:
        node.input[r.randrange(len(node.input))] = r.choice([*names, "", "nowhere"])
    elif kind == 1 and node.input:
        del node.input[r.randrange(len(node.input)) :]
    elif kind == 2:
        node.input.append(r.choice([*names, ""]))
    elif kind == 3 and node.output:
        node.output[0] = r.choice([*names, ""])
    elif kind == 4 and graph.output:
        graph.output[0].name = r.choice([*names, "x", "nowhere"])
    else:
        node.output.append(r.choice([*names, "", "more"]))


def _shape(model: onnx.ModelProto, r: Random) -> None:
    if not model.graph.input:
        return
    kind = r.randrange(5)
    value = r.choice(model.graph.input)
    dims = value.type.tensor_type.shape.dim
    if kind == 0:
        value.type.tensor_type.ClearField("shape")
    elif kind == 1 and dims:
        r.choice(dims).dim_value = r.choice(LIMITS)
    elif kind == 2:
        value.type.tensor_type.elem_type = r.randrange(20)
    elif kind == 3 and dims:
        del dims[r.randrange(len(dims))]
    else:
        model.graph.input.add().CopyFrom(value)


def _file(model: onnx.ModelProto, r: Random) -> None:
    kind = r.randrange(5)
    if kind == 0 and model.opset_import:
        model.opset_import[0].version = r.choice((0, 6, 7, 9, 11, 13, 18, 21, 99, -1))
    elif kind == 1:
        model.ir_version = r.choice(LIMITS)
    elif kind == 2:
        del model.graph.output[:]
    elif kind == 3:
        model.graph.output.add().CopyFrom(model.graph.input[0] if model.graph.input else onnx.ValueInfoProto(name="q"))
    else:
        model.graph.name = r.choice(TEXTS)
