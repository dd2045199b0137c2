"""Removes nodes and initializers nothing reads."""

from __future__ import annotations

import onnx_ir as ir

from edgemat.lower.passes.surgery import is_op


class DropDead(ir.passes.InPlacePass):
    """Graph inputs and outputs stay, and what makes states of them: they are the file's interface."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Walks backwards once."""
        modified = False
        for node in reversed(list(model.graph)):
            kept = is_op(node, "State") or is_op(node, "NextState")
            if kept or any(value.is_graph_output() or value.uses() for value in node.outputs):
                continue
            model.graph.remove(node, safe=True)
            modified = True
        for name, value in list(model.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del model.graph.initializers[name]
                modified = True
        return ir.passes.PassResult(model, modified=modified)
