"""MatMul of two variable operands, [N, (B,) M, K] by [N, (B,) K, P], as an exact integer sum."""

from __future__ import annotations

import math

import numpy as np

from edgemat.body import Body, Coded
from edgemat.formats import accumulator
from edgemat.op import Bounds, Call, Cost, Native, Op, Result, carrier_for
from edgemat.ops.accumulation import exact_matmul
from edgemat.ops.bit_operations import operand_bits
from edgemat.ops.cases import tensor


class MatMul(Op):
    """Batched matrix product; leading axes of both operands agree."""

    name = "MatMul"
    stem = "matmul"
    arity = (2, 2)
    has_epilogue = True

    def infer(self, call: Call) -> tuple[Result, ...]:
        a, b = call.x
        if not (a.batched and b.batched) or len(a.shape) != len(b.shape) or len(a.shape) not in (3, 4):
            raise call.refuse(f"operands of shapes {a.shape} and {b.shape}", "expected two batched matrices")
        if a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
            raise call.refuse(f"operands of shapes {a.shape} and {b.shape}", "inner and leading axes must agree")
        lo, hi = self._interval(call, widened=False)
        frac = a.format.fracs[0] + b.format.fracs[0]
        return (Result((*a.shape[:-1], b.shape[-1]), accumulator(lo, hi, (frac,)), lo, hi),)

    def _interval(self, call: Call, widened: bool) -> tuple[int, int]:
        a, b = call.x
        ends = [m * n for m in (a.lo, a.hi) for n in (b.lo, b.hi)] + ([0] if widened else [])
        terms = int(a.shape[-1] or 1)
        return min(ends) * terms, max(ends) * terms

    def bounds(self, call: Call) -> Bounds:
        return Bounds(self._interval(call, False), self._interval(call, True))

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        return exact_matmul(x[0], x[1], call.bounds.magnitude)

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        top = max(call.bounds.magnitude, call.x[0].magnitude, call.x[1].magnitude)
        carrier = carrier_for(top)
        return body.binary("MatMul", body.cast(x[0], carrier), body.cast(x[1], carrier))

    def row_major(self, call: Call) -> bool:
        return True

    def native(self, call: Call) -> Native:
        a, b = call.x[0].sample_shape, call.x[1].sample_shape
        return Native({"batch": math.prod(a[:-2]), "m": a[-2], "k": a[-1], "n": b[-1]})

    def cost(self, call: Call) -> Cost:
        work = call.x[0].size * call.x[1].sample_shape[-1]
        bits = [int(operand_bits(tensor)[0]) for tensor in call.x]
        return Cost(work, work, 0, work * bits[0] * bits[1])

    def cases(self) -> list[Call]:
        made = []
        for a, b in (((3, 4), (4, 5)), ((1, 1), (1, 1)), ((2, 3, 4), (2, 4, 2)), ((6, 33), (33, 2))):
            for fa, fb, requantize in (
                ("fixed<8,3>", "fixed<8,1>", ""),
                ("ufixed<8,0>", "fixed<6,2>", "fixed<8,6>"),
            ):
                x = [tensor(fa, (None, *a), "a"), tensor(fb, (None, *b), "b")]
                made.append(Call(self, f"{a}{b}{requantize}", x, {"requantize": requantize}))
        return made
