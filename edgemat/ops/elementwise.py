"""Add, Sub and Mul of two tensors, aligned exactly to the finer LSB; a constant operand is allowed on either side."""

from __future__ import annotations

from itertools import product

import numpy as np

from edgemat.body import Body, Coded
from edgemat.formats import accumulator
from edgemat.op import Bounds, Call, Cost, Native, Op, Result, Shape, carrier_for
from edgemat.ops.bit_operations import constant_bits, operand_bits
from edgemat.ops.cases import constant, random_codes, tensor


def broadcast_shape(call: Call, a: Shape, b: Shape) -> Shape:
    """ONNX broadcasting; only axis 0 may be the batch (None)."""
    rank = max(len(a), len(b))
    left, right = (1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b
    out: list[int | None] = []
    for m, n in zip(left, right, strict=True):
        if m != n and m != 1 and n != 1:
            raise call.refuse(f"operands of shapes {a} and {b}", "they must broadcast")
        out.append(n if m == 1 else m)
    if None in out[1:]:
        raise call.refuse(f"operands of shapes {a} and {b}", "the batch must be axis 0 of both")
    return tuple(out)


def native_operand(shape: Shape, rank: int, batched: bool) -> tuple[int, ...]:
    """Shape of an operand as native code broadcasts it: padded to `rank`, batch removed, channels last."""
    full = (1,) * (rank - len(shape)) + tuple(shape)
    sample = tuple(int(d or 1) for d in (full[1:] if batched else full))
    return (*sample[1:], sample[0]) if batched and len(sample) in (2, 3) else sample


class Elementwise(Op):
    """Common part of the two-operand operators."""

    arity = (2, 2)
    has_epilogue = True
    aligns = True

    def _shifts(self, call: Call) -> tuple[int, int]:
        f0, f1 = call.x[0].format.fracs[0], call.x[1].format.fracs[0]
        return (max(f0, f1) - f0, max(f0, f1) - f1) if self.aligns else (0, 0)

    def _frac(self, call: Call) -> int:
        f0, f1 = call.x[0].format.fracs[0], call.x[1].format.fracs[0]
        return max(f0, f1) if self.aligns else f0 + f1

    def combine(self, a: object, b: object) -> object:
        """The operation on two integers or integer arrays."""
        raise AssertionError(self.name)

    def infer(self, call: Call) -> tuple[Result, ...]:
        a, b = call.x
        s0, s1 = self._shifts(call)
        ends = [self.combine(m << s0, n << s1) for m, n in product((a.lo, a.hi), (b.lo, b.hi))]
        lo, hi = min(ends), max(ends)  # type: ignore[type-var]
        shape = broadcast_shape(call, a.shape, b.shape)
        return (Result(shape, accumulator(lo, hi, (self._frac(call),)), lo, hi),)  # type: ignore[arg-type]

    def bounds(self, call: Call) -> Bounds:
        s0, s1 = self._shifts(call)
        lo, hi = call.exact[0].lo, call.exact[0].hi
        terms = [abs(v) << s for t, s in zip(call.x, (s0, s1), strict=True) for v in (t.lo, t.hi)]
        return Bounds((lo, hi), (min(lo, -max(terms)), max(hi, max(terms))))

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        s0, s1 = self._shifts(call)
        return self.combine(x[0] << s0, x[1] << s1)  # type: ignore[return-value]

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        s0, s1 = self._shifts(call)
        carrier = carrier_for(call.bounds.magnitude)
        a = body.scale(body.cast(x[0], carrier), 1 << s0)
        b = body.scale(body.cast(x[1], carrier), 1 << s1)
        return body.binary(self.name, a, b)

    def native(self, call: Call) -> Native:
        y = call.exact[0].shape
        batched = y[0] is None
        out = native_operand(y, len(y), batched)
        if len(out) > 4:
            raise call.refuse(f"rank {len(y)}", "native code broadcasts at most 4 axes")
        dims = (1,) * (4 - len(out)) + out
        strides, arrays = [], {}
        for i, t in enumerate(call.x):
            shape = native_operand(t.shape, len(y), batched)
            shape = (1,) * (4 - len(shape)) + shape
            step, stride = 1, [0] * 4
            for axis in reversed(range(4)):
                stride[axis] = step if shape[axis] != 1 else 0
                step *= shape[axis]
            strides.append(tuple(stride))
            codes = call.constant(i)
            if codes is not None:
                arrays[f"x{i}"] = native_constant(codes, len(y), batched)
        s0, s1 = self._shifts(call)
        size = int(np.prod(dims))
        plain = all(t.size == size and t.batched == batched for t in call.x)
        params: dict[str, int | tuple[int, ...]] = {"size": size, "align0": s0, "align1": s1, "dims": dims}
        params |= {"stride0": strides[0], "stride1": strides[1], "broadcast": int(not plain)}
        return Native(params, arrays)

    def cost(self, call: Call) -> Cost:
        size = int(np.prod([d or 1 for d in call.exact[0].shape]))
        bits = [int(operand_bits(tensor).max()) for tensor in call.x]
        if self.aligns:
            return Cost(0, size, 0, 0 if call.constants else size * max(bits))
        for index, codes in call.constants.items():
            repeated = size // codes.size
            return Cost(size, 0, 0, repeated * int(constant_bits(codes).sum()) * bits[1 - index])
        return Cost(size, 0, 0, size * bits[0] * bits[1])

    def cases(self) -> list[Call]:
        made = []
        shapes: list[tuple[Shape, Shape]] = [
            ((None, 7), (None, 7)),
            ((None, 3, 4, 5), (None, 3, 4, 5)),
            ((None, 3, 4, 5), (None, 3, 1, 1)),
            ((None, 4, 6), (None, 1, 6)),
        ]
        for index, (a, b) in enumerate(shapes):
            for fa, fb, requantize in (
                ("fixed<8,3>", "fixed<8,3>", ""),
                ("fixed<8,3>", "ufixed<6,4>", "fixed<8,5>"),
                ("ufixed<8,8>", "fixed<6,-1>", "ufixed<8,7,RND_ZERO,SAT>"),
                ("fixed<16,2>", "fixed<12,9>", "fixed<16,9,RND_CONV,WRAP>"),
            ):
                x = [tensor(fa, a, "a"), tensor(fb, b, "b")]
                made.append(Call(self, f"{index}_{fa}_{fb}", x, {"requantize": requantize}))
        k = constant("fixed<6,2>", random_codes("fixed<6,2>", (1, 3, 1, 1), 1))
        x0 = tensor("fixed<8,3>", (None, 3, 2, 4))
        made.append(Call(self, "constant", [x0, k[0]], {"requantize": "fixed<8,5>"}, {1: k[1]}))
        made.append(Call(self, "constant_first", [k[0], x0], {}, {0: k[1]}))
        pair = [tensor("bipolar", (None, 7), "a"), tensor("fixed<8,3>", (None, 7), "b")]
        made.append(Call(self, "bipolar", pair, {"requantize": "bipolar"}))
        return made


def native_constant(codes: np.ndarray, rank: int, batched: bool) -> np.ndarray:
    """A constant operand in native layout."""
    full = codes.reshape((1,) * (rank - codes.ndim) + codes.shape)
    sample = full[0] if batched else full
    return np.ascontiguousarray(np.moveaxis(sample, 0, -1) if batched and sample.ndim in (2, 3) else sample)


class Add(Elementwise):
    """``a + b``."""

    name = "Add"
    stem = "add"

    def combine(self, a, b):  # type: ignore[no-untyped-def]
        return a + b


class Sub(Elementwise):
    """``a - b``."""

    name = "Sub"
    stem = "sub"

    def combine(self, a, b):  # type: ignore[no-untyped-def]
        return a - b


class Mul(Elementwise):
    """``a * b``; fractional bits add up."""

    name = "Mul"
    stem = "mul"
    aligns = False

    def combine(self, a, b):  # type: ignore[no-untyped-def]
        return a * b
