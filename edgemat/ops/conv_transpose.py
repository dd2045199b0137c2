"""ConvTranspose: 2-D transposed convolution as an exact integer sum (the gradient of Conv by its input)."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgemat.body import Body, Coded
from edgemat.formats import accumulator, uniform
from edgemat.op import Attr, Bounds, Call, Cost, Native, Op, Result
from edgemat.ops.accumulation import (
    emit_bias,
    emit_limb_products,
    emit_shifted_weights,
    exact_matmul,
    input_shifts,
    shifted_weights,
    sum_bounds,
    term_bounds,
)
from edgemat.ops.bit_operations import channel_bits, constant_bits
from edgemat.ops.cases import constant, random_codes, tensor
from edgemat.ops.conv import check_geometry, plane, window_params
from edgemat.ops.linear import by_output, check_bias_grid, check_weights, shift_limit, weight_fracs
from edgemat.ops.shift_add import KHOT_ATTRIBUTE, digit_params, khot_cases, without_multiplies


class ConvTranspose(Op):
    """Transposed convolution of x [N, C, *S] with w [C, O/groups, *K] and b [O] (optional)."""

    name = "ConvTranspose"
    stem = "conv_transpose"
    arity = (2, 3)
    attributes = {
        "w_format": Attr(str),
        "b_format": Attr(str, "", optional=True),
        "strides": Attr(tuple),
        "pads": Attr(tuple),
        "dilations": Attr(tuple),
        "output_padding": Attr(tuple),
        "groups": Attr(int, 1),
        **KHOT_ATTRIBUTE,
    }
    has_epilogue = True
    keeps_channels = True

    def _shifts(self, call: Call) -> np.ndarray | None:
        """Left shifts of the weights, broadcasting against [C, O/groups, *K] (-1: left out), or None."""
        check_weights(call, len(call.x) > 2)
        w = call.constant(1)
        assert w is not None
        shifts = input_shifts(call, shift_limit(w)) if w.shape[0] == call.x[0].shape[1] else None
        return None if shifts is None else shifts.reshape((-1,) + (1,) * (w.ndim - 1))

    def aligned(self, call: Call) -> tuple[np.ndarray, np.ndarray | None]:
        """Weights and bias that multiply input codes as they are: on the grid of the finest input channel."""
        shifts, w = self._shifts(call), call.constant(1)
        assert w is not None
        return w if shifts is None else shifted_weights(w, shifts), call.constant(2)

    def _by_output(self, call: Call) -> np.ndarray:
        """Weights as [O, C/groups, *K]."""
        return by_output(call, self.aligned(call)[0])

    def bounds(self, call: Call) -> Bounds:
        w = self._by_output(call)
        flat = w.reshape(w.shape[0], -1)
        if call.x[0].format.widths is None:
            return sum_bounds(flat, min(call.x[0].lo, 0), max(call.x[0].hi, 0), call.constant(2))
        source, (lows, highs) = self.aligned(call)[0], call.x[0].channel_intervals()
        if lows.size not in (1, source.shape[0]):
            raise call.refuse(f"input {call.x[0].shape} with weights {source.shape}", "channels must agree")
        ends = []
        for end in (np.minimum(lows, 0), np.maximum(highs, 0)):
            full = np.broadcast_to(end.reshape((-1,) + (1,) * (source.ndim - 1)), source.shape)
            ends.append(by_output(call, full).reshape(flat.shape))
        return term_bounds(flat, ends[0], ends[1], call.constant(2))

    def infer(self, call: Call) -> tuple[Result, ...]:
        x, (w, _) = call.x[0], self.aligned(call)
        rank, groups = w.ndim - 2, call.attrs["groups"]
        if rank not in (1, 2) or len(x.shape) != rank + 2 or groups < 1 or w.shape[0] % groups:
            raise call.refuse(f"input {x.shape}, weights {w.shape}, {groups} groups", "expected 1-D or 2-D")
        check_geometry(call, rank)
        if w.shape[0] != x.shape[1] or len(call.attrs["output_padding"]) != rank:
            raise call.refuse(f"input {x.shape} with weights {w.shape}", "channels and output_padding must agree")
        for extra, stride, dilation in zip(
            call.attrs["output_padding"], call.attrs["strides"], call.attrs["dilations"], strict=True
        ):
            if not 0 <= extra < max(stride, dilation):
                raise call.refuse(f"output_padding {extra}", "expected less than the stride or the dilation")
        pads, spatial = call.attrs["pads"], []
        for i in range(rank):
            reach = call.attrs["dilations"][i] * (w.shape[2 + i] - 1) + 1
            extent = (int(x.shape[2 + i] or 0) - 1) * call.attrs["strides"][i] + reach
            spatial.append(extent - pads[i] - pads[rank + i] + call.attrs["output_padding"][i])
        if min(spatial) < 1:
            raise call.refuse(f"an output of {spatial}", "reduce the padding")
        channels = w.shape[1] * groups
        fracs = weight_fracs(call, channels) + x.format.finest
        check_bias_grid(call, fracs)
        lo, hi = call.bounds.final
        fmt = accumulator(lo, hi, uniform(tuple(fracs.tolist())))
        return (Result((x.shape[0], channels, *spatial), fmt, lo, hi),)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        w, b = self.aligned(call)
        rank, groups = w.ndim - 2, call.attrs["groups"]
        kernel = w.shape[2:] if rank == 2 else (1, w.shape[2])
        strides, dilations = plane(call.attrs["strides"], 1), plane(call.attrs["dilations"], 1)
        top, left = plane(call.attrs["pads"][:rank], 0)
        out_h, out_w = plane(tuple(int(d or 0) for d in call.exact[0].shape[2:]), 1)
        data = x[0].reshape(x[0].shape[0], x[0].shape[1], *plane(x[0].shape[2:], 1))
        n, c, in_h, in_w = data.shape
        per = w.shape[1]
        reach_h = max((in_h - 1) * strides[0] + dilations[0] * (kernel[0] - 1) + 1, top + out_h)
        reach_w = max((in_w - 1) * strides[1] + dilations[1] * (kernel[1] - 1) + 1, left + out_w)
        full = np.zeros((n, groups * per, reach_h, reach_w), np.int64)
        flat = np.moveaxis(data, 1, -1)
        w4 = w.reshape(c, per, *kernel)
        for g in range(groups):
            part = slice(g * (c // groups), (g + 1) * (c // groups))
            for i in range(kernel[0]):
                for j in range(kernel[1]):
                    piece = exact_matmul(flat[..., part], w4[part, :, i, j], call.bounds.magnitude)
                    rows = slice(i * dilations[0], i * dilations[0] + (in_h - 1) * strides[0] + 1, strides[0])
                    cols = slice(j * dilations[1], j * dilations[1] + (in_w - 1) * strides[1] + 1, strides[1])
                    full[:, g * per : (g + 1) * per, rows, cols] += np.moveaxis(piece, -1, 1)
        out = full[:, :, top : top + out_h, left : left + out_w]
        out = out.reshape(n, groups * per, *(int(d or 0) for d in call.exact[0].shape[2:]))
        return out if b is None else out + b.reshape((-1,) + (1,) * rank)

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        w, _ = self.aligned(call)
        shifts = self._shifts(call)
        acc = emit_limb_products(
            body,
            "ConvTranspose",
            x[0],
            (min(call.x[0].lo, 0), max(call.x[0].hi, 0)),
            x[1] if shifts is None else emit_shifted_weights(body, x[1], shifts),
            (int(w.min()), int(w.max())),
            w.size // w.shape[1],
            call.bounds.magnitude,
            strides=list(call.attrs["strides"]),
            pads=list(call.attrs["pads"]),
            dilations=list(call.attrs["dilations"]),
            output_padding=list(call.attrs["output_padding"]),
            group=call.attrs["groups"],
        )
        return emit_bias(body, acc, x[2] if len(x) > 2 else None, w.ndim)

    def native(self, call: Call) -> Native:
        w, b = self._by_output(call), call.constant(2)
        params = window_params(call, w.shape[2:])
        dilation_h, dilation_w = plane(call.attrs["dilations"], 1)
        params |= {"out_c": w.shape[0], "dilation_h": dilation_h, "dilation_w": dilation_w}
        params |= {"groups": call.attrs["groups"], "has_bias": int(b is not None), **digit_params(call)}
        weight = np.ascontiguousarray(np.moveaxis(w if w.ndim == 4 else w[:, :, None, :], 1, -1))
        return Native(params, {"weight": weight} if b is None else {"weight": weight, "bias": b})

    def cost(self, call: Call) -> Cost:
        w, b = self.aligned(call)
        places = int(np.prod(call.x[0].sample_shape[1:]))
        work, bits = w.size * places, w.size * call.format_attr("w_format").width + (0 if b is None else 32 * b.size)
        operand = channel_bits(call.x[0]).reshape((-1,) + (1,) * (w.ndim - 1))
        cost = Cost(work, work, bits, places * int((constant_bits(w) * operand).sum()))
        return without_multiplies(call, cost, w, places)

    def cases(self) -> list[Call]:
        made = []
        for index, (shape, outs, kernel, strides, pads, extra, groups) in enumerate(
            [
                ((3, 4, 5), 2, (3, 3), (1, 1), (1, 1, 1, 1), (0, 0), 1),
                ((4, 3, 3), 4, (3, 2), (2, 2), (1, 0, 1, 0), (1, 0), 2),
                ((2, 1, 1), 3, (2, 2), (2, 2), (0, 0, 0, 0), (0, 0), 1),
                ((3, 6), 2, (4,), (2,), (1, 1), (0,), 1),
            ]
        ):
            for x_fmt, requantize in (("fixed<8,3>", ""), ("ufixed<6,3>", "fixed<8,5>"), ("fixed<16,3>", "")):
                w_fmt = "fixed<8,1>"
                w = constant(w_fmt, random_codes(w_fmt, (shape[0], outs // groups, *kernel), index))
                b = constant("fixed<12,4>", random_codes("fixed<10,0>", (outs,), index), "b")
                attrs: dict[str, Any] = {
                    "w_format": w_fmt,
                    "strides": strides,
                    "pads": pads,
                    "dilations": (1,) * len(kernel),
                }
                attrs |= {"output_padding": extra, "groups": groups, "requantize": requantize}
                x = tensor(x_fmt, (None, *shape))
                made.append(Call(self, f"{index}_{x_fmt}", [x, w[0], b[0]], attrs, {1: w[1], 2: b[1]}))
        w = constant("fixed<8,1>", random_codes("fixed<8,1>", (4, 2, 3, 2), 5))
        b = constant("fixed<12,4>", random_codes("fixed<10,0>", (4,), 5), "b")
        attrs = {"w_format": "fixed<8,1>", "strides": (2, 1), "pads": (1, 0, 1, 0), "dilations": (1, 1)}
        attrs |= {"output_padding": (1, 0), "groups": 2}
        for x_fmt in ("fixed<8,[3,2,7,-1]>", "fixed<[6,3,0,8],[1,2,30,3]>", "ufixed<[2,0,5,16],[1,1,2,8]>"):
            for requantize in ("", "fixed<[6,0,4,8],[5,1,2,9],RND_CONV,SAT>"):
                x = tensor(x_fmt, (None, 4, 3, 4))
                full = {**attrs, "requantize": requantize}
                made.append(Call(self, f"inputs_{x_fmt}_{requantize}", [x, w[0], b[0]], full, {1: w[1], 2: b[1]}))
        return [*made, *khot_cases(made)]
