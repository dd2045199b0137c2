"""A ReLU whose only reader is a Requantize to an unsigned SAT format is that Requantize alone.

    Requantize_u,SAT(max(x, 0)) = Requantize_u,SAT(x)

because rounding is monotone and keeps 0, and saturation sends everything below 0 to 0.
"""

from __future__ import annotations

import onnx_ir as ir

from edgemat.formats import Fixed
from edgemat.lower.passes.surgery import is_op
from edgemat.lower.typing import type_node


class AbsorbRelu(ir.passes.InPlacePass):
    """Requires every value typed."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Bypasses each ReLU of that kind."""
        modified = False
        for node in list(model.graph):
            if not is_op(node, "Relu") or node.outputs[0].is_graph_output():
                continue
            users = list(node.outputs[0].uses())
            if not users or not all(is_op(user, "Requantize") and _clamps(user) for user, _ in users):
                continue
            for user, index in users:
                user.replace_input_with(index, node.inputs[0])
                type_node(user)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _clamps(node: ir.Node) -> bool:
    fmt = Fixed.parse(node.attributes["requantize"].value)
    return not fmt.signed and fmt.overflow in ("SAT", "SAT_SYM")
