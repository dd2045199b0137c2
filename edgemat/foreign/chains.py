"""Element-wise float operators between two quantisers, as one function of one number.

A chain keeps the file's own nodes, in the file's operator set, and is evaluated by onnxruntime: it computes what the
file computes, to the last bit of float32. Constants that differ by channel are laid along axis 1 of ``[K, C]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgemat.errors import LoweringError

ORIGIN = "origin"
"""Among a step's inputs: the number the chain began with, as in ``x * sigmoid(x)``."""

Sign = Callable[["Step"], np.ndarray]


@dataclass(frozen=True)
class Step:
    """One node: its operator, attributes and inputs; None among the inputs is where the number comes in.

    Attributes:
        node: Name of the node in the file.
        op_type: Standard operator.
        attributes: Its attributes.
        inputs: Constants, each a scalar () or [C]; None marks the variable, `ORIGIN` what the chain began with, "" an
            absent input.
    """

    node: str
    op_type: str
    attributes: dict[str, Any]
    inputs: tuple[np.ndarray | str | None, ...]

    @property
    def position(self) -> int:
        """Which input is the variable."""
        return next(i for i, v in enumerate(self.inputs) if v is None)

    def constant(self, index: int, default: float | None = None) -> np.ndarray:
        """A constant input as float64, or the default where the node leaves it out."""
        value = self.inputs[index] if index < len(self.inputs) else ""
        if value is None or isinstance(value, str):
            return np.asarray(np.nan if default is None else default, np.float64)
        return np.asarray(value, np.float64)

    @property
    def channels(self) -> int:
        """Length of its longest constant, 1 where all are scalars."""
        return max([1, *(v.size for v in self.inputs if isinstance(v, np.ndarray))])

    def sign(self) -> np.ndarray:
        """1 where the step is non-decreasing, -1 where it is non-increasing, 0 where neither is known: () or [C]."""
        own = any(isinstance(value, str) and value == ORIGIN for value in self.inputs)
        rule = None if own else MONOTONE.get(self.op_type)
        return np.zeros((), np.int64) if rule is None else np.asarray(rule(self)).astype(np.int64)


def _always(step: Step) -> np.ndarray:
    return np.ones(())


def _product(step: Step) -> np.ndarray:
    return np.sign(step.constant(1 - step.position))


def _quotient(step: Step) -> np.ndarray:
    return np.sign(step.constant(1)) if step.position == 0 else np.zeros(())


def _difference(step: Step) -> np.ndarray:
    return np.asarray(1 if step.position == 0 else -1)


def _slope(step: Step) -> np.ndarray:
    return np.where(step.constant(1) >= 0, 1, 0)


def _alpha(default: float) -> Sign:
    return lambda step: np.asarray(int(float(step.attributes.get("alpha", default)) >= 0))


def _scaled(step: Step) -> np.ndarray:
    return np.sign(step.constant(1))


def _to_number(step: Step) -> np.ndarray:
    kept = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT32, TensorProto.INT64)
    return np.asarray(int(step.attributes["to"] in kept))


MONOTONE: dict[str, Sign] = {
    **dict.fromkeys(("Relu", "Clip", "Floor", "Ceil", "Round", "Identity", "Add", "Max", "Min", "Sign"), _always),
    "Sub": _difference,
    "Mul": _product,
    "Div": _quotient,
    "Neg": lambda step: np.asarray(-1),
    "PRelu": _slope,
    "LeakyRelu": _alpha(0.01),
    "BatchNormalization": _scaled,
    "Cast": _to_number,
    "HardSigmoid": _alpha(0.2),
}
"""Operators whose float32 form is monotone because every rounding of it is. Sigmoid and Tanh are not among them: their
implementations are approximations, whose neighbouring values nobody orders."""

CURVES: tuple[str, ...] = (
    "Sigmoid",
    "Tanh",
    "HardSwish",
    "Elu",
    "Selu",
    "Celu",
    "Softplus",
    "Softsign",
    "Erf",
    "Exp",
    "Log",
    "Sqrt",
)
CURVES += ("Pow", "Reciprocal", "Abs", "Gelu", "Mish", "ThresholdedRelu", "Swish")
ELEMENTWISE = (*MONOTONE, *CURVES)


@dataclass(frozen=True)
class Chain:
    """Steps in the order in which they are applied.

    Attributes:
        steps: The steps.
        opset: Version of the standard operators.
    """

    steps: tuple[Step, ...] = ()
    opset: int = field(default=20, compare=False)

    def __bool__(self) -> bool:
        return bool(self.steps)

    def then(self, step: Step, opset: int) -> Chain:
        """This chain and one step more."""
        return Chain((*self.steps, step), opset)

    @property
    def channels(self) -> int:
        """Channels its constants tell apart; 1 where none do."""
        return max([1, *(step.channels for step in self.steps)])

    def sign(self, channels: int) -> np.ndarray:
        """1, -1 or 0 (unknown) for each of the channels."""
        sign = np.ones(channels, np.int64)
        for step in self.steps:
            sign = sign * np.broadcast_to(step.sign(), (channels,))
        return sign

    def evaluate(self, values: np.ndarray) -> np.ndarray:
        """The chain at ``values[K, C]`` (float32), by onnxruntime; float32 [K, C].

        Raises:
            LoweringError: if onnxruntime cannot run one of its nodes.
        """
        if not self.steps:
            return values
        return np.asarray(self._session.run(None, {"x": np.ascontiguousarray(values, np.float32)})[0])

    @cached_property
    def _session(self) -> Any:
        from edgemat.foreign.runtime import open_session

        nodes, constants, current = [], [], "x"
        for index, step in enumerate(self.steps):
            names = []
            for place, value in enumerate(step.inputs):
                if value is None or isinstance(value, str):
                    names.append(current if value is None else "x" if value == ORIGIN else "")
                    continue
                name = f"c{index}_{place}"
                flat = value.reshape(-1)
                vector = step.op_type == "BatchNormalization"
                shaped = flat if vector else flat.reshape(()) if flat.size == 1 else flat.reshape(1, -1)
                constants.append(numpy_helper.from_array(np.asarray(shaped, order="C"), name))
                names.append(name)
            current, before = f"v{index}", names
            nodes.append(helper.make_node(step.op_type, before, [current], **step.attributes))
        nodes.append(helper.make_node("Cast", [current], ["y"], to=TensorProto.FLOAT))
        ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["K", "C"]) for n in ("x", "y")]
        graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], constants)
        model = helper.make_model(graph, opset_imports=[onnx.OperatorSetIdProto(version=self.opset)], ir_version=8)
        try:
            return open_session(model.SerializeToString())
        except Exception as error:
            listed = ", ".join(step.node for step in self.steps)
            first = (str(error).splitlines() or [""])[0][:200]
            raise LoweringError(f"onnxruntime cannot run the nodes {listed}: {first}; mend the file") from error
