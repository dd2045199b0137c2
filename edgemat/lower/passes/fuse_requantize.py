"""Writes a Requantize into the operator before it, where it is that operator's only reader."""

from __future__ import annotations

import onnx_ir as ir

from edgemat.formats import Fixed
from edgemat.lower.passes.surgery import is_op
from edgemat.lower.typing import type_node
from edgemat.ops import BY_NAME


class FuseRequantize(ir.passes.InPlacePass):
    """Requires every value typed; the fused node takes over the Requantize's output."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuses in graph order."""
        modified = False
        for node in list(model.graph):
            if not is_op(node, "Requantize"):
                continue
            source = node.inputs[0]
            producer = source.producer() if source is not None else None
            if source is None or producer is None or len(list(source.uses())) != 1 or source.is_graph_output():
                continue
            fused = producer.attributes.get("requantize")
            if not BY_NAME[producer.op_type].has_epilogue or (fused is not None and fused.value):
                continue
            target = Fixed.parse(node.attributes["requantize"].value)
            if not BY_NAME[producer.op_type].fuses(type_node(producer), target):
                continue
            producer.attributes["requantize"] = node.attributes["requantize"]
            result = node.outputs[0]
            name = result.name
            for user, index in list(result.uses()):
                user.replace_input_with(index, source)
            for index, value in enumerate(model.graph.outputs):
                if value is result:
                    model.graph.outputs[index] = source
            model.graph.remove(node, safe=True)
            source.name = name
            type_node(producer)
            modified = True
        return ir.passes.PassResult(model, modified=modified)
