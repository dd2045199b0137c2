"""How the fused graph carries codes: exact floats (or wide integers), or bytes with an offset.

The file passes codes between operators in small integers and every body casts them to an exact carrier and back. The
fused graph drops those casts: a tensor stays in the carrier its producer computed it in. `Carried` makes each form on
demand and once, so that an input quantiser writes bytes for a QGemm, floats for a Conv, and neither for nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgemat.body import IR_VERSION, OPSET, Body, Coded
from edgemat.op import Tensor
from edgemat.sim.large_weights import LargeWeights

MICROSOFT = "com.microsoft"
SINGLE = np.dtype(np.float32)
SINGLE_LIMIT = 1 << 24
"""float32 holds every integer below this, and every sum whose partial sums stay below it."""


class FusedBody(Body):
    """A `Body` that becomes a model of its own and may call onnxruntime's fused kernels.

    Attributes:
        weights: The temporary file of large weights, or None where there are none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: LargeWeights | None = None
        self._large: list[ir.Value] = []

    def large(self, blocks: Iterable[np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> ir.Value:
        """A constant that goes to the file of large weights, block by block."""
        if self.weights is None:
            self.weights = LargeWeights()
        self._large.append(self.weights.initializer(blocks, shape, dtype, f"large{len(self._large)}"))
        return self._large[-1]

    def microsoft(self, op_type: str, *inputs: ir.Value | None, **attrs: Any) -> ir.Value:
        """Appends an operator of onnxruntime's own domain."""
        value = self.op(op_type, *inputs, **attrs)
        value.producer().domain = MICROSOFT
        return value

    def typed_input(self, tensor: Tensor, name: str, dtype: np.dtype) -> ir.Value:
        """Declares a graph input of the tensor's shape."""
        value = self.input(name)
        value.dtype = ir.DataType.from_numpy(dtype)
        value.shape = ir.Shape(["batch" if d is None else d for d in tensor.shape])
        return value

    def result(self, coded: Coded) -> None:
        """Declares the next graph output."""
        self.output(coded.value)
        self._outputs[-1].dtype = ir.DataType.from_numpy(coded.dtype)

    def model(self, name: str) -> ir.Model:
        """The finished model."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=self._large,
            opset_imports={"": OPSET, MICROSOFT: 1},
            name=name,
        )
        return ir.Model(graph, ir_version=IR_VERSION)


@dataclass(frozen=True, slots=True)
class Packed:
    """Codes as uint8: element = code + `offset`, 0 to 255; with `channels_last`, axis 1 of four has become the last."""

    value: ir.Value
    offset: int
    channels_last: bool = False


def byte_offset(tensor: Tensor) -> int | None:
    """What to add to a tensor's codes to make bytes of them, or None where they do not fit."""
    low = min(tensor.lo, 0)
    return -low if tensor.hi - low <= 255 else None


@dataclass(frozen=True, slots=True)
class Unrounded:
    """A saturated sum in float32 before its rounding, and the function that rounds."""

    coded: Coded
    finish: Callable[[Coded], Coded]


class Carried:
    """One tensor of the graph in whichever carriers its readers ask for.

    Attributes:
        tensor: Its type.
        readers: Number of operators (and graph outputs) that read it.
        unrounded: The value before a rounding that no one has needed yet, or None.
        is_packed: Whether bytes are what the producer writes.
    """

    def __init__(
        self,
        body: FusedBody,
        tensor: Tensor,
        *,
        coded: Callable[[], Coded] | None = None,
        packed: Callable[[], Packed] | None = None,
        unrounded: Unrounded | None = None,
    ) -> None:
        self.tensor = tensor
        self.readers = 1
        self.unrounded = unrounded
        self.is_packed = packed is not None
        self._body = body
        self._make_coded = coded
        self._make_packed = packed
        self._coded: Coded | None = None
        self._packed: Packed | None = None
        self._turned: Packed | None = None

    @property
    def can_pack(self) -> bool:
        """Whether the proved interval, 0 included, fits a byte."""
        return byte_offset(self.tensor) is not None

    def coded(self) -> Coded:
        """The codes as exact numbers."""
        if self._coded is None:
            if self._make_coded is not None:
                self._coded = self._make_coded()
            elif self.unrounded is not None:
                self._coded = self.unrounded.finish(self.unrounded.coded)
            else:
                self._coded = self._unpack()
        return self._coded

    @property
    def is_channels_last(self) -> bool:
        """Whether the producer writes bytes with channels last."""
        return self.is_packed and self._native().channels_last

    def packed(self, channels_last: bool = False) -> Packed:
        """The codes as bytes, four axes with channels last on request; requires `can_pack`."""
        native = self._native()
        if native.channels_last == channels_last:
            return native
        if self._turned is None:
            perm = [0, 2, 3, 1] if channels_last else [0, 3, 1, 2]
            turned = self._body.op("Transpose", native.value, perm=perm)
            self._turned = Packed(turned, native.offset, channels_last)
        return self._turned

    def _native(self) -> Packed:
        """The bytes as the producer writes them."""
        if self._packed is None:
            self._packed = self._make_packed() if self._make_packed is not None else self._pack()
        return self._packed

    def _unpack(self) -> Coded:
        body, packed = self._body, self.packed()
        one, zero = body.const(1.0, np.float32), body.const(packed.offset, np.uint8)
        return Coded(body.op("DequantizeLinear", packed.value, one, zero), SINGLE)

    def _pack(self) -> Packed:
        body, coded = self._body, self.coded()
        offset = byte_offset(self.tensor)
        assert offset is not None
        if offset:
            coded = body.cast(coded, np.int32) if coded.dtype.kind != "f" else coded
            coded = body.binary("Add", coded, body.number(offset, coded))
        return Packed(body.cast(coded, np.uint8).value, offset)
