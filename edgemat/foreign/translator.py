"""Walks a foreign graph once, node by node, and builds the lowered one; collects every refusal instead of the first.

Handlers (`edgemat.foreign.handlers`) take the translator and a node and say what its outputs are: `Known`, `Signal`,
`Raw` or, by raising an `EdgematError`, `Refused`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgemat.errors import EdgematError, LoweringError, UnsupportedOpError
from edgemat.foreign.chains import Step
from edgemat.foreign.constants import fold
from edgemat.foreign.gathering import moved, quantise_gathered, steps_and_moves
from edgemat.foreign.joins import quantise_join
from edgemat.foreign.quantisers import Quantiser
from edgemat.foreign.report import BEHIND, FOLDED, REFUSED, TAKEN, ImportReport, Row
from edgemat.foreign.requantisers import compiled, quantise, shifts_ties
from edgemat.foreign.signals import Gathered, Joined, Known, Quantity, Raw, Refused, Signal
from edgemat.foreign.source import Source
from edgemat.foreign.workbench import Workbench
from edgemat.formats import ROUNDINGS, Fixed
from edgemat.op import Tensor

Handler = Callable[["Translator", ir.Node], None]
ONE = np.ones((), np.float32)
MALFORMED: tuple[type[Exception], ...] = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    MemoryError,
    RecursionError,
    NotImplementedError,
    RuntimeError,
    StopIteration,
)
"""What reading a damaged node may raise: it is refused, as the lowered file's reader refuses what it cannot read."""


def malformed(error: BaseException) -> str:
    """The finding of a refusal."""
    first = (str(error).splitlines() or [""])[0][:120]
    return f"its inputs or attributes do not fit each other ({type(error).__name__}: {first})"


INTEGERS = {
    ir.DataType.INT8: Fixed(8, 8),
    ir.DataType.UINT8: Fixed(8, 8, signed=False),
    ir.DataType.INT16: Fixed(16, 16),
    ir.DataType.UINT16: Fixed(16, 16, signed=False),
}
"""Formats of integer graph inputs: a file whose first quantiser was cut off reads the stored integers themselves."""


