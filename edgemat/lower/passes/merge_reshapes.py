"""A Reshape that reads a Reshape reads what that one reads: only the last shape counts."""

from __future__ import annotations

import onnx_ir as ir

from edgemat.lower.passes.surgery import is_op
from edgemat.lower.typing import type_node, type_of


class MergeReshapes(ir.passes.InPlacePass):
    """Requires every value typed; per-channel values are left alone (their points follow the first shape)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewires in graph order; the bypassed nodes die in DropDead."""
        modified = False
        for node in model.graph:
            source = node.inputs[0] if is_op(node, "Reshape") else None
            producer = source.producer() if source is not None else None
            if producer is None or not is_op(producer, "Reshape") or producer.inputs[0] is None:
                continue
            tensor = type_of(producer.inputs[0])
            if tensor is None or tensor.format.per_channel:
                continue
            node.replace_input_with(0, producer.inputs[0])
            type_node(node)
            modified = True
        return ir.passes.PassResult(model, modified=modified)
