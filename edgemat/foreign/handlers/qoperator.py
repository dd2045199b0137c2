"""Nodes that hold their quantisers (onnxruntime's QOperator format): QLinearX is DequantizeLinear, X, QuantizeLinear.

Each is taken apart into those standard nodes, which their own handlers take. What onnxruntime's kernels do otherwise
than the three nodes one after the other, found by comparing them on every pair of codes:

* QLinearConv, QLinearMatMul and QGemm multiply the integer sum once by ``float32(float32(s_x * s_w) / s_y)``, round
  half to even and add the zero point: what `Compiled` does for `fused` sums;
* QLinearAdd, QLinearMul and QLinearAveragePool add the zero point before they round, so a tie goes to the even stored
  integer instead of the even code: `edgemat.foreign.handlers.qdq.STORED_TIES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from edgemat.foreign.handlers.qdq import STORED_TIES
from edgemat.foreign.quantisers import onnx_quantiser
from edgemat.foreign.signals import Gathered, Joined, Known, Quantity, Raw, Signal
from edgemat.foreign.translator import Handler, Translator

DYNAMIC = (
    "DynamicQuantizeLinear",
    "DynamicQuantizeMatMul",
    "DynamicQuantizeLSTM",
    "QAttention",
    "MatMulNBits",
    "QOrderedMatMul",
)


class Expansion:
    """Standard nodes in place of one node of the file.

    Args:
        tr: The translator.
        node: The node that is taken apart; the new ones bear its name.
    """

    def __init__(self, tr: Translator, node: ir.Node) -> None:
        self.tr, self.node = tr, node

    def value(self, quantity: Quantity) -> ir.Value:
        """A value of which so much is known."""
        made = ir.Value(name=self.tr.label(self.node))
        self.tr.values[made] = quantity
        return made

    def input(self, index: int) -> ir.Value | None:
        """An input of the node; None where it is left out."""
        quantity = self.tr.quantity(self.node, index)
        return None if quantity is None else self.value(quantity)

    def run(self, op: str, inputs: Sequence[ir.Value | None], attributes: Sequence[ir.Attr] = ()) -> ir.Value:
        """A standard node, taken at once."""
        made = ir.Node("", op, inputs, attributes, num_outputs=1, name=self.tr.label(self.node))
        self.tr.handle(made)
        return made.outputs[0]

    def dequantised(self, x: int, scale: int, zero: int, axis: int = 0) -> ir.Value:
        """The real numbers of an input; `axis` is where its scales differ."""
        return self.run(
            "DequantizeLinear", [self.input(x), self.input(scale), self.input(zero)], [ir.AttrInt64("axis", axis)]
        )

    def quantised(self, value: ir.Value, scale: int, zero: int) -> None:
        """The node's output: a real number in the node's last scale."""
        tr, node = self.tr, self.node
        quantiser = onnx_quantiser(tr.known(node, scale).array, tr.optional(node, zero))
        if node.op_type.removeprefix("QLinear") in STORED_TIES:
            quantiser = replace(quantiser, style="stored")
        quantity = tr.values[value]
        if not isinstance(quantity, (Signal, Raw, Joined, Gathered)):
            raise tr.refuse(node, "all its inputs are constants", "fold the constants of the file")
        tr.set(node, replace(tr.quantised(node, quantity, quantiser), zero=quantiser.zero_point))

    def attributes(self, *left_out: str) -> list[ir.Attr]:
        """The node's attributes, without some."""
        return [attr for key, attr in self.node.attributes.items() if key not in left_out]

    def channels_first(self, value: ir.Value, back: bool = False) -> ir.Value:
        """The value with its channels on axis 1, if the node keeps them last; or the other way round."""
        quantity = self.tr.values[value]
        if not self.tr.integer(self.node, "channels_last") or not isinstance(quantity, Signal):
            return value
        rank = len(self.tr.type(quantity).shape)
        perm = [0, *range(2, rank), 1] if back else [0, rank - 1, *range(1, rank - 1)]
        return self.run("Transpose", [value], [ir.AttrInt64s("perm", perm)])