class Translator:
    """State of one import.

    Attributes:
        source: The file.
        bench: The graph under construction.
        report: What became of each node so far.
        values: What is known of each tensor of the file, by value.

    Args:
        source: The file.
        name: Name of the model.
        inputs: Formats of float inputs that no quantiser of the file states, by name.
        handlers: Handler by (domain, operator); see `edgemat.foreign.handlers.HANDLERS`.
    """

    def __init__(
        self, source: Source, name: str, inputs: Mapping[str, Fixed], handlers: Mapping[tuple[str, str], Handler]
    ) -> None:
        self.source = source
        self.bench = Workbench(name)
        self.report = ImportReport(source.label)
        self.values: dict[ir.Value, Quantity] = {}
        self._inputs = dict(inputs)
        self._handlers = handlers
        self._quantised: dict[ir.Value, tuple[str, Signal]] = {}
        self._notes: list[tuple[str, str, str]] = []
        self._integers = any(node.op_type.startswith(("DequantizeLinear", "QLinear", "QGemm")) for node in source.graph)

    # -- the walk ---------------------------------------------------------------------------------------------------
    def run(self) -> ImportReport:
        """Walks the file.

        Raises:
            LoweringError: if nothing of it can be read at all (an input without a shape).
        """
        for value in self.source.graph.initializers.values():
            if value.const_value is not None:
                self.values[value] = Known(_stored(value))
        for value in self.source.graph.inputs:
            if value not in self.values:
                self._declare(value)
        for node in self.source.graph:
            self.report.rows.append(self._visit(node))
        return self.report

    def _declare(self, value: ir.Value) -> None:
        shape = value.shape
        if shape is None or len(shape) < 1 or any(not isinstance(d, int) for d in list(shape)[1:]):
            raise LoweringError(
                f"input {value.name!r} has the shape {shape}, expected known sizes behind the batch on axis 0"
            )
        stated = self._inputs.pop(value.name or "", None)
        stored = INTEGERS.get(value.dtype) if value.dtype is not None else None
        if stated is not None or stored is not None:
            value.dtype = ir.DataType.FLOAT  # whatever type the file carries its numbers in
        self.bench.input(value)
        if stated is None and stored is None:
            self.values[value] = Raw(value)
        else:
            fmt = {"y_format": str(stored if stated is None else stated)}
            made = self.bench.add("Quantize", [self.bench.mapped(value)], fmt, f"{value.name}_q")
            self.values[value] = Signal(made, ONE, zero=0 if stated is None else None)
            if stated is None:
                self.report.notes.append(f"Input {value.name!r} is given the file's stored integers, as float32.")

    def _visit(self, node: ir.Node) -> Row:
        label, op = self.label(node), f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        behind = [self.values[v] for v in node.inputs if v is not None and isinstance(self.values.get(v), Refused)]
        if behind:
            self._refuse(node)
            return Row(label, op, BEHIND, f"behind {behind[0].node!r}")  # type: ignore[union-attr]
        before, self._notes = len(self.bench.graph), []
        try:
            self.handle(node)
        except EdgematError as error:
            self._refuse(node)
            named = str(error) if f"node {label!r}" in str(error) else f"node {label!r} ({op}): {error}"
            return Row(label, op, REFUSED, named)
        except MALFORMED as error:
            self._refuse(node)
            return Row(label, op, REFUSED, str(self.refuse(node, malformed(error), "check the node with onnx.checker")))
        notes = [note for _, note, _ in self._notes if note]
        inexact = [fidelity for *_, fidelity in self._notes if fidelity not in ("", "exact")]
        fate = TAKEN if len(self.bench.graph) > before else FOLDED
        return Row(label, op, fate, "; ".join(notes), inexact[0] if inexact else "exact" if fate == TAKEN else "")

    def _refuse(self, node: ir.Node) -> None:
        for value in node.outputs:
            self.values[value] = Refused(self.label(node))

    def handle(self, node: ir.Node) -> None:
        """Folds a node of constants, or calls its handler."""
        given = [self.values.get(v) for v in node.inputs if v is not None]
        if any(value is None for value in given):
            raise LoweringError(f"node {self.label(node)!r} reads a value that nothing computes; repair the file")
        if any(isinstance(value, Known) and value.array.dtype.kind in "OSUc" for value in given):
            raise self.refuse(node, "a constant that holds no numbers", "expected integers or floats")
        handler = self._handlers.get((node.domain, node.op_type))
        if (given and all(isinstance(value, Known) for value in given)) or node.op_type == "Constant":
            folded = fold(self, node)
            if folded is not None:
                for value, array in zip(node.outputs, folded, strict=True):
                    self.values[value] = array
                return
        if handler is None:
            kind = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            raise UnsupportedOpError(
                f"node {self.label(node)!r} is {kind}, which the import does not know; see `edgemat ops`"
            )
        handler(self, node)

    # -- what handlers ask --------------------------------------------------------------------------------------------
    def label(self, node: ir.Node) -> str:
        """The node's name, or its first output's."""
        return node.name or (node.outputs[0].name if node.outputs else "") or node.op_type

    def refuse(self, node: ir.Node, found: str, remedy: str) -> LoweringError:
        """A LoweringError that names a node of the file."""
        return LoweringError(f"node {self.label(node)!r} ({node.op_type}): {found}; {remedy}")

    def note(self, node: ir.Node, text: str, fidelity: str = "exact") -> None:
        """Says what a node became, and how faithful that is."""
        self._notes.append((self.label(node), text, fidelity))

    def quantity(self, node: ir.Node, index: int) -> Quantity | None:
        """What is known of an input; None where it is left out."""
        value = node.inputs[index] if index < len(node.inputs) else None
        return None if value is None else self.values[value]

    def known(self, node: ir.Node, index: int) -> Known:
        """A constant input.

        Raises:
            LoweringError: where it is computed at run time, or left out.
        """
        quantity = self.quantity(node, index)
        if not isinstance(quantity, Known):
            raise self.refuse(node, f"input {index} is computed at run time", "expected a constant")
        return quantity

    def optional(self, node: ir.Node, index: int) -> np.ndarray | None:
        """A constant input's array, or None where it is left out."""
        return None if self.quantity(node, index) is None else self.known(node, index).array

    def signal(self, node: ir.Node, index: int = 0) -> Signal:
        """A tensor of codes.

        Raises:
            LoweringError: for a float input without a quantiser, or a constant.
        """
        quantity = self.quantity(node, index)
        if isinstance(quantity, Raw):
            raise self.refuse(
                node,
                f"the float input {quantity.source.name!r} gets here without a quantiser",
                f"state its format: --input {quantity.source.name}=ufixed<8,0>, or whatever its values are",
            )
        if isinstance(quantity, (Joined, Gathered)):
            what = "sum" if isinstance(quantity, Joined) else "concatenation"
            raise self.refuse(node, f"a {what} of tensors with real scales has no quantiser", "quantise it first")
        if not isinstance(quantity, Signal):
            raise self.refuse(node, f"input {index} is a constant or missing", "expected data")
        return quantity

    def type(self, signal: Signal) -> Tensor:
        """Type of a signal's codes."""
        return self.bench.type(signal.value)

    def shape(self, signal: Signal) -> tuple[int | None, ...]:
        """Shape in the file's order of axes; None is the batch."""
        shape = self.type(signal).shape
        return tuple(shape[axis] for axis in signal.order(len(shape)))

    def _attribute(self, node: ir.Node, key: str) -> Any:
        attr = node.attributes.get(key)
        return None if attr is None else attr.value

    def integer(self, node: ir.Node, key: str, default: int = 0) -> int:
        """An integer attribute, or the default.

        Raises:
            LoweringError: for an attribute of another type.
        """
        value = self._attribute(node, key)
        if value is not None and not isinstance(value, int):
            raise self.refuse(node, f"attribute {key!r} is {str(value)[:40]!r}", "expected an integer")
        return default if value is None else int(value)

    def integers(self, node: ir.Node, key: str, default: Sequence[int] = ()) -> tuple[int, ...]:
        """An attribute of integers, or the default."""
        value = self._attribute(node, key)
        if value is None:
            return tuple(default)
        if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(v, int) for v in value):
            raise self.refuse(node, f"attribute {key!r} is {str(value)[:40]!r}", "expected integers")
        return tuple(int(v) for v in value)

    def real(self, node: ir.Node, key: str, default: float) -> float:
        """A float attribute, or the default."""
        value = self._attribute(node, key)
        if value is not None and not isinstance(value, (int, float)):
            raise self.refuse(node, f"attribute {key!r} is {str(value)[:40]!r}", "expected a number")
        return default if value is None else float(value)

    def text(self, node: ir.Node, key: str, default: str = "") -> str:
        """A text attribute, or the default."""
        value = self._attribute(node, key)
        value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        if value is not None and not isinstance(value, str):
            raise self.refuse(node, f"attribute {key!r} is {str(value)[:40]!r}", "expected text")
        return default if value is None else value

    def axes(self, node: ir.Node) -> tuple[int, ...]:
        """Axes as the second input (newer operator sets) or as an attribute; empty where they are left out."""
        given = self.optional(node, 1) if len(node.inputs) > 1 else None
        return self.integers(node, "axes") if given is None else tuple(int(a) for a in given.reshape(-1).tolist())

    def states(self, node: ir.Node, key: str) -> bool:
        """Whether a node has an attribute."""
        return key in node.attributes

    def fuses(self, factor: np.ndarray) -> bool:
        """Whether onnxruntime requantises this file's sums by one multiplication: those of real scales, in files that
        store integers (its integer kernels take over Conv, Gemm and MatMul between DequantizeLinear and
        QuantizeLinear)."""
        return bool((factor != 1).any()) and self._integers

    @contextmanager
    def assuming(self, known: Mapping[ir.Value, Quantity]) -> Iterator[None]:
        """Takes tensors of the file for something else; what is handled inside is forgotten behind it."""
        kept = self.values
        self.values = {**kept, **known}
        try:
            yield
        finally:
            self.values = kept

    # -- what handlers do ---------------------------------------------------------------------------------------------
    def set(self, node: ir.Node, quantity: Quantity, index: int = 0) -> None:
        """Says what an output of a node is."""
        self.values[node.outputs[index]] = quantity

    def step(self, node: ir.Node, signal: Signal, inputs: tuple[np.ndarray | str | None, ...]) -> None:
        """The node is one more element-wise operator behind a signal."""
        attributes = {key: attr.value for key, attr in node.attributes.items()}
        attributes = {key: int(v) if isinstance(v, ir.DataType) else v for key, v in attributes.items()}
        if any(not isinstance(v, (int, float, str, Sequence)) for v in attributes.values()):
            raise self.refuse(node, "an attribute that is a tensor or a type", "expected numbers or text")
        chain = signal.chain.then(Step(self.label(node), node.op_type, attributes, inputs), self.source.opset)
        self.set(node, signal.through(chain))

    def quantised(self, node: ir.Node, quantity: Quantity, quantiser: Quantiser) -> Signal:
        """The codes of a quantiser behind a signal or a float input."""
        name = self.label(node)
        if isinstance(quantity, Raw):
            return self._from_input(node, quantity, quantiser)
        if isinstance(quantity, Joined):
            steps, moves = steps_and_moves(quantity.path)
            return moved(self, quantise_join(self, node, replace(quantity, path=steps), quantiser), moves)
        if isinstance(quantity, Gathered):
            return quantise_gathered(self, node, quantity, quantiser)
        assert isinstance(quantity, Signal)
        if (
            quantiser.style == "stored"
            and quantity.witness is not None
            and quantity.witness.kernel
            and not quantity.chain
        ):
            quantity = replace(quantity, fused=True, witness=None)
        made, how = quantise(self.bench, quantity, quantiser, name)
        self.note(node, how)
        if quantity.witness is not None:
            self.note(node, *quantity.witness.fidelity(compiled(self.bench, quantity, quantiser)))
        return made

    def _from_input(self, node: ir.Node, raw: Raw, quantiser: Quantiser) -> Signal:
        """Quantises the graph input itself, then repeats the nodes that stand between: they only move elements."""
        signal = self._input_codes(node, raw.source, quantiser)
        with self.assuming({raw.source: signal}):
            for between in raw.path:
                self.handle(between)
            if raw.path:
                quantity = self.values[raw.path[-1].outputs[0]]
                assert isinstance(quantity, Signal)
                signal = quantity
        return signal

    def _input_codes(self, node: ir.Node, source: ir.Value, quantiser: Quantiser) -> Signal:
        if quantiser.scale.size > 1:
            raise self.refuse(node, "an input scale for each channel", "use one scale for the input")
        key = repr(quantiser)
        if source in self._quantised:
            before, signal = self._quantised[source]
            if before != key:
                raise self.refuse(
                    node, f"input {source.name!r} is quantised in two ways", "quantise it once and use that"
                )
            return signal
        attrs, factor = input_attributes(self, node, quantiser)
        made = self.bench.add("Quantize", [self.bench.mapped(source)], attrs, f"{source.name}_q")
        if "scale" not in attrs and quantiser.clipped:
            made = self.bench.add("Clip", [made], {"low": quantiser.low, "high": quantiser.high}, f"{source.name}_clip")
        signal = Signal(made, factor)
        self._quantised[source] = key, signal
        told = f"input {source.name!r} in {attrs['y_format']}" + (f", scale {factor}" if factor != 1 else "")
        ties = quantiser.style != "onnx" and not quantiser.bipolar and shifts_ties(quantiser)
        if ties and quantiser.rounding == "TRN_ZERO":
            raise self.refuse(node, "an input rounded toward its zero point", "round to nearest at the input")
        self.note(node, told, "differs for inputs on a tie, by at most 1" if ties else "exact")
        return signal


