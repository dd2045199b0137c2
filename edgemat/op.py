"""What an operator is: the protocol every dossier in `edgemat.ops` fulfils.

A dossier owns an operator's meaning: its attributes, its shape, format and range rule, its reference on integers (the
definition the other backends are held to), its body in standard ONNX and the parameters its native kernels take.

Every operator computes exactly. Narrowing is the *epilogue*: a Requantize written into the node as the attribute
``requantize``. It is handled here, once, for all operators.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from edgemat import formats
from edgemat.body import Body, Coded
from edgemat.codes import Codes, Constants
from edgemat.errors import FormatError, LoweringError
from edgemat.formats import Fixed
from edgemat.narrowing import (
    carrier_for,
    channel_shifts,
    emit_requantize,
    narrowed_interval,
    overflow_interval,
    shifted_interval,
)
from edgemat.tensor import MAX_ELEMENTS, REAL, Shape, Tensor, channels, code_dtype

__all__ = [
    "MAX_ELEMENTS",
    "REAL",
    "Attr",
    "Bounds",
    "Call",
    "Cost",
    "Epilogue",
    "Native",
    "Op",
    "Result",
    "Shape",
    "Tensor",
    "carrier_for",
    "channels",
    "code_dtype",
    "emit_requantize",
    "narrowed_interval",
    "overflow_interval",
    "shifted_interval",
]


@dataclass(frozen=True, slots=True)
class Bounds:
    """Proved intervals of an accumulator, in codes.

    Attributes:
        final: Interval of the finished sum (enough for two's complement accumulators).
        partial: Interval of every partial sum in any order (what C accumulators and float carriers need).
        width: Bits of the accumulator where the node states them (``accumulator``); they hold `partial`.
    """

    final: tuple[int, int]
    partial: tuple[int, int]
    width: int | None = None

    @property
    def magnitude(self) -> int:
        """Largest absolute partial sum."""
        return max(abs(self.partial[0]), abs(self.partial[1]))


@dataclass(frozen=True, slots=True)
class Epilogue:
    """A Requantize fused into its producer.

    Attributes:
        shift: Right shifts of the accumulator's codes (negative: left), one entry or one per channel.
        format: Target format; its rounding and overflow modes apply.
    """

    shift: tuple[int, ...]
    format: Fixed

    @property
    def rounding(self) -> str:
        """Rounding mode of the target format."""
        return self.format.rounding

    @property
    def overflow(self) -> str:
        """Overflow mode of the target format."""
        return self.format.overflow


@dataclass(frozen=True, slots=True)
class Attr:
    """One attribute of an operator: its Python type (int, str, or tuple for a list of ints) and default.

    A default of None makes an attribute required unless `optional`. A `late` attribute came after files had been
    written without it: a function declares it only where its node states it, so that those files stay as they are.
    """

    kind: type
    default: Any = None
    optional: bool = False
    late: bool = False


@dataclass(frozen=True)
class Native:
    """What native kernels get: compile-time integers and constant arrays, channels last, batch removed.

    Attributes:
        params: The integers.
        arrays: int64 codes.
        epilogue: What the kernel's sums go through where that is not the call's own epilogue, else None; the kernel's
            channels are its last axis.
        bounds: Intervals of those sums; None with `epilogue`.
    """

    params: dict[str, int | tuple[int, ...]] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    epilogue: Epilogue | None = None
    bounds: Bounds | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """Type of one output before the epilogue: shape, exact format, proved interval."""

    shape: Shape
    format: Fixed
    lo: int
    hi: int


@dataclass(frozen=True)
class Cost:
    """Work of one sample: multiplications of two variables or by a weight, additions, bits of weights.

    Attributes:
        multiplies: Multiplications.
        additions: Additions.
        weight_bits: Bits the weights and biases take at their stated widths.
        ebops: Effective bit operations (HGQ, arXiv 2405.00645; `edgemat.ops.bit_operations`).
        shift_adds: Shifted operands that are added or subtracted in place of multiplications by K-hot weights.
    """

    multiplies: int = 0
    additions: int = 0
    weight_bits: int = 0
    ebops: int = 0
    shift_adds: int = 0


class Call:
    """One node of the lowered graph with everything its dossier needs.

    Attributes:
        op: The dossier.
        name: Node name.
        x: Types of the inputs; constant inputs (weights) have a Tensor as well.
        attrs: Attributes, defaults filled in.
        inputs: Value names of the inputs.
        outputs: Value names of the outputs.
    """

    def __init__(
        self,
        op: Op,
        name: str,
        x: Sequence[Tensor],
        attrs: dict[str, Any],
        constants: Mapping[int, np.ndarray | Codes] | None = None,
        outputs: Sequence[str] = ("y",),
    ) -> None:
        self.op = op
        self.name = name
        self.x = tuple(x)
        self.constants: Constants[int] = Constants(constants)
        self.inputs = tuple(t.name for t in self.x)
        self.outputs = tuple(outputs)
        self.attrs = op.check_attrs(name, attrs)
        op.check_inputs(self)

    def __repr__(self) -> str:
        return f"{self.op.name}({self.name})"

    def constant(self, index: int) -> np.ndarray | None:
        """int64 codes of input `index` when it is a constant, else None."""
        return self.constants.get(index)

    def stored(self, index: int) -> Codes | None:
        """The codes of input `index` where it is a constant that stays in its file, else None."""
        return self.constants.stored(index)

    def format_attr(self, key: str) -> Fixed:
        """Parses the attribute `key` as a format with a stated binary point.

        Raises:
            FormatError: if it is none; names the attribute (`edgemat.lower.typing` adds the node).
        """
        try:
            parsed = Fixed.parse(self.attrs[key])
            _ = parsed.fracs  # refuses a binary point that is still to be learned
        except FormatError as error:
            raise FormatError(f"attribute {key!r}: {error}") from None
        return parsed

    def refuse(self, found: str, remedy: str) -> LoweringError:
        """A LoweringError that names this node."""
        return LoweringError(f"node {self.name!r} ({self.op.name}): {found}; {remedy}")

    def check_channels(self, fmt: Fixed, shape: Shape) -> None:
        """Refuses a format with more channels than axis 1 of `shape` has, or fewer."""
        count = 1 if fmt is REAL else len(fmt.fracs)
        if count > 1 and count != channels(shape):
            raise self.refuse(f"{count} binary points", f"expected 1 or {channels(shape)} (axis 1)")

    @cached_property
    def exact(self) -> tuple[Result, ...]:
        """Types of the outputs before the epilogue."""
        results = self.op.infer(self)
        for result in results:
            elements = 1
            for dim in result.shape:
                elements *= 1 if dim is None else dim
            if not 0 < elements < MAX_ELEMENTS:
                raise self.refuse(
                    f"an output has shape {result.shape}", f"expected 1 to {MAX_ELEMENTS - 1} elements a sample"
                )
            self.check_channels(result.format, result.shape)
        return results

    @cached_property
    def bounds(self) -> Bounds:
        """Proved intervals of the accumulator (for operators without one: of the exact output)."""
        return self.op.bounds(self)

    @cached_property
    def epilogue(self) -> Epilogue | None:
        """The fused Requantize, or None."""
        if not self.attrs.get("requantize"):
            return None
        target = self.format_attr("requantize")
        self.check_channels(target, self.exact[0].shape)
        if not self.op.fuses(self, target):
            raise self.refuse(
                f"a fused requantisation to {target} behind channels that lie on axis 1",
                "requantise each channel in a node of its own",
            )
        return Epilogue(channel_shifts(self.exact[0].format, target), target)

    @cached_property
    def y(self) -> tuple[Tensor, ...]:
        """Types of the outputs."""
        made = []
        for name, result in zip(self.outputs, self.exact, strict=True):
            fmt, lo, hi = result.format, result.lo, result.hi
            if self.epilogue is not None:
                fmt = self.epilogue.format
                lo, hi = self.op.requantized_interval(self, lo, hi)
            made.append(Tensor(name, result.shape, fmt, lo, hi))
        return tuple(made)


class Op(ABC):
    """Base of all dossiers.

    Attributes:
        name: ONNX op_type in the domain ``edgemat``.
        stem: Stem of the native files.
        arity: Smallest and largest number of inputs.
        attributes: Attributes by name (``requantize`` is added where `has_epilogue`).
        has_epilogue: Whether a Requantize may be fused.
        keeps_channels: Whether per-channel binary points on axis 1 are taken as they are; otherwise lowering aligns
            them first, exactly and visibly.
        same_format: Whether all variable inputs must share one format (lowering aligns them first).
    """

    name: str
    stem: str
    arity: tuple[int, int] = (1, 1)
    attributes: dict[str, Attr] = {}
    has_epilogue: bool = False
    keeps_channels: bool = False
    same_format: bool = False

    def row_major(self, call: Call) -> bool:
        """Whether native kernels take this call's tensors in ONNX order (batch removed), not channels last."""
        return False

    def takes_channels(self, tensor: Tensor) -> bool:
        """Whether an operand whose channels have binary points (and widths) of their own is taken as it is."""
        return self.keeps_channels

    def fuses(self, call: Call, target: Fixed) -> bool:
        """Whether a Requantize to `target` may be written into the node: channels on axis 1 are the last axis of native
        code only where that is channels last."""
        by_channel = target.per_channel or call.exact[0].format.per_channel
        return self.has_epilogue and not (by_channel and self.row_major(call))

    # -- checks ---------------------------------------------------------------------------------------------------
    def check_attrs(self, node: str, attrs: dict[str, Any]) -> dict[str, Any]:
        """Fills in defaults and refuses unknown, missing or mistyped attributes."""
        known = dict(self.attributes)
        if self.has_epilogue:
            known["requantize"] = Attr(str, "", optional=True)
        for key in attrs:
            if key not in known:
                raise LoweringError(
                    f"node {node!r} ({self.name}) has the attribute {key!r}, expected only {', '.join(known) or 'none'}"
                )
        full: dict[str, Any] = {}
        for key, attr in known.items():
            value = attrs.get(key, attr.default)
            if value is None and not attr.optional:
                raise LoweringError(f"node {node!r} ({self.name}) lacks the attribute {key!r}")
            if isinstance(value, list | tuple) and attr.kind is tuple and all(isinstance(v, int) for v in value):
                value = tuple(value)
            if value is not None and not isinstance(value, attr.kind):
                raise LoweringError(
                    f"node {node!r} ({self.name}): attribute {key!r} is {value!r}, expected {attr.kind.__name__}"
                )
            full[key] = value
        return full

    def check_inputs(self, call: Call) -> None:
        """Refuses a wrong number of inputs or formats that lowering should have aligned."""
        low, high = self.arity
        if not low <= len(call.x) <= high:
            raise call.refuse(f"{len(call.x)} inputs", f"expected {low} to {high}")
        for index, tensor in enumerate(call.x):
            if tensor.format.per_channel and not self.takes_channels(tensor) and index not in call.constants:
                raise call.refuse(f"an input of {tensor.format}", "expected one binary point; requantise it first")
            if index not in call.constants:
                call.check_channels(tensor.format, tensor.shape)

    # -- meaning --------------------------------------------------------------------------------------------------
    @abstractmethod
    def infer(self, call: Call) -> tuple[Result, ...]:
        """Shape, exact format and proved interval of each output, before the epilogue."""

    @abstractmethod
    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        """Exact int64 codes of the output, before the epilogue (single output)."""

    def bounds(self, call: Call) -> Bounds:
        """Intervals of the accumulator; by default those of the output."""
        result = call.exact[0]
        return Bounds((result.lo, result.hi), (min(result.lo, 0), max(result.hi, 0)))

    def reference(self, call: Call, *x: np.ndarray) -> np.ndarray:
        """THE definition: int64 codes in, int64 codes out, with a batch axis."""
        codes = self.compute(call, *x)
        if call.epilogue is not None:
            codes = formats.requantize(codes, call.exact[0].format, call.epilogue.format)
        return codes

    def requantized_interval(self, call: Call, lo: int, hi: int) -> tuple[int, int]:
        """Interval of the output behind the epilogue."""
        assert call.epilogue is not None
        return narrowed_interval(lo, hi, call.exact[0].format, call.epilogue.shift, call.epilogue.format)

    # -- ONNX body ------------------------------------------------------------------------------------------------
    @abstractmethod
    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        """Writes the exact computation in standard ONNX, in a carrier the proved bounds allow."""

    def emit_epilogue(self, body: Body, call: Call, acc: Coded) -> Coded:
        """Writes the fused Requantize."""
        assert call.epilogue is not None
        result = call.exact[0]
        return emit_requantize(
            body, acc, call.epilogue.shift, call.epilogue.format, result.lo, result.hi, len(result.shape)
        )

    def body(self, call: Call) -> Body:
        """The whole function body: emit, epilogue, cast to the code type."""
        body = Body()
        x = [Coded(body.input(f"x{i}"), t.dtype) for i, t in enumerate(call.x)]
        out = self.emit(body, call, *x)
        if call.epilogue is not None:
            out = self.emit_epilogue(body, call, out)
        body.output(body.cast(out, call.y[0].dtype).value)
        return body

    # -- targets --------------------------------------------------------------------------------------------------
    def native(self, call: Call) -> Native:
        """Parameters and constant arrays of the native kernels (docs/internals.md, section 4)."""
        return Native()

    def cost(self, call: Call) -> Cost:
        """Work of one sample."""
        return Cost()

    def cases(self) -> list[Call]:
        """Calls every backend is tested on: rails, ties, zero, extreme shapes."""
        return []
