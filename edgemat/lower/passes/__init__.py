"""Passes over graphs of edgemat nodes, each in a file of its own, in the order `simplify` runs them."""

from __future__ import annotations

import onnx_ir as ir

from edgemat.lower.passes.absorb_relu import AbsorbRelu
from edgemat.lower.passes.align_operands import AlignOperands
from edgemat.lower.passes.drop_dead import DropDead
from edgemat.lower.passes.drop_identity import DropIdentity
from edgemat.lower.passes.fuse_requantize import FuseRequantize
from edgemat.lower.passes.merge_reshapes import MergeReshapes

PASSES = (AlignOperands, MergeReshapes, DropIdentity, AbsorbRelu, FuseRequantize, DropDead)


def simplify(model: ir.Model) -> None:
    """Aligns operands, then brings the graph to its canonical form."""
    for make in PASSES:
        make()(model)