def _stored(value: ir.Value) -> np.ndarray:
    """The numbers of an initializer."""
    assert value.const_value is not None
    try:
        return np.asarray(value.const_value.numpy())
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:120]
        raise LoweringError(f"initializer {value.name!r} is damaged: {first}") from error


def input_attributes(tr: Translator, node: ir.Node, quantiser: Quantiser) -> tuple[dict[str, object], np.ndarray]:
    """Attributes of the Quantize of a graph input, and the factor of its codes."""
    if quantiser.bipolar and quantiser.scale == 1:
        return {"y_format": "bipolar"}, ONE
    if quantiser.bipolar:
        raise tr.refuse(node, f"an input of one bit with the scale {float(quantiser.scale)}", "use the scale 1")
    if quantiser.rounding not in ROUNDINGS:
        raise tr.refuse(
            node, f"an input quantiser that rounds by {quantiser.rounding}", "round to nearest at the input"
        )
    fmt = replace(quantiser.format, rounding=quantiser.rounding)
    if quantiser.fracs is not None:
        return {"y_format": str(fmt)}, ONE
    if quantiser.rounding != "RND_CONV":
        raise tr.refuse(node, f"a real scale with {quantiser.rounding}", "round halves to even at the input")
    text = float(np.float32(quantiser.scale)).hex()
    attrs = {"y_format": str(replace(fmt, overflow="SAT")), "scale": text, "low": quantiser.low, "high": quantiser.high}
    return attrs, quantiser.factor
