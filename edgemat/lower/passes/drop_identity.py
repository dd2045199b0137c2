"""Removes what changes nothing: Requantize into the format a value has, reshapes, slices and transposes that keep all.

A Requantize to the same grid whose target holds every proved code is the identity on codes, but it also declares a
format: it goes only where the declared format (width, sign, binary point) is the one the value has.
"""

from __future__ import annotations

import onnx_ir as ir

from edgemat.lower.passes.surgery import is_op, replace_value
from edgemat.lower.typing import type_of


class DropIdentity(ir.passes.InPlacePass):
    """Requires every value typed."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Drops identities; types stay as they are."""
        modified = False
        for node in list(model.graph):
            if not any(is_op(node, op_type) for op_type in ("Requantize", "Reshape", "Transpose", "Slice")):
                continue
            source = node.inputs[0]
            assert source is not None
            before, after = type_of(source), type_of(node.outputs[0])
            if before is None or after is None or before.shape != after.shape:
                continue
            if is_op(node, "Slice") and set(node.attributes["steps"].value) != {1}:
                continue
            if is_op(node, "Transpose") and list(node.attributes["perm"].value) != list(
                range(len(before.sample_shape))
            ):
                continue
            if before.format.layout != after.format.layout:
                continue
            if (before.lo, before.hi) != (after.lo, after.hi):
                continue
            if source.is_graph_input() or node.outputs[0].is_graph_output():
                continue
            replace_value(model.graph, node.outputs[0], source)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)
