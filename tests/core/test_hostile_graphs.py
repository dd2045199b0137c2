"""Cycles, foreign operators, shapes nobody has memory for, files elsewhere: one sentence, quickly, without memory."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgemat.errors import EdgematError
from edgemat.lower.reader import read_bytes
from tests.core.graphs import Sketch
from tests.core.tampering import attr, function, node, refused


def test_a_cycle() -> None:
    refused(lambda m: node(m, "Conv").input.__setitem__(0, m.graph.node[3].output[0]), "cycle|before it is computed")
    refused(lambda m: node(m, "Add").input.__setitem__(0, node(m, "Add").output[0]), "cycle|before")


def test_nodes_out_of_order_and_missing_values() -> None:
    def backwards(m: onnx.ModelProto) -> None:
        nodes = list(m.graph.node)[::-1]
        m.graph.ClearField("node")
        m.graph.node.extend(nodes)

    refused(backwards)
    refused(lambda m: node(m, "Conv").input.__setitem__(0, "nowhere"))
    refused(lambda m: node(m, "Conv").input.__setitem__(1, ""), "missing")
    refused(lambda m: node(m, "Conv").input.append(""), "inputs|missing")
    refused(lambda m: node(m, "Add").output.append("more"), "outputs")


def test_names_that_are_not_unique() -> None:
    refused(lambda m: node(m, "Add").output.__setitem__(0, node(m, "Conv").output[0]), "more than once")
    refused(lambda m: m.graph.initializer.add().CopyFrom(m.graph.initializer[0]), "more than once")
    refused(lambda m: node(m, "Add").output.__setitem__(0, ""), "without a name")


def test_inputs_and_outputs() -> None:
    refused(lambda m: m.graph.ClearField("input"))
    refused(lambda m: m.graph.ClearField("output"), "no output")
    refused(lambda m: setattr(m.graph.output[0], "name", node(m, "Add").output[0]), "Dequantize")
    refused(lambda m: m.graph.output.add().CopyFrom(onnx.helper.make_tensor_value_info("zz", 1, [1])))
    extra = onnx.helper.make_tensor_value_info("unused", 1, ["batch", 3])
    refused(lambda m: m.graph.input.add().CopyFrom(extra), "unused", "0 quantisers")
    refused(lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", onnx.TensorProto.DOUBLE), "float32")


@pytest.mark.parametrize("extent", [1 << 40, 0, -1, 1 << 31])
def test_shapes_nobody_has_memory_for(extent: int) -> None:
    def change(m: onnx.ModelProto) -> None:
        m.graph.input[0].type.tensor_type.shape.dim[2].dim_value = extent

    refused(change)


def test_shapes_whose_product_is_too_large() -> None:
    def change(m: onnx.ModelProto) -> None:
        for dim in list(m.graph.input[0].type.tensor_type.shape.dim)[1:]:
            dim.dim_value = 1 << 20

    refused(change, "elements")


def test_outputs_nobody_has_memory_for() -> None:
    """Padding, kernels and shapes of 2**40 are refused before an array is made."""
    refused(lambda m: attr(m, "Conv", "pads").ints.__setitem__(0, 1 << 40))
    refused(lambda m: attr(m, "MaxPool", "kernel_shape").ints.__setitem__(0, 1 << 40))
    refused(lambda m: attr(m, "MaxPool", "strides").ints.__setitem__(0, 1 << 62))
    refused(lambda m: attr(m, "Conv", "dilations").ints.__setitem__(0, 1 << 40))
    refused(lambda m: attr(m, "Reshape", "shape").ints.__setitem__(0, 1 << 40))
    refused(lambda m: attr(m, "Reshape", "shape").ints.extend([1 << 40, 1 << 40]))


def test_the_largest_shapes_cost_no_memory() -> None:
    """64 million elements a sample are legal; typing them and building the bodies allocates nothing of that size."""
    made = Sketch("large")
    pool = {"kernel_shape": (3, 3), "strides": (1, 1), "pads": (1, 1, 1, 1), "ceil_mode": 0, "count_include_pad": 0}
    x = made.input("x", (1, 8000, 8000))
    made.output(made.add("AveragePool", [x], "pool", requantize="fixed<8,3,RND,SAT>", **pool), "y")
    data = ir.to_proto(made.finished()).SerializeToString()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(read_bytes(data).nodes) == 1 and len(data) < 200_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000, "kilobytes"


def test_initializers_nobody_has_memory_for() -> None:
    def huge(m: onnx.ModelProto) -> None:
        m.graph.initializer[0].dims[:] = [1 << 20, 1 << 20]

    refused(huge, "shape")
    refused(lambda m: m.graph.initializer[0].dims.__setitem__(0, 0), "shape")
    refused(lambda m: m.graph.initializer[0].dims.__setitem__(0, -4))
    refused(lambda m: m.graph.initializer[0].dims.__setitem__(0, 3))
    refused(lambda m: setattr(m.graph.initializer[0], "raw_data", b""))
    refused(lambda m: setattr(m.graph.initializer[0], "data_type", onnx.TensorProto.FLOAT))
    refused(lambda m: setattr(m.graph.initializer[0], "data_type", 99))


@pytest.mark.parametrize("location", ["/etc/passwd", "../secret.bin", "weights.bin"])
def test_external_data_is_not_opened(location: str, tmp_path: Path) -> None:
    """Lowered files carry their weights themselves, so no path in them is ever followed."""

    def change(m: onnx.ModelProto) -> None:
        tensor = m.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    refused(change, "outside the file")

    def inside(m: onnx.ModelProto) -> None:
        tensor = next(n for n in function(m, "Add").node if n.op_type == "Constant").attribute[0].t
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    refused(inside)

    def attribute(m: onnx.ModelProto) -> None:
        tensor = onnx.TensorProto(name="t", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=location)
        node(m, "Add").attribute.append(onnx.helper.make_attribute("extra", tensor))

    refused(attribute)


def test_foreign_operators() -> None:
    refused(lambda m: setattr(node(m, "Add"), "op_type", "Exec"), "Exec", "edgemat ops")
    refused(lambda m: setattr(node(m, "Add"), "domain", "com.evil"), "com.evil::Add")
    refused(lambda m: setattr(node(m, "Add"), "domain", ""), "Add")


def test_subgraphs_sparse_weights_and_training() -> None:
    graph = onnx.helper.make_graph([], "inner", [], [])
    refused(lambda m: node(m, "Add").attribute.append(onnx.helper.make_attribute("body", graph)), "body")
    refused(lambda m: m.graph.sparse_initializer.add(), "sparse")
    refused(lambda m: m.training_info.add(), "training")


def test_deep_nesting_does_not_exhaust_the_stack() -> None:
    def change(m: onnx.ModelProto) -> None:
        graph = onnx.helper.make_graph([], "inner", [], [])
        for _ in range(15):
            inner = onnx.helper.make_node("If", ["c"], [], then_branch=graph)
            graph = onnx.helper.make_graph([inner], "outer", [], [])
        node(m, "Add").attribute.append(onnx.helper.make_attribute("body", graph))

    refused(change)


def test_thousands_of_nodes_are_read_in_time() -> None:
    made = Sketch("long")
    value = made.input("x", (4,))
    for i in range(1500):
        value = made.add("Relu", [value], f"relu{i}")
    made.output(value, "y")
    data = ir.to_proto(made.finished(passes=False)).SerializeToString()
    start = time.perf_counter()
    assert len(read_bytes(data).nodes) == 1500
    assert time.perf_counter() - start < 20


# -- formats that cannot hold --------------------------------------------------------------------------------------
def test_a_constant_that_does_not_fit_its_format() -> None:
    made = Sketch()
    x = made.input("x", (4,))
    codes = made.codes([[100, 2, 3, 4]], "fixed<8,3,RND,SAT>", "k")
    with pytest.raises(EdgematError, match="do not fit"):
        made.add("Literal", [codes], "literal", y_format="fixed<4,3,RND,SAT>")
    with pytest.raises(EdgematError, match="do not fit"):
        made.linear(x, [[40, 0, 0, 0]], "fc", fmt="fixed<6,1,RND,SAT>")


def test_a_bias_of_more_than_32_bits() -> None:
    made = Sketch()
    x = made.input("x", (2,))
    w = made.codes([[1, 2]], "fixed<6,1,RND,SAT>", "w")
    b = made.imp.initializer(np.array([1 << 40]), np.dtype(np.int64), "b")
    with pytest.raises(EdgematError, match="32 bits"):
        made.add("Linear", [x, w, b], "fc", w_format="fixed<6,1,RND,SAT>")


@pytest.mark.parametrize("name", ["x_formats", "y_formats", "w_format"])
def test_statements_of_megabytes_are_quoted_in_part(name: str) -> None:
    """`refused` holds the message to a readable length, which quoting the file as it is would exceed."""

    def flood(m: onnx.ModelProto) -> None:
        found = attr(m, "Conv", name)
        if found.type == onnx.AttributeProto.STRING:
            found.s = ("fixed<8,[" + ",".join(["1"] * 99_999) + ",2]>").encode()
        else:
            found.type = onnx.AttributeProto.STRINGS
            found.strings[:] = [b"x" * 3000] * 1000

    refused(flood)


def test_widths_of_weights_for_other_channels() -> None:
    def narrow(m: onnx.ModelProto) -> None:
        attr(m, "Conv", "w_format").s = b"fixed<[7,6,8],[1,1,1],RND,SAT>"

    refused(narrow, r"node '\S+' \(Conv\): 3 widths in w_format; expected 1 or \d")
