"""A good lowered file, and what happens when something in it is changed."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable

import onnx
import onnx_ir as ir
import pytest

from edgemat.errors import EdgematError
from edgemat.lower.reader import read_bytes
from tests.core.graphs import residual

DATA = ir.to_proto(residual().finished()).SerializeToString(deterministic=True)


def proto() -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.ParseFromString(DATA)
    return made


def sentence(error: EdgematError) -> str:
    """The message is one line of readable length."""
    text = str(error)
    assert text and "\n" not in text and len(text) < 2000
    return text


def refused(change: Callable[[onnx.ModelProto], object], *words: str) -> str:
    """Applies a change to a good file; reading it must fail at once, without memory, with these words."""
    made = proto()
    change(made)
    data = made.SerializeToString()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with pytest.raises(EdgematError) as caught:
        read_bytes(data)
    assert time.perf_counter() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300_000, "kilobytes"
    text = sentence(caught.value)
    for word in words:
        assert re.search(word, text), text
    return text


def node(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == op)


def attr(model: onnx.ModelProto, op: str, name: str) -> onnx.AttributeProto:
    return next(a for a in node(model, op).attribute if a.name == name)


def function(model: onnx.ModelProto, name: str) -> onnx.FunctionProto:
    return next(f for f in model.functions if f.name == name)
