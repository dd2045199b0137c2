"""What RmsNorm and LayerNorm share: a row of integers over the square root of an integer (docs/normalization.md).

Along the last axis of n codes a subclass states integers a_i and T, exact, and a count k, so that the normalised value
is ``a_i * sqrt(k / T)``. Then, with m, e and g of `edgemat.ops.reciprocal_root` and ``sqrt(k) = c * 2**(h - 30)``::

    z_i = Requantize(a_i * m * 2**-s)       s = 15 + e - g - h - f_z, the exact product rounded once into `norm_format`
    y_i = z_i * gain_i + bias_i             exact; without gain y_i = z_i

T, and so z, says nothing of the input's binary point. A row whose T is 0 has a_i = 0 and z_i = 0.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np

from edgemat import formats
from edgemat.body import Body, Coded
from edgemat.formats import Fixed, accumulator
from edgemat.op import Attr, Bounds, Call, Cost, Native, Op, Result, carrier_for, overflow_interval
from edgemat.ops.accumulation import sum_bounds
from edgemat.ops.cases import constant, random_codes, tensor
from edgemat.ops.linear import check_bias_grid
from edgemat.ops.reciprocal_root import (
    LIMIT,
    MANTISSA_BITS,
    UNIT_BITS,
    emit_reciprocal_root,
    exponent_of,
    look_up,
    reciprocal_root,
    root_of,
)

DEFAULT_NORM = "fixed<16,4,RND,SAT>"
MAX_FRAC = 24


class RowNorm(Op):
    """Inputs x, gain [n] and bias [n] (both optional); n is the length of the last axis."""

    attributes = {
        "eps": Attr(int, 0),
        "norm_format": Attr(str, DEFAULT_NORM),
        "w_format": Attr(str, "", optional=True),
        "b_format": Attr(str, "", optional=True),
    }
    has_epilogue = True

    # -- what a subclass states -------------------------------------------------------------------------------------
    @abstractmethod
    def count(self, call: Call) -> int:
        """k of the module's text."""

    @abstractmethod
    def offset(self, call: Call) -> int:
        """What `eps` adds to T."""

    @abstractmethod
    def numerator_interval(self, call: Call) -> tuple[int, int]:
        """Interval of a_i."""

    @abstractmethod
    def largest_total(self, call: Call) -> int:
        """A bound of T and of every integer on the way to it."""

    @abstractmethod
    def totals(self, call: Call, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """a [..., n] and T [..., 1], int64."""

    @abstractmethod
    def emit_totals(self, body: Body, call: Call, x: Coded) -> tuple[Coded, Coded]:
        """a and T in a body."""

    # -- checks -----------------------------------------------------------------------------------------------------
    def features(self, call: Call) -> int:
        """n: the length of the last axis."""
        return call.x[0].sample_shape[-1]

    def norm_format(self, call: Call) -> Fixed:
        """Format of z, checked."""
        fmt = call.format_attr("norm_format")
        if fmt.per_channel or fmt.bipolar or fmt.width > 31 or not 0 <= fmt.fracs[0] <= MAX_FRAC:
            raise call.refuse(
                f"norm_format is {fmt}",
                f"expected at most 31 bits, one binary point and 0 to {MAX_FRAC} fractional bits",
            )
        return fmt

    def _checked(self, call: Call) -> None:
        x = call.x[0]
        if not x.batched or not x.sample_shape:
            raise call.refuse(f"an input of shape {x.shape}", "expected a batch and at least one axis to normalise")
        if not 0 <= call.attrs["eps"] < LIMIT or self.largest_total(call) >= LIMIT:
            raise call.refuse(
                f"sums of squares of up to {self.largest_total(call)} with eps={call.attrs['eps']}",
                "expected less than 2**62; requantise the input to fewer bits",
            )
        low, high = self.numerator_interval(call)
        if max(-low, high) << MANTISSA_BITS >= LIMIT:
            raise call.refuse(f"{low} to {high} to be scaled", "expected less than 46 bits; narrow the input")
        fmt = call.format_attr("w_format") if call.attrs["w_format"] else None
        if (fmt is None) != (len(call.x) < 2):
            raise call.refuse(f"{len(call.x)} inputs with w_format={fmt}", "give a gain and its format, or neither")
        for index, kind in ((1, "gain"), (2, "bias")):
            if index >= len(call.x):
                continue
            codes = call.constant(index)
            if codes is None or codes.shape != (self.features(call),):
                found = "is computed" if codes is None else f"has shape {codes.shape}"
                raise call.refuse(f"its {kind} {found}", f"expected {self.features(call)} constant codes")
            if index == 1 and (fmt is None or fmt.per_channel or not formats.holds_codes(codes, fmt)):
                raise call.refuse(f"its gain does not fit {fmt}", "expected one binary point that holds all codes")
            if index == 2 and not -(1 << 31) <= int(codes.min()) <= int(codes.max()) < 1 << 31:
                raise call.refuse("a bias code needs more than 32 bits", "narrow the fraction of the norm or the gain")

    def frac(self, call: Call) -> int:
        """Fractional bits of the exact result."""
        gain = call.format_attr("w_format").fracs[0] if call.attrs["w_format"] else 0
        return self.norm_format(call).fracs[0] + gain

    # -- meaning ----------------------------------------------------------------------------------------------------
    def _reach(self, call: Call) -> int:
        """A bound of |z| before its overflow: no value of a row is larger than sqrt(n)."""
        return math.isqrt(self.features(call) << 2 * self.norm_format(call).fracs[0]) + 2

    def norm_interval(self, call: Call) -> tuple[int, int]:
        """Interval of z."""
        low, high = self.numerator_interval(call)
        reach = self._reach(call)
        return overflow_interval(-reach if low < 0 else 0, reach if high > 0 else 0, self.norm_format(call))

    def bounds(self, call: Call) -> Bounds:
        self._checked(call)
        low, high = self.norm_interval(call)
        if len(call.x) < 2:
            return Bounds((low, high), (min(low, 0), max(high, 0)))
        gain, bias = call.constant(1), call.constant(2)
        assert gain is not None
        return sum_bounds(gain[:, None], low, high, bias)

    def infer(self, call: Call) -> tuple[Result, ...]:
        low, high = call.bounds.final
        frac = self.frac(call)
        check_bias_grid(call, np.array([frac]))
        fmt = accumulator(low, high, (frac,)) if len(call.x) > 1 else self.norm_format(call)
        return (Result(call.x[0].shape, fmt, low, high),)

    def first_shift(self, call: Call) -> int:
        """s of the module's text for e - g = 0."""
        return UNIT_BITS - root_of(self.count(call))[1] - self.norm_format(call).fracs[0]

    def normalized(self, call: Call, x: np.ndarray) -> np.ndarray:
        """z."""
        fmt = self.norm_format(call)
        numerators, totals = self.totals(call, x)
        mantissa, exponent = reciprocal_root(totals + self.offset(call), root_of(self.count(call))[0])
        shifts = exponent + self.first_shift(call)
        return formats.wrap(formats.round_shift(numerators * mantissa, shifts, fmt.rounding), fmt)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        z = self.normalized(call, x[0])
        gain, bias = call.constant(1), call.constant(2)
        if gain is not None:
            z = z * gain
        return z if bias is None else z + bias

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        z = self._emit_norm(body, call, x[0])
        if len(x) < 2:
            return z
        carrier = carrier_for(call.bounds.magnitude, minimum=z.dtype)
        z = body.binary("Mul", body.cast(z, carrier), body.cast(x[1], carrier))
        return z if len(x) < 3 else body.binary("Add", z, body.cast(x[2], carrier))

    def _emit_norm(self, body: Body, call: Call, x: Coded) -> Coded:
        fmt, (low, high), reach = self.norm_format(call), self.numerator_interval(call), self._reach(call)
        numerators, total = self.emit_totals(body, call, x)
        total = body.cast(total, np.int64)
        if self.offset(call):
            total = body.binary("Add", total, body.number(self.offset(call), total))
        top = self.largest_total(call)
        mantissa, exponent = emit_reciprocal_root(body, total, top, root_of(self.count(call))[0])
        shifts = np.arange(exponent_of(top) + 1) + self.first_shift(call)
        product = max(-low, high) << MANTISSA_BITS
        if product + (1 << int(max(shifts.max(), 0))) < 1 << 53:
            real = np.dtype(np.float64)
            value = body.binary("Mul", body.cast(numerators, real), body.cast(mantissa, real))
            factors = body.op("Gather", body.const(np.ldexp(1.0, -shifts), real), exponent.value, axis=0)
            value = body.round(body.binary("Mul", value, Coded(factors, real)), fmt.rounding)
            return body.overflow(value, fmt, -reach, reach)
        value = body.binary("Mul", body.cast(numerators, np.int64), mantissa)
        if shifts.min() < 0:
            value = body.binary("Mul", value, look_up(body, np.int64(1) << np.maximum(-shifts, 0), exponent))
        whole = look_up(body, np.int64(1) << np.maximum(shifts, 0), exponent)
        return body.overflow(body.round_div_int64(value, whole, fmt.rounding), fmt, -reach, reach)

    # -- targets ----------------------------------------------------------------------------------------------------
    def row_major(self, call: Call) -> bool:
        return len(call.x[0].sample_shape) > 1

    def native(self, call: Call) -> Native:
        fmt, (low, high) = self.norm_format(call), self.numerator_interval(call)
        top = self.largest_total(call)
        params: dict[str, int | tuple[int, ...]] = {
            "rows": call.x[0].size // self.features(call),
            "features": self.features(call),
            "total_offset": self.offset(call),
            "root": root_of(self.count(call))[0],
            "norm_shift": self.first_shift(call),
            "exponent_max": exponent_of(top),
            "total_bits": top.bit_length(),
            "numerator_bits": accumulator(min(low, -1), max(high, 1), (0,)).width,
            "norm_rounding": formats.ROUNDINGS.index(fmt.rounding),
            "norm_overflow": formats.OVERFLOWS.index(fmt.overflow),
            "norm_reach": self._reach(call),
            "norm_min": fmt.rails[0],
            "norm_max": fmt.rails[1],
            "has_gain": int(len(call.x) > 1),
            "has_bias": int(len(call.x) > 2),
        }
        names = {1: "gain", 2: "bias"}
        return Native(params, {name: call.constants[i] for i, name in names.items() if i < len(call.x)})

    def cost(self, call: Call) -> Cost:
        size, rows = call.x[0].size, call.x[0].size // self.features(call)
        gains = len(call.x) > 1
        bits = 0 if not gains else self.features(call) * (call.format_attr("w_format").width + 32 * (len(call.x) > 2))
        return Cost((2 + gains) * size + 4 * rows, (1 + (len(call.x) > 2)) * size, bits)

    def cases(self) -> list[Call]:
        made = []
        shapes = ((None, 1), (None, 7), (None, 64), (None, 3, 5), (None, 2, 3, 13))
        settings = (
            ("fixed<8,4>", "fixed<16,4,RND,SAT>", 0, ""),
            ("fixed<8,1>", "fixed<8,3,RND_CONV,SAT_SYM>", 5, "fixed<8,4,RND,SAT>"),
            ("ufixed<5,2>", "fixed<4,1,TRN,WRAP>", 1, "ufixed<6,3,RND_ZERO,SAT>"),
            ("fixed<16,6>", "fixed<20,6,RND_INF,SAT_ZERO>", 100, ""),
            ("fixed<2,1>", "ufixed<12,3,TRN_ZERO,SAT>", 0, "fixed<6,2,RND_MIN_INF,WRAP>"),
            ("fixed<22,9>", "fixed<27,4,RND_MIN_INF,SAT>", 1 << 20, "fixed<16,5,TRN_ZERO,SAT>"),
        )
        most = self.arity[1]
        for s, shape in enumerate(shapes):
            n = int(shape[-1] or 1)
            for i, (x_fmt, norm, eps, requantize) in enumerate(settings):
                operands, constants = [tensor(x_fmt, shape)], {}
                attrs = {"eps": eps, "norm_format": norm, "requantize": requantize}
                given = (i + s) % most + 1 if i else 1
                if given > 1:
                    w, constants[1] = constant("fixed<8,2>", random_codes("fixed<8,2>", (n,), s + i))
                    attrs["w_format"] = "fixed<8,2>"
                    operands.append(w)
                if given > 2:
                    b, constants[2] = constant("fixed<16,8>", random_codes("fixed<16,8>", (n,), s + i + 1), "b")
                    operands.append(b)
                made.append(Call(self, f"{'x'.join(map(str, shape[1:]))}_{x_fmt}_{given}", operands, attrs, constants))
        return made
