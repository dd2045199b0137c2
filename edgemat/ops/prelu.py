"""PRelu and LeakyReLU: ``x`` where positive, ``slope * x`` elsewhere, slopes in fixed point."""

from __future__ import annotations

import numpy as np

from edgemat.body import Body, Coded
from edgemat.formats import accumulator
from edgemat.op import Attr, Bounds, Call, Cost, Native, Op, Result, carrier_for
from edgemat.ops.bit_operations import channel_bits, constant_bits
from edgemat.ops.cases import constant, random_codes, tensor
from edgemat.ops.shift_add import KHOT_ATTRIBUTE, check_digits, digit_params, khot_cases, without_multiplies


class PRelu(Op):
    """Inputs x [N, C, ...] and slope [C] or [1]; the result lies on the grid ``frac_x + frac_slope``.

    A slope with a negative number of fractional bits is brought to the grid of x exactly.
    """

    name = "PRelu"
    stem = "prelu"
    arity = (2, 2)
    attributes = {"slope_format": Attr(str), **KHOT_ATTRIBUTE}
    has_epilogue = True
    keeps_channels = True

    def _operands(self, call: Call) -> tuple[np.ndarray, int]:
        """Slope codes on a grid of at least 0 fractional bits, and that grid."""
        slope, fmt = call.constant(1), call.format_attr("slope_format")
        if slope is None or slope.ndim != 1 or slope.size not in (1, call.x[0].shape[1]) or fmt.per_channel:
            raise call.refuse("its slopes", "expected constant codes, one or one per channel, with one binary point")
        check_digits(call, slope)
        frac = fmt.fracs[0]
        return (slope << -frac, 0) if frac < 0 else (slope, frac)

    def infer(self, call: Call) -> tuple[Result, ...]:
        x = call.x[0]
        slope, frac = self._operands(call)
        ends = [0] if x.lo <= 0 <= x.hi else []
        ends += [v << frac for v in (x.lo, x.hi) if v > 0]
        if x.lo < 0:
            for v in (x.lo, min(x.hi, -1)):
                ends += [v * int(slope.min()), v * int(slope.max())]
        lo, hi = min(ends), max(ends)
        return (Result(x.shape, accumulator(lo, hi, tuple(f + frac for f in x.format.fracs)), lo, hi),)

    def bounds(self, call: Call) -> Bounds:
        slope, frac = self._operands(call)
        x, result = call.x[0], call.exact[0]
        top = x.magnitude * max(int(np.abs(slope).max()), 1 << frac)
        return Bounds((result.lo, result.hi), (-top, top))

    def _lay(self, slope: np.ndarray, ndim: int) -> np.ndarray:
        return slope.reshape((-1,) + (1,) * (ndim - 2)) if slope.size > 1 else slope.reshape(())

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        slope, frac = self._operands(call)
        return np.where(x[0] >= 0, x[0] << frac, x[0] * self._lay(slope, x[0].ndim))

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        slope, frac = self._operands(call)
        value = body.cast(x[0], carrier_for(call.bounds.magnitude))
        zero = body.number(0, value)
        positive = body.scale(body.maximum(value, zero), 1 << frac)
        negative = body.minimum(value, zero)
        factors = self._lay(slope, len(call.x[0].shape))
        return body.binary("Add", positive, body.binary("Mul", negative, body.number(factors, value)))

    def native(self, call: Call) -> Native:
        slope, frac = self._operands(call)
        return Native(
            {"size": call.x[0].size, "channels": slope.size, "align": frac, **digit_params(call)}, {"slope": slope}
        )

    def cost(self, call: Call) -> Cost:
        slope, _ = self._operands(call)
        operand = channel_bits(call.x[0])
        ebops = call.x[0].size // operand.size * int((constant_bits(slope) * operand).sum())
        cost = Cost(call.x[0].size, 0, 0, ebops)
        return without_multiplies(call, cost, slope, call.x[0].size // slope.size, summed=False)

    def cases(self) -> list[Call]:
        made = []
        for index, (shape, count) in enumerate((((None, 4), 1), ((None, 3, 4, 2), 3), ((None, 5, 3), 5))):
            for slope_fmt, requantize in (
                ("fixed<6,1>", ""),
                ("fixed<6,1>", "fixed<8,4>"),
                ("fixed<4,6>", ""),
            ):
                s = constant(slope_fmt, random_codes(slope_fmt, (count,), index), "slope")
                attrs = {"slope_format": slope_fmt, "requantize": requantize}
                call = Call(self, f"{index}_{slope_fmt}", [tensor("fixed<8,4>", shape), s[0]], attrs, {1: s[1]})
                made.append(call)
        s = constant("fixed<6,1>", random_codes("fixed<6,1>", (3,), 7), "slope")
        for x_fmt in ("fixed<8,[3,1,4]>", "fixed<[8,0,2],[3,-4,9]>"):
            for requantize in ("", "fixed<[7,2,0],[6,2,3],TRN_ZERO,SAT>"):
                attrs = {"slope_format": "fixed<6,1>", "requantize": requantize}
                made.append(Call(self, f"{x_fmt}_{requantize}", [tensor(x_fmt, (None, 3, 4)), s[0]], attrs, {1: s[1]}))
        return [*made, *khot_cases(made, "slope_format")]
