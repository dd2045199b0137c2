"""Small lowered models built node by node, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgemat.formats import Fixed
from edgemat.lower.importer import Importer
from edgemat.lower.passes import simplify
from edgemat.lower.writer import finish, write
from edgemat.op import code_dtype


class Sketch:
    """Adds typed nodes to a model; `model` is what the passes get, `finished` what is written."""

    def __init__(self, name: str = "sketch") -> None:
        self.imp = Importer(name)

    def input(self, name: str, shape: tuple[int, ...], fmt: str = "fixed<8,3,RND,SAT>") -> ir.Value:
        """A float input and its quantiser."""
        kind = ir.TensorType(ir.DataType.FLOAT)
        source = ir.Value(name=name, type=kind, shape=ir.Shape(["batch", *shape]))
        self.imp.input(source)
        return self.add("Quantize", [self.imp.mapped(source)], f"{name}_quantizer", y_format=fmt)

    def add(self, op: str, inputs: list[ir.Value], name: str, **attrs: Any) -> ir.Value:
        """A node."""
        return self.imp.add(op, inputs, attrs, name)

    def codes(self, values: Any, fmt: str, name: str) -> ir.Value:
        """An initializer with the codes of a constant."""
        return self.imp.initializer(np.asarray(values, np.int64), code_dtype(Fixed.parse(fmt)), name)

    def linear(self, x: ir.Value, w: Any, name: str, fmt: str = "fixed<6,1,RND,SAT>", **attrs: Any) -> ir.Value:
        """A Linear node with weight codes `w`."""
        return self.add("Linear", [x, self.codes(w, fmt, f"{name}.weight")], name, w_format=fmt, **attrs)

    def conv(self, x: ir.Value, w: Any, name: str, fmt: str = "fixed<6,1,RND,SAT>") -> ir.Value:
        """A 3x3 convolution that keeps the size."""
        weight = self.codes(w, fmt, f"{name}.weight")
        geometry = {"strides": (1, 1), "pads": (1, 1, 1, 1), "dilations": (1, 1), "groups": 1}
        return self.add("Conv", [x, weight], name, w_format=fmt, **geometry)

    def requantize(self, x: ir.Value, fmt: str, name: str) -> ir.Value:
        """A Requantize node."""
        return self.add("Requantize", [x], name, requantize=fmt)

    def output(self, value: ir.Value, name: str) -> None:
        """Closes a graph output."""
        source = ir.Value(name=name)
        self.imp.alias(source, value)
        self.imp.output(source, name)

    def model(self) -> ir.Model:
        """The model as the passes get it."""
        return ir.Model(self.imp.graph, ir_version=10)

    def finished(self, passes: bool = True) -> ir.Model:
        """The model as it is written."""
        model = self.model()
        if passes:
            simplify(model)
        finish(model)
        return model

    def write(self, path: Path, passes: bool = True) -> Path:
        """Writes the finished model."""
        write(self.finished(passes), path)
        return path


def weights(shape: tuple[int, ...], seed: int = 0, bound: int = 31) -> np.ndarray:
    """Random codes of both signs."""
    return np.random.default_rng(seed).integers(-bound, bound, shape, np.int64, endpoint=True)


def residual() -> Sketch:
    """Conv, ReLU, Requantize, a shortcut, MaxPool, Reshape and Linear: most of what passes can change."""
    made = Sketch("residual")
    x = made.input("x", (2, 6, 6))
    stem = made.requantize(
        made.add("Relu", [made.conv(x, weights((4, 2, 3, 3)), "conv1")], "relu1"), "ufixed<6,4>", "rq1"
    )
    body = made.requantize(made.conv(stem, weights((4, 4, 3, 3), 1), "conv2"), "fixed<6,5,RND,SAT>", "rq2")
    both = made.requantize(made.add("Add", [stem, body], "add"), "fixed<7,5,RND,SAT>", "rq3")
    pooled = made.add(
        "MaxPool", [both], "pool", kernel_shape=(2, 2), strides=(2, 2), pads=(0, 0, 0, 0), dilations=(1, 1), ceil_mode=0
    )
    flat = made.add("Reshape", [pooled], "flatten", shape=(36,))
    made.output(made.linear(flat, weights((3, 36), 2), "fc"), "y")
    return made
