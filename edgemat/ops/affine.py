"""Affine: ``y = a[c] * x + b[c]`` per channel of axis 1: batch norm kept as fixed-point arithmetic (QFX's way)."""

from __future__ import annotations

import numpy as np

from edgemat.body import Body, Coded
from edgemat.formats import accumulator, uniform
from edgemat.op import Attr, Bounds, Call, Cost, Native, Op, Result, carrier_for
from edgemat.ops.accumulation import emit_bias, sum_bounds, term_bounds
from edgemat.ops.bit_operations import channel_bits, constant_bits
from edgemat.ops.cases import constant, random_codes, tensor
from edgemat.ops.linear import check_bias_grid, check_weights, weight_fracs
from edgemat.ops.shift_add import KHOT_ATTRIBUTE, digit_params, khot_cases, without_multiplies


class Affine(Op):
    """Inputs x [N, C, ...], a [C], b [C]; b lies on the grid ``frac_x + frac_a`` of its channel."""

    name = "Affine"
    stem = "affine"
    arity = (3, 3)
    attributes = {"w_format": Attr(str), "b_format": Attr(str, "", optional=True), **KHOT_ATTRIBUTE}
    has_epilogue = True
    keeps_channels = True

    def _operands(self, call: Call) -> tuple[np.ndarray, np.ndarray]:
        check_weights(call, True)
        a, b = call.constant(1), call.constant(2)
        assert a is not None and b is not None
        if len(call.x[0].shape) < 2 or a.shape != (call.x[0].shape[1],) or b.shape != a.shape:
            raise call.refuse(f"scales {a.shape} and offsets {b.shape} for input {call.x[0].shape}", "one per channel")
        return a, b

    def bounds(self, call: Call) -> Bounds:
        a, b = self._operands(call)
        if call.x[0].format.widths is None:
            return sum_bounds(a[:, None], call.x[0].lo, call.x[0].hi, b)
        lows, highs = call.x[0].channel_intervals()
        return term_bounds(a[:, None], lows[:, None], highs[:, None], b)

    def infer(self, call: Call) -> tuple[Result, ...]:
        a, _ = self._operands(call)
        fracs = weight_fracs(call, a.size) + np.asarray(call.x[0].format.fracs, np.int64)
        check_bias_grid(call, fracs)
        lo, hi = call.bounds.final
        return (Result(call.x[0].shape, accumulator(lo, hi, uniform(tuple(fracs.tolist()))), lo, hi),)

    def _lay(self, values: np.ndarray, ndim: int) -> np.ndarray:
        return values.reshape((-1,) + (1,) * (ndim - 2))

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        a, b = self._operands(call)
        return x[0] * self._lay(a, x[0].ndim) + self._lay(b, x[0].ndim)

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        ndim = len(call.x[0].shape)
        carrier = carrier_for(call.bounds.magnitude)
        scale = body.cast(x[1], carrier)
        if ndim > 2:
            lay = body.const([-1] + [1] * (ndim - 2), np.int64)
            scale = Coded(body.op("Reshape", scale.value, lay), carrier)
        return emit_bias(body, body.binary("Mul", body.cast(x[0], carrier), scale), x[2], ndim)

    def native(self, call: Call) -> Native:
        a, b = self._operands(call)
        return Native({"size": call.x[0].size, "channels": a.size, **digit_params(call)}, {"scale": a, "bias": b})

    def cost(self, call: Call) -> Cost:
        a, _ = self._operands(call)
        bits = a.size * (call.format_attr("w_format").width + 32)
        places = call.x[0].size // a.size
        ebops = places * int((constant_bits(a) * channel_bits(call.x[0])).sum())
        return without_multiplies(call, Cost(call.x[0].size, call.x[0].size, bits, ebops), a, places)

    def cases(self) -> list[Call]:
        made = []
        for index, shape in enumerate([(None, 1), (None, 5), (None, 3, 4), (None, 4, 3, 5)]):
            channels = int(shape[1] or 1)
            for requantize in ("", "fixed<8,4>", "ufixed<6,4,TRN,SAT>"):
                a = constant("fixed<8,2>", random_codes("fixed<8,2>", (channels,), index))
                b = constant("fixed<16,8>", random_codes("fixed<12,2>", (channels,), index + 3), "b")
                attrs = {"w_format": "fixed<8,2>", "requantize": requantize}
                x = tensor("fixed<8,3>", shape)
                made.append(Call(self, f"{index}_{requantize}", [x, a[0], b[0]], attrs, {1: a[1], 2: b[1]}))
        a = constant("fixed<[8,0,3],[2,2,4]>", np.array([-77, 0, 3]))
        b = constant("fixed<16,8>", random_codes("fixed<12,2>", (3,), 8), "b")
        for x_fmt in ("fixed<8,[3,1,4]>", "fixed<[8,0,2],[3,-4,9]>", "bipolar"):
            for requantize in ("", "fixed<[7,2,0],[6,2,3]>"):
                attrs = {"w_format": "fixed<[8,0,3],[2,2,4]>", "requantize": requantize}
                x = tensor(x_fmt, (None, 3, 4))
                made.append(Call(self, f"{x_fmt}_{requantize}", [x, a[0], b[0]], attrs, {1: a[1], 2: b[1]}))
        return [*made, *khot_cases(made)]