def _rank(tr: Translator, node: ir.Node, index: int) -> int:
    quantity = tr.quantity(node, index)
    return quantity.array.ndim if isinstance(quantity, Known) else 1


def _bias(ex: Expansion, index: int, *scales: int, factor: float = 1.0) -> ir.Value | None:
    """The int32 bias of a layer: on the scale of its sums, float32(s_x * s_w)."""
    stored = ex.tr.optional(ex.node, index)
    if stored is None:
        return None
    product = np.asarray(factor, np.float32)
    for scale in scales:
        product = np.asarray(product * np.asarray(ex.tr.known(ex.node, scale).array, np.float32), np.float32)
    flat = product.reshape(()) if product.size == 1 else product.reshape(-1)
    inputs = [ex.value(Known(stored.reshape(-1))), ex.value(Known(flat)), None]
    return ex.run("DequantizeLinear", inputs, [ir.AttrInt64("axis", 0)])


def qlinear_conv(tr: Translator, node: ir.Node) -> None:
    """QLinearConv: x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, int32 bias."""
    ex = Expansion(tr, node)
    inputs = [ex.channels_first(ex.dequantised(0, 1, 2)), ex.dequantised(3, 4, 5)]
    inputs += [bias] if (bias := _bias(ex, 8, 1, 4)) is not None else []
    made = ex.run("Conv", inputs, ex.attributes("channels_last"))
    ex.quantised(ex.channels_first(made, back=True), 6, 7)


def qlinear_matmul(tr: Translator, node: ir.Node) -> None:
    """QLinearMatMul: a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero."""
    ex = Expansion(tr, node)
    made = ex.run("MatMul", [ex.dequantised(0, 1, 2), ex.dequantised(3, 4, 5, axis=_rank(tr, node, 3) - 1)])
    ex.quantised(made, 6, 7)


def qgemm(tr: Translator, node: ir.Node) -> None:
    """QGemm: a, a_scale, a_zero, b, b_scale, b_zero, int32 c, y_scale, y_zero; a float output without the last two."""
    ex = Expansion(tr, node)
    axis = 0 if tr.integer(node, "transB") else 1
    inputs = [ex.dequantised(0, 1, 2), ex.dequantised(3, 4, 5, axis=axis)]
    inputs += [bias] if (bias := _bias(ex, 6, 1, 4, factor=tr.real(node, "alpha", 1.0))) is not None else []
    made = ex.run("Gemm", inputs, ex.attributes())
    if tr.quantity(node, 7) is None:
        tr.set(node, tr.values[made])
    else:
        ex.quantised(made, 7, 8)


def qlinear_binary(tr: Translator, node: ir.Node) -> None:
    """QLinearAdd and QLinearMul: a, a_scale, a_zero, b, b_scale, b_zero, c_scale, c_zero."""
    ex = Expansion(tr, node)
    ex.quantised(ex.run(node.op_type.removeprefix("QLinear"), [ex.dequantised(0, 1, 2), ex.dequantised(3, 4, 5)]), 6, 7)


def qlinear_concat(tr: Translator, node: ir.Node) -> None:
    """QLinearConcat: y_scale, y_zero, then x, x_scale, x_zero of each part: every part is quantised on its own."""
    ex = Expansion(tr, node)
    quantiser = onnx_quantiser(tr.known(node, 0).array, tr.optional(node, 1))
    parts = []
    for index in range(2, len(node.inputs), 3):
        quantity = tr.values[ex.dequantised(index, index + 1, index + 2)]
        if not isinstance(quantity, Signal):
            raise tr.refuse(node, f"input {index} is a constant", "fold the constants of the file")
        parts.append(ex.value(replace(tr.quantised(node, quantity, quantiser), zero=quantiser.zero_point)))
    tr.set(node, tr.values[ex.run("Concat", parts, ex.attributes())])


