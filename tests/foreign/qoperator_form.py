"""A QDQ file in onnxruntime's QOperator form: every group replaced by the integer kernel it stands for."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

MICROSOFT = "com.microsoft"


def qoperator_form(path: str, outputs: bool = True) -> onnx.ModelProto:
    """ResNet8 of MLPerf Tiny (or a file of the same operators) with integer nodes only.

    Args:
        path: The QDQ file; it ends in DequantizeLinear and Softmax.
        outputs: Whether the codes of every integer node are outputs, too.
    """
    model = onnx.load(path)
    graph = model.graph
    by_output = {name: node for node in graph.node for name in node.output}
    made: list[onnx.NodeProto] = []
    for node in graph.node:
        source = by_output.get(node.input[0])
        if node.op_type == "Transpose" or (node.op_type == "QuantizeLinear" and source.op_type == "Transpose"):
            made.append(node)
        elif node.op_type == "QuantizeLinear":
            made += _kernel(by_output, source, node)
    last = next(node for node in graph.node if node.op_type == "Softmax")
    made.append(by_output[last.input[0]])
    ends = [helper.make_tensor_value_info(last.input[0], TensorProto.FLOAT, None)]
    if outputs:
        codes = [name for node in made[:-1] if node.op_type.startswith("Q") for name in node.output]
        ends += [helper.make_tensor_value_info(name, TensorProto.INT8, None) for name in codes]
    del graph.node[:], graph.output[:]
    graph.node.extend(made)
    graph.output.extend(ends)
    model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return model


def _kernel(
    by_output: dict[str, onnx.NodeProto], node: onnx.NodeProto, quantiser: onnx.NodeProto
) -> list[onnx.NodeProto]:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name != "beta"}
    ends, output = list(quantiser.input[1:3]), [quantiser.output[0]]
    stored = [list(by_output[name].input) for name in node.input]
    if node.op_type == "Conv":
        inputs = [*stored[0], *stored[1], *ends, stored[2][0]]
        return [helper.make_node("QLinearConv", inputs, output, **attributes)]
    if node.op_type == "Gemm":
        reshape = by_output[node.input[0]]
        x = list(by_output[reshape.input[0]].input)
        flat = helper.make_node("Reshape", [x[0], reshape.input[1]], ["flat"])
        inputs = ["flat", *x[1:], *stored[1], stored[2][0], *ends]
        return [flat, helper.make_node("QGemm", inputs, output, domain=MICROSOFT, **attributes)]
    inputs = [name for given in stored for name in given] + ends
    return [helper.make_node(f"QLinear{node.op_type}", inputs, output, domain=MICROSOFT, **attributes)]
