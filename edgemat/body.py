"""Writes the bodies of edgemat's model-local ONNX functions.

A `Body` is a small builder over standard ONNX operators (opset `OPSET`). Values travel as `Coded`: an ONNX value and
the carrier type its integer codes are in (float32, float64 or an integer type).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgemat.formats import Fixed, channel_array

OPSET = 20
IR_VERSION = 10
DOMAIN = "edgemat"


@dataclass(frozen=True, slots=True)
class Coded:
    """An ONNX value whose elements are integers, carried in `dtype`."""

    value: ir.Value
    dtype: np.dtype


class Body:
    """Builds one function body; names are numbered in order, so equal calls give equal bytes."""

    def __init__(self) -> None:
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._count = 0

    def _fresh(self) -> str:
        self._count += 1
        return f"t{self._count}"

    def input(self, name: str) -> ir.Value:
        """Declares the next input."""
        value = ir.Value(name=name)
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value) -> None:
        """Declares the next output."""
        if value.producer() is None or value in self._outputs:
            value = self.op("Identity", value)
        self._outputs.append(value)

    def op(self, op_type: str, *inputs: ir.Value | None, outputs: int = 1, **attrs: Any) -> Any:
        """Appends a standard operator; returns its output (or a list of them)."""
        node = ir.Node(
            "",
            op_type,
            list(inputs),
            [ir.convenience.convert_attribute(k, v) for k, v in attrs.items() if v is not None],
            outputs=[ir.Value(name=self._fresh()) for _ in range(outputs)],
            name=f"n{len(self._nodes)}",
        )
        self._nodes.append(node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def const(self, array: Any, dtype: Any = None) -> ir.Value:
        """A constant, shared where the same bytes occur again."""
        data = np.array(array, dtype=dtype, order="C")
        key = (data.dtype.str, data.shape, data.tobytes())
        if key not in self._constants:
            self._constants[key] = self.op("Constant", value=ir.tensor(data, name=f"c{len(self._constants)}"))
        return self._constants[key]

    # -- integers in carriers -------------------------------------------------------------------------------------
    def cast(self, coded: Coded, dtype: Any) -> Coded:
        """Changes the carrier (exact by the caller's bound)."""
        dtype = np.dtype(dtype)
        if coded.dtype == dtype:
            return coded
        return Coded(self.op("Cast", coded.value, to=int(ir.DataType.from_numpy(dtype))), dtype)

    def binary(self, op_type: str, a: Coded, b: Coded) -> Coded:
        """An operator of two values in one carrier."""
        assert a.dtype == b.dtype, (a.dtype, b.dtype)
        return Coded(self.op(op_type, a.value, b.value), a.dtype)

    def unary(self, op_type: str, a: Coded, **attrs: Any) -> Coded:
        """An operator of one value that keeps the carrier."""
        return Coded(self.op(op_type, a.value, **attrs), a.dtype)

    def maximum(self, a: Coded, b: Coded) -> Coded:
        """The larger of two values in one carrier.

        onnxruntime's vectorised Max, Min, Clip and Sign of int64 compare the lower halves of operands with equal upper
        halves as signed numbers (1.31: Max(3000000000, 0) is 0 in a long tensor); Less, Greater and Where are right.
        """
        if a.dtype != np.dtype(np.int64):
            return self.binary("Max", a, b)
        return Coded(self.op("Where", self.op("Less", a.value, b.value), b.value, a.value), a.dtype)

    def minimum(self, a: Coded, b: Coded) -> Coded:
        """The smaller of two values in one carrier; see `maximum`."""
        if a.dtype != np.dtype(np.int64):
            return self.binary("Min", a, b)
        return Coded(self.op("Where", self.op("Greater", a.value, b.value), b.value, a.value), a.dtype)

    def clip(self, a: Coded, low: int, high: int) -> Coded:
        """Clamps to constants; see `maximum`."""
        bottom, top = self.number(low, a), self.number(high, a)
        if a.dtype != np.dtype(np.int64):
            return Coded(self.op("Clip", a.value, bottom.value, top.value), a.dtype)
        return self.minimum(self.maximum(a, bottom), top)

    def number(self, array: Any, like: Coded) -> Coded:
        """A constant in the carrier of `like`."""
        return Coded(self.const(array, like.dtype), like.dtype)

    def scale(self, a: Coded, factors: Any) -> Coded:
        """Multiplies by constants (powers of two, or integers)."""
        if np.all(np.asarray(factors) == 1):
            return a
        return self.binary("Mul", a, self.number(factors, a))

    def round(self, a: Coded, rounding: str) -> Coded:
        """Rounds a float carrier whose values and values +- 1/2 are exact."""
        half = self.number(0.5, a)
        if rounding == "TRN":
            return self.unary("Floor", a)
        if rounding == "RND":
            return self.unary("Floor", self.binary("Add", a, half))
        if rounding == "RND_MIN_INF":
            return self.unary("Ceil", self.binary("Sub", a, half))
        if rounding == "RND_CONV":
            return self.unary("Round", a)
        size = self.unary("Abs", a)
        if rounding == "TRN_ZERO":
            size = self.unary("Floor", size)
        elif rounding == "RND_ZERO":
            size = self.unary("Ceil", self.binary("Sub", size, half))
        else:
            size = self.unary("Floor", self.binary("Add", size, half))
        return self.binary("Mul", size, self.unary("Sign", a))

    def round_shift_int64(self, a: Coded, shifts: np.ndarray, rounding: str) -> Coded:
        """Rounds an int64 carrier shifted right by `shifts` (negative: left)."""
        up = np.int64(1) << np.maximum(-shifts, 0)
        whole = np.int64(1) << np.maximum(shifts, 0)
        return self.round_div_int64(self.scale(a, up), self.number(whole, a), rounding)

    def round_div_int64(self, a: Coded, whole: Coded, rounding: str) -> Coded:
        """Rounds ``a / whole`` in int64; ONNX's Mod has the divisor's sign, so a - Mod divides exactly."""
        rest = self.binary("Mod", a, whole)
        floor = self.binary("Div", self.binary("Sub", a, rest), whole)
        if rounding == "TRN":
            return floor
        zero = self.number(0, a)
        if rounding == "TRN_ZERO":
            carry = self.op("And", self.op("Less", floor.value, zero.value), self.op("Greater", rest.value, zero.value))
            return self.binary("Add", floor, self._as(carry, a))
        left = self.binary("Sub", whole, rest)
        above = self.op("Greater", rest.value, left.value)
        if rounding != "RND_MIN_INF":
            tie = self.op("Equal", rest.value, left.value)
            if rounding == "RND_ZERO":
                tie = self.op("And", tie, self.op("Less", floor.value, zero.value))
            elif rounding == "RND_INF":
                tie = self.op("And", tie, self.op("GreaterOrEqual", floor.value, zero.value))
            elif rounding == "RND_CONV":
                odd = self.op("Mod", floor.value, self.const(2, a.dtype))
                tie = self.op("And", tie, self.op("Greater", odd, zero.value))
            above = self.op("Or", above, tie)
        return self.binary("Add", floor, self._as(above, a))

    def _as(self, flag: ir.Value, like: Coded) -> Coded:
        return self.cast(Coded(flag, np.dtype(bool)), like.dtype)

    def overflow(self, a: Coded, target: Fixed, low: int, high: int, ndim: int = 2, axis: int = 1) -> Coded:
        """Applies the overflow mode of `target` to integers proved to lie in low..high.

        Channels of their own width lie along `axis` of the `ndim`-dimensional value.
        """
        if target.holds(low, high):
            return a
        floor, top = target.rails
        if target.bipolar:
            negative = self.op("Less", a.value, self.number(0, a).value)
            return Coded(self.op("Where", negative, self.number(-1, a).value, self.number(1, a).value), a.dtype)
        if target.widths is not None:
            lows, highs = (channel_array(rail, ndim, axis) for rail in target.channel_rails())
            return self.minimum(self.maximum(a, self.number(lows, a)), self.number(highs, a))
        if target.overflow == "WRAP":
            modulus = self.number(float(1 << target.width) if a.dtype.kind == "f" else 1 << target.width, a)
            base = self.number(target.min_code, a)
            moved = self.binary("Sub", a, base)
            if a.dtype.kind == "f":
                turns = self.unary("Floor", self.binary("Div", moved, modulus))
                return self.binary("Sub", a, self.binary("Mul", turns, modulus))
            return self.binary("Add", self.binary("Mod", moved, modulus), base)
        if target.overflow == "SAT_ZERO":
            bottom, ceiling = self.number(floor, a), self.number(top, a)
            inside = self.op(
                "And",
                self.op("GreaterOrEqual", a.value, bottom.value),
                self.op("LessOrEqual", a.value, ceiling.value),
            )
            return Coded(self.op("Where", inside, a.value, self.number(0, a).value), a.dtype)
        return self.clip(a, floor, top)

    # -- the function ---------------------------------------------------------------------------------------------
    def function(self, name: str, attributes: tuple[str, ...] = ()) -> ir.Function:
        """The finished function; its overload is a digest of its content."""
        graph = ir.Graph(self._inputs, self._outputs, nodes=self._nodes, opset_imports={"": OPSET}, name=name)
        made = ir.Function(
            DOMAIN,
            name,
            "",
            graph=graph,
            attributes=[ir.Attr(key, ir.AttributeType.UNDEFINED, None) for key in attributes],
        )
        digest = hashlib.sha256(ir.serde.serialize_function(made).SerializeToString(deterministic=True)).hexdigest()
        made.overload = digest[:16]
        return made
