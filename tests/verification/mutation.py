"""Mutants of a lowered graph: one weight, one shift or one rounding mode changed, and written out again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from edgemat.formats import Fixed
from edgemat.lower.graph import Graph
from edgemat.lower.reader import read_bytes
from edgemat.lower.writer import finish
from edgemat.sim.session import copy

KINDS = ("weight", "shift", "rounding", "bias", "overflow")


def mutant(graph: Graph, kind: str) -> Graph:
    """The graph with one small change; everything else, the statements in the file included, follows from it."""
    model = copy(graph.model)
    nodes = [n for n in model.graph if n.op_type in ("Conv", "Linear")]
    last = nodes[-1]
    if kind in ("weight", "bias"):
        value = last.inputs[1 if kind == "weight" else 2]
        assert value is not None and value.const_value is not None
        codes = np.array(value.const_value.numpy())
        at = np.unravel_index(int(np.abs(codes.astype(np.int64)).argmin()), codes.shape)
        codes[at] += 1 if kind == "weight" else 1 << 6
        value.const_value = ir.tensor(codes, name=value.name)
    else:
        fmt = Fixed.parse(last.attributes["requantize"].value)
        if kind == "shift":
            assert isinstance(fmt.int_bits, int)
            fmt = replace(fmt, int_bits=fmt.int_bits + 1)
        elif kind == "rounding":
            fmt = replace(fmt, rounding="RND_CONV")
        else:
            fmt = replace(fmt, overflow="WRAP", width=fmt.width)
        last.attributes["requantize"] = ir.AttrString("requantize", str(fmt))
    for value in model.graph.inputs:
        value.shape = ir.Shape(["batch", *list(value.shape or [])[1:]])
    finish(model)
    return read_bytes(ir.serde.serialize_model(model).SerializeToString())