def qlinear_unary(tr: Translator, node: ir.Node) -> None:
    """QLinearSigmoid, QLinearLeakyRelu, QLinearSoftmax, QLinearReduceMean and the average pools: x, x_scale, x_zero,
    y_scale, y_zero."""
    ex = Expansion(tr, node)
    op = node.op_type.removeprefix("QLinear")
    x = ex.channels_first(ex.dequantised(0, 1, 2))
    made = ex.run(op, [x], ex.attributes("channels_last", "opset"))
    ex.quantised(ex.channels_first(made, back=True), 3, 4)


def integer_sums(tr: Translator, node: ir.Node) -> None:
    """ConvInteger and MatMulInteger: x, w, x_zero, w_zero; the int32 sums themselves."""
    ex = Expansion(tr, node)
    one = ex.value(Known(np.ones((), np.float32)))
    read = []
    for index, zero in ((0, 2), (1, 3)):
        quantity = tr.quantity(node, index)
        axis = 0 if node.op_type == "ConvInteger" else _rank(tr, node, index) - 1
        points = tr.optional(node, zero)
        scale = one
        if points is not None and points.size > 1:
            scale = ex.value(Known(np.ones(points.size, np.float32)))
        if isinstance(quantity, Signal) and quantity.zero is None:
            raise tr.refuse(node, f"input {index} is no stored integer", "expected the output of a QuantizeLinear")
        inputs = [ex.input(index), scale, ex.input(zero)]
        read.append(ex.run("DequantizeLinear", inputs, [ir.AttrInt64("axis", axis)]))
    made = ex.run(node.op_type.removesuffix("Integer"), read, ex.attributes())
    tr.set(node, tr.values[made])


def matmul_to_float(tr: Translator, node: ir.Node) -> None:
    """MatMulIntegerToFloat: a, b, a_scale, b_scale, a_zero, b_zero, float bias."""
    ex = Expansion(tr, node)
    made = ex.run("MatMul", [ex.dequantised(0, 2, 4), ex.dequantised(1, 3, 5, axis=_rank(tr, node, 1) - 1)])
    bias = ex.input(6)
    tr.set(node, tr.values[made if bias is None else ex.run("Add", [made, bias])])


def dynamic(tr: Translator, node: ir.Node) -> None:
    """Operators whose scales are found at run time.

    Raises:
        LoweringError: always.
    """
    raise tr.refuse(
        node,
        "its scales are computed from the data at run time, or its weights are unpacked to floats",
        "quantise statically: onnxruntime.quantization.quantize_static with calibration data",
    )


MICROSOFT = "com.microsoft"
HANDLERS: dict[tuple[str, str], Handler] = {
    ("", "QLinearConv"): qlinear_conv,
    (MICROSOFT, "QLinearConv"): qlinear_conv,
    ("com.ms.internal.nhwc", "QLinearConv"): qlinear_conv,
    ("", "QLinearMatMul"): qlinear_matmul,
    (MICROSOFT, "QLinearMatMul"): qlinear_matmul,
    (MICROSOFT, "QGemm"): qgemm,
    (MICROSOFT, "QLinearAdd"): qlinear_binary,
    (MICROSOFT, "QLinearMul"): qlinear_binary,
    (MICROSOFT, "QLinearConcat"): qlinear_concat,
    **{
        (MICROSOFT, f"QLinear{op}"): qlinear_unary
        for op in ("AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu", "Softmax", "ReduceMean")
    },
    ("", "ConvInteger"): integer_sums,
    ("", "MatMulInteger"): integer_sums,
    (MICROSOFT, "MatMulIntegerToFloat"): matmul_to_float,
    ("", "DynamicQuantizeLinear"): dynamic,
    **{(MICROSOFT, op): dynamic for op in DYNAMIC},
}
