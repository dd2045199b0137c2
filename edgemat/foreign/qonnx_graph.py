"""A QONNX graph under construction: float32 tensors, standard operators, and Quant where values become coarser.

Every constant is an initializer behind a quantiser of its own, as Brevitas writes weights: readers take a constant's
type from there. Scales are powers of two, so that ``x / scale`` and ``q * scale`` are exact.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

DOMAIN = "qonnx.custom_op.general"
OPSET = 13
IR_VERSION = 8
EXACT = 1 << 24
"""Integers of smaller magnitude, times a power of two, are float32 numbers, and so is each sum that stays below."""


class QonnxGraph:
    """Nodes, initializers and value types in the order in which they are added.

    Attributes:
        batch: Samples that one run of the graph takes.
    """

    def __init__(self, batch: int, reserved: Sequence[str]) -> None:
        self.batch = batch
        self._taken = set(reserved)
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._types: list[onnx.ValueInfoProto] = []

    def name(self, wanted: str) -> str:
        """A name of letters, digits and underscores that no value or node of the graph has."""
        plain = re.sub(r"[^0-9A-Za-z]+", "_", wanted).strip("_") or "value"
        plain = plain if plain[0].isalpha() else f"n_{plain}"
        found, count = plain, 1
        while found in self._taken:
            found, count = f"{plain}_{count}", count + 1
        self._taken.add(found)
        return found

    def shape(self, shape: Sequence[int | None]) -> list[int]:
        """A tensor's dimensions with the batch filled in."""
        return [self.batch if extent is None else int(extent) for extent in shape]

    def initializer(self, values: np.ndarray, name: str) -> str:
        """Stores an array as it is; returns its name."""
        name = self.name(name)
        self._initializers.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(
        self,
        op_type: str,
        inputs: Sequence[str],
        shape: Sequence[int | None],
        name: str,
        dtype: int = TensorProto.FLOAT,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Adds a node of one output; returns the output's name."""
        name = self.name(name)
        output = self.name(f"{name}_out")
        self._nodes.append(helper.make_node(op_type, list(inputs), [output], name, domain=domain, **attributes))
        self._types.append(helper.make_tensor_value_info(output, dtype, self.shape(shape)))
        return output

    def quant(
        self,
        x: str,
        shape: Sequence[int | None],
        scale: np.ndarray | float,
        bits: int,
        signed: bool,
        narrow: bool,
        mode: str,
        name: str,
    ) -> str:
        """``Quant(x)``: saturate ``x / scale`` at the rails of `bits` bits, round by `mode`, times ``scale``.

        Args:
            x: Name of the input.
            shape: Its dimensions.
            scale: Powers of two, a scalar or an array that broadcasts against the input.
            bits: Bits of an integer.
            signed: Whether the integers are two's complement.
            narrow: Whether the lowest of those is left out.
            mode: A rounding mode of QONNX.
            name: Name of the node, or one like it.
        """
        name = self.name(name)
        scales = self.initializer(np.asarray(scale, np.float32), f"{name}_scale")
        zero = self.initializer(np.array(0.0, np.float32), f"{name}_zeropt")
        width = self.initializer(np.array(float(bits), np.float32), f"{name}_bitwidth")
        attributes: dict[str, Any] = {"signed": int(signed), "narrow": int(narrow), "rounding_mode": mode}
        self._taken.discard(name)
        return self.node("Quant", [x, scales, zero, width], shape, name, domain=DOMAIN, **attributes)

    def bipolar_quant(self, x: str, shape: Sequence[int | None], name: str) -> str:
        """``BipolarQuant(x)``: +1 where x >= 0, else -1."""
        name = self.name(name)
        scale = self.initializer(np.array(1.0, np.float32), f"{name}_scale")
        self._taken.discard(name)
        return self.node("BipolarQuant", [x, scale], shape, name, domain=DOMAIN)

    def constant(self, values: np.ndarray, name: str) -> str:
        """float64 values that are multiples of one power of two, behind the narrowest Quant that holds them."""
        scale = finest_power(values)
        codes = np.asarray(values, np.float64) / scale
        bits = max(2, *(int(abs(c)).bit_length() + 1 for c in (codes.min(), codes.max())))
        stored = self.initializer(np.asarray(values, np.float32), f"{name}_param")
        return self.quant(stored, np.shape(values), scale, bits, True, False, "ROUND", f"{name}_quant")

    def finish(
        self,
        inputs: Mapping[str, Sequence[int | None]],
        outputs: Mapping[str, tuple[str, Sequence[int | None]]],
        title: str,
    ) -> onnx.ModelProto:
        """The model.

        Args:
            inputs: Shapes by input name.
            outputs: The tensor that each output is, and its shape, by output name. The node that makes the tensor gets
                the output's name; where two outputs are one tensor, the others are an Identity of it.
            title: Name of the graph.
        """
        given: dict[str, str] = {}
        for output, (tensor, _) in outputs.items():
            if tensor in given or tensor in inputs:
                source = given.get(tensor, tensor)
                self._nodes.append(helper.make_node("Identity", [source], [output], self.name(f"{output}_copy")))
                continue
            given[tensor] = output
        for node in self._nodes:
            for index, name in enumerate(node.input):
                node.input[index] = given.get(name, name)
            for index, name in enumerate(node.output):
                node.output[index] = given.get(name, name)
        single = TensorProto.FLOAT
        graph = helper.make_graph(
            self._nodes,
            title,
            [helper.make_tensor_value_info(name, single, self.shape(shape)) for name, shape in inputs.items()],
            [helper.make_tensor_value_info(name, single, self.shape(shape)) for name, (_, shape) in outputs.items()],
            self._initializers,
            value_info=[info for info in self._types if info.name not in given],
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
        return helper.make_model(graph, ir_version=IR_VERSION, opset_imports=opsets, producer_name="edgemat")


def finest_power(values: np.ndarray) -> float:
    """The largest power of two that divides all of the values; 1 where all are 0."""
    mantissas, exponents = np.frexp(np.asarray(values, np.float64).ravel())
    integers = np.ldexp(mantissas, 53).astype(np.int64)
    live = integers != 0
    if not live.any():
        return 1.0
    trailing = np.log2((integers & -integers)[live]).astype(np.int64)
    return float(np.ldexp(1.0, int((exponents[live] - 53 + trailing).min())))
