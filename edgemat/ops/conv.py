"""Conv: 1-D and 2-D convolution with stride, padding, dilation and groups, as an exact integer sum.

Padding contributes the value 0, so the input's interval is widened to contain 0 where there is any. Input channels may
have binary points and widths of their own: weights are shifted left to the grid of the finest channel, and those of
channels that are always 0 left out.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgemat.body import Body, Coded
from edgemat.formats import Fixed, accumulator, uniform
from edgemat.op import MAX_ELEMENTS, Attr, Bounds, Call, Cost, Native, Op, Result
from edgemat.ops.accumulation import (
    emit_bias,
    emit_limb_products,
    emit_shifted_weights,
    exact_matmul,
    input_shifts,
    shifted_weights,
    sum_bounds,
    term_bounds,
    windows,
)
from edgemat.ops.bit_operations import channel_bits, constant_bits
from edgemat.ops.cases import constant, random_codes, tensor
from edgemat.ops.linear import check_bias_grid, check_weights, shift_limit, sign_additions, sign_params, weight_fracs
from edgemat.ops.shift_add import KHOT_ATTRIBUTE, digit_params, khot_cases, without_multiplies
from edgemat.ops.stated_accumulator import ACCUMULATOR, prove


def plane(values: tuple[int, ...], missing: int) -> tuple[int, int]:
    """Spatial values as (height, width); 1-D operators are 2-D ones of height 1."""
    return (missing, values[0]) if len(values) == 1 else (values[0], values[1])


def window_params(call: Call, kernel: tuple[int, ...]) -> dict[str, int | tuple[int, ...]]:
    """The geometry that convolutions and poolings share, for native kernels."""
    x, y = call.x[0].sample_shape, call.exact[0].shape[1:]
    rank = len(kernel)
    pads = call.attrs["pads"]
    top, left = plane(pads[:rank], 0)
    bottom, right = plane(pads[rank:], 0)
    (in_h, in_w), (out_h, out_w) = plane(x[1:], 1), plane(tuple(int(d or 0) for d in y[1:]), 1)
    (kernel_h, kernel_w), (stride_h, stride_w) = plane(kernel, 1), plane(call.attrs["strides"], 1)
    return {
        "in_h": in_h,
        "in_w": in_w,
        "in_c": x[0],
        "out_h": out_h,
        "out_w": out_w,
        "kernel_h": kernel_h,
        "kernel_w": kernel_w,
        "stride_h": stride_h,
        "stride_w": stride_w,
        "pad_top": top,
        "pad_left": left,
        "pad_bottom": bottom,
        "pad_right": right,
    }


def check_geometry(call: Call, rank: int, keys: tuple[str, ...] = ("strides", "dilations")) -> None:
    """Refuses strides, dilations or pads of the wrong length or sign."""
    for key in keys:
        if len(call.attrs[key]) != rank or not 1 <= min(call.attrs[key]) <= max(call.attrs[key]) < MAX_ELEMENTS:
            raise call.refuse(f"{key} {call.attrs[key]}", f"expected {rank} positive integers")
    if (
        len(call.attrs["pads"]) != 2 * rank
        or not 0 <= min(call.attrs["pads"]) <= max(call.attrs["pads"]) < MAX_ELEMENTS
    ):
        raise call.refuse(f"pads {call.attrs['pads']}", f"expected {2 * rank} integers of at least 0")


def output_extent(size: int, kernel: int, stride: int, dilation: int, pad: int) -> int:
    """Output length along one axis (floor mode)."""
    return (size + pad - dilation * (kernel - 1) - 1) // stride + 1


def by_weight(call: Call, values: np.ndarray) -> np.ndarray:
    """Values of the input channels, [C] or [1], laid out to broadcast against weights [O, C/groups, *K]."""
    w = call.constant(1)
    assert w is not None
    if values.size == 1:
        return values.reshape((1,) * w.ndim)
    groups = call.attrs["groups"]
    if groups < 1 or values.size != w.shape[1] * groups or w.shape[0] % groups:
        raise call.refuse(f"{values.size} input channels, weights {w.shape} and {groups} groups", "they must agree")
    rows = np.repeat(values.reshape(groups, -1), w.shape[0] // groups, axis=0)
    return rows.reshape(w.shape[0], w.shape[1], *(1,) * (w.ndim - 2))


class Conv(Op):
    """Convolution of x [N, C, *S] with w [O, C/groups, *K] and b [O] (optional)."""

    name = "Conv"
    stem = "conv"
    arity = (2, 3)
    attributes = {
        "w_format": Attr(str),
        "b_format": Attr(str, "", optional=True),
        "strides": Attr(tuple),
        "pads": Attr(tuple),
        "dilations": Attr(tuple),
        "groups": Attr(int, 1),
        **KHOT_ATTRIBUTE,
        **ACCUMULATOR,
    }
    has_epilogue = True
    keeps_channels = True

    def _shifts(self, call: Call) -> np.ndarray | None:
        """Left shifts of the weights, broadcasting against [O, C/groups, *K] (-1: left out), or None."""
        check_weights(call, len(call.x) > 2)
        w = call.constant(1)
        assert w is not None
        shifts = input_shifts(call, shift_limit(w))
        return None if shifts is None else by_weight(call, shifts)

    def aligned(self, call: Call) -> tuple[np.ndarray, np.ndarray | None]:
        """Weights and bias that multiply input codes as they are: on the grid of the finest input channel."""
        shifts, w = self._shifts(call), call.constant(1)
        assert w is not None
        return w if shifts is None else shifted_weights(w, shifts), call.constant(2)

    def _fracs(self, call: Call) -> tuple[int, ...]:
        w, _ = self.aligned(call)
        fracs = weight_fracs(call, w.shape[0]) + call.x[0].format.finest
        check_bias_grid(call, fracs)
        return uniform(tuple(fracs.tolist()))

    def _input_range(self, call: Call) -> tuple[int, int]:
        x = call.x[0]
        return (min(x.lo, 0), max(x.hi, 0)) if any(call.attrs["pads"]) else (x.lo, x.hi)

    def bounds(self, call: Call) -> Bounds:
        w, b = self.aligned(call)
        flat = w.reshape(w.shape[0], -1)
        if call.x[0].format.widths is None:
            return prove(call, sum_bounds(flat, *self._input_range(call), b), self._fracs(call))
        padded = any(call.attrs["pads"])
        lows, highs = call.x[0].channel_intervals()
        lows, highs = (np.minimum(lows, 0), np.maximum(highs, 0)) if padded else (lows, highs)
        lows, highs = (np.broadcast_to(by_weight(call, e), w.shape).reshape(flat.shape) for e in (lows, highs))
        return prove(call, term_bounds(flat, lows, highs, b), self._fracs(call))

    def infer(self, call: Call) -> tuple[Result, ...]:
        x, (w, _) = call.x[0], self.aligned(call)
        rank = w.ndim - 2
        groups = call.attrs["groups"]
        if rank not in (1, 2) or len(x.shape) != rank + 2:
            raise call.refuse(f"input of shape {x.shape} with weights {w.shape}", "expected 1-D or 2-D convolution")
        check_geometry(call, rank)
        if groups < 1 or w.shape[1] * groups != x.shape[1] or w.shape[0] % groups:
            raise call.refuse(
                f"{x.shape[1]} input channels, weights {w.shape} and {groups} groups",
                "channels must divide by groups",
            )
        pads = call.attrs["pads"]
        spatial = tuple(
            output_extent(
                int(x.shape[2 + i] or 0),
                w.shape[2 + i],
                call.attrs["strides"][i],
                call.attrs["dilations"][i],
                pads[i] + pads[rank + i],
            )
            for i in range(rank)
        )
        if min(spatial) < 1:
            raise call.refuse(f"the kernel {w.shape[2:]} is larger than the padded input {x.shape}", "pad the input")
        lo, hi = call.bounds.final
        return (Result((x.shape[0], w.shape[0], *spatial), accumulator(lo, hi, self._fracs(call)), lo, hi),)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        w, b = self.aligned(call)
        rank = w.ndim - 2
        groups = call.attrs["groups"]
        view = windows(x[0], w.shape[2:], call.attrs["strides"], call.attrs["dilations"], call.attrs["pads"], 0)
        n, _, *rest = view.shape
        spatial = rest[:rank]
        columns = np.moveaxis(view, 1, 1 + rank).reshape(n, *spatial, groups, -1)
        per = w.shape[0] // groups
        parts = []
        for g in range(groups):
            weight = w[g * per : (g + 1) * per].reshape(per, -1)
            parts.append(exact_matmul(columns[..., g, :], weight.T, call.bounds.magnitude))
        out = np.concatenate(parts, axis=-1)
        return np.moveaxis(out if b is None else out + b, -1, 1)

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        w, _ = self.aligned(call)
        shifts = self._shifts(call)
        weight = x[1] if shifts is None else emit_shifted_weights(body, x[1], shifts)
        acc = (
            emit_limb_products(
                body,
                "Conv",
                x[0],
                self._input_range(call),
                weight,
                (int(w.min()), int(w.max())),
                w[0].size,
                call.bounds.magnitude,
                strides=list(call.attrs["strides"]),
                pads=list(call.attrs["pads"]),
                dilations=list(call.attrs["dilations"]),
                group=call.attrs["groups"],
            )
            if call.bounds.magnitude >= 1 << 24
            else self._direct(body, call, x[0], weight)
        )
        return emit_bias(body, acc, x[2] if len(x) > 2 else None, w.ndim)

    def _direct(self, body: Body, call: Call, x: Coded, weight: Coded) -> Coded:
        single = np.dtype(np.float32)
        out = body.op(
            "Conv",
            body.cast(x, single).value,
            body.cast(weight, single).value,
            strides=list(call.attrs["strides"]),
            pads=list(call.attrs["pads"]),
            dilations=list(call.attrs["dilations"]),
            group=call.attrs["groups"],
        )
        return Coded(out, single)

    def native(self, call: Call) -> Native:
        w, b = self.aligned(call)
        params = window_params(call, w.shape[2:])
        dilation_h, dilation_w = plane(call.attrs["dilations"], 1)
        params |= {
            "out_c": w.shape[0],
            "dilation_h": dilation_h,
            "dilation_w": dilation_w,
            "groups": call.attrs["groups"],
            "has_bias": int(b is not None),
            **sign_params(call, w),
            **digit_params(call),
        }
        weight = np.ascontiguousarray(np.moveaxis(w if w.ndim == 4 else w[:, :, None, :], 1, -1))
        return Native(params, {"weight": weight} if b is None else {"weight": weight, "bias": b})

    def cost(self, call: Call) -> Cost:
        w, b = self.aligned(call)
        places = math.prod(int(d or 1) for d in call.exact[0].shape[2:])
        work = w.size * places
        bits = w.size * call.format_attr("w_format").width + (0 if b is None else 32 * b.size)
        operand = by_weight(call, channel_bits(call.x[0]))
        ebops = places * int((constant_bits(w) * operand).sum())
        if sign_params(call, w):
            return Cost(0, sign_additions(w) * places, bits, ebops)
        return without_multiplies(call, Cost(work, work, bits, ebops), w, places)

    def cases(self) -> list[Call]:
        made = []
        geometries = [
            # in shape, out channels, kernel, strides, pads, dilations, groups
            ((3, 6, 5), 4, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
            ((4, 7, 7), 4, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 4),
            ((4, 5, 6), 8, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
            ((4, 9, 8), 6, (3, 2), (2, 1), (2, 0, 1, 1), (2, 3), 2),
            ((1, 1, 1), 1, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
            ((2, 11), 3, (4,), (2,), (3, 1), (1,), 1),
            ((6, 9), 6, (3,), (1,), (2, 2), (2,), 6),
        ]
        for index, (shape, outs, kernel, strides, pads, dilations, groups) in enumerate(geometries):
            for x_fmt, w_fmt, requantize in (
                ("fixed<8,3>", "fixed<6,0>", ""),
                ("ufixed<6,2>", "fixed<6,1>", "ufixed<6,5>"),
                ("fixed<8,3>", "fixed<8,0>", "fixed<8,6,RND_CONV,WRAP>"),
                ("fixed<16,3>", "fixed<16,0>", "fixed<16,9>"),
            ):
                w = constant(w_fmt, random_codes(w_fmt, (outs, shape[0] // groups, *kernel), index))
                b = constant("fixed<16,8>", random_codes("fixed<10,0>", (outs,), index + 9), "b")
                attrs = {
                    "w_format": w_fmt,
                    "strides": strides,
                    "pads": pads,
                    "dilations": dilations,
                    "groups": groups,
                    "requantize": requantize,
                }
                x = tensor(x_fmt, (None, *shape))
                name = f"g{index}_{x_fmt}_{requantize}"
                made.append(Call(self, name, [x, w[0], b[0]], attrs, {1: w[1], 2: b[1]}))
        w_fmt = "fixed<6,[1,0,-2]>"
        w = constant(w_fmt, random_codes("fixed<6,0>", (3, 2, 3, 3), 5))
        attrs = {"w_format": w_fmt, "strides": (1, 1), "pads": (1, 1, 1, 1), "dilations": (1, 1)}
        x = tensor("fixed<8,3>", (None, 2, 4, 4))
        made.append(Call(self, "channels", [x, w[0]], attrs, {1: w[1]}))
        made.append(Call(self, "channels_rq", [x, w[0]], {**attrs, "requantize": "fixed<8,6>"}, {1: w[1]}))
        for index, (shape, outs, kernel, strides, pads, dilations, groups) in enumerate(geometries):
            for points, x_fmt, requantize in (
                ("1", "fixed<8,3>", "fixed<6,4>"),
                ("[" + ",".join(str(o % 3) for o in range(outs)) + "]", "ufixed<8,8>", "fixed<8,9,RND_CONV,SAT>"),
            ):
                codes = random_codes("fixed<2,0,RND,SAT_SYM>", (outs, shape[0] // groups, *kernel), 60 + index)
                w = constant("fixed<2,0,RND,SAT_SYM>", codes)
                attrs = {"w_format": f"fixed<2,{points},RND,SAT_SYM>", "requantize": requantize, "groups": groups}
                attrs |= {"strides": strides, "pads": pads, "dilations": dilations}
                x = tensor(x_fmt, (None, *shape))
                made.append(Call(self, f"ternary{index}_{points}", [x, w[0]], attrs, {1: w[1]}))
        return [*made, *self._channel_cases()]

    def _channel_cases(self) -> list[Call]:
        """Input and output channels of different binary points and widths."""
        made = []
        narrow = "fixed<[6,0,4,8],[5,1,2,9],RND_CONV,SAT>"
        for groups, kernel, w_fmt in (
            (1, (3, 3), "fixed<6,[1,0,-2,2]>"),
            (2, (3, 2), "fixed<6,1>"),
            (4, (3,), "fixed<12,1>"),
        ):
            codes = random_codes(w_fmt.replace("[1,0,-2,2]", "1"), (4, 4 // groups, *kernel), groups)
            w = constant(w_fmt, codes)
            b = constant("fixed<16,8>", random_codes("fixed<10,0>", (4,), 3), "b")
            for x_fmt in (
                "fixed<8,[3,2,7,-1]>",
                "fixed<[6,3,0,8],[1,2,30,3]>",
                "ufixed<[2,0,5,16],[1,1,2,8]>",
                "bipolar",
            ):
                for requantize, pad in (("", 1), (narrow, 0), (narrow, 1)):
                    attrs: dict[str, Any] = {"w_format": w_fmt}
                    attrs |= {"strides": (1,) * len(kernel), "dilations": (1,) * len(kernel)}
                    attrs |= {"pads": (pad,) * 2 * len(kernel), "groups": groups, "requantize": requantize}
                    x = tensor(x_fmt, (None, 4, *(5, 4)[: len(kernel)]))
                    name = f"inputs_{groups}_{x_fmt}_{requantize}_{pad}"
                    made.append(Call(self, name, [x, w[0], b[0]], attrs, {1: w[1], 2: b[1]}))
        for index, (x_fmt, groups, stated) in enumerate((("ufixed<4,4>", 1, 14), ("fixed<4,1>", 4, 12))):
            w_fmt = "fixed<5,[4,2,1,4]>"
            w = constant(w_fmt, random_codes("fixed<5,0>", (4, 4 // groups, 3, 3), 20 + index))
            frac = Fixed.parse(w_fmt).fracs
            points = [stated - (f + Fixed.parse(x_fmt).fracs[0]) for f in frac]
            b = constant("fixed<8,8>", random_codes("fixed<8,0>", (4,), 30 + index), "b")
            attrs = {
                "w_format": w_fmt,
                "strides": (1, 1),
                "pads": (1, 1, 1, 1),
                "dilations": (1, 1),
                "groups": groups,
                "accumulator": str(Fixed(stated, tuple(points), rounding="TRN", overflow="WRAP")),
                "requantize": "fixed<6,5>",
            }
            x = tensor(x_fmt, (None, 4, 4, 4))
            made.append(Call(self, f"stated_{groups}", [x, w[0], b[0]], attrs, {1: w[1], 2: b[1]}))
        return [*made, *khot_cases(made)]
