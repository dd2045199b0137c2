"""MaxPool and AveragePool over 1-D and 2-D maps.

The average is the Requantize of the exact rational ``sum / count``: one rounding. `count` is the kernel's area, or with
``count_include_pad = 0`` the elements inside the map; windows that `ceil_mode` lets hang over the padded edge never
count what lies beyond the padding.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgemat import formats
from edgemat.body import Body, Coded
from edgemat.formats import accumulator
from edgemat.op import Attr, Bounds, Call, Cost, Native, Op, Result, emit_requantize, shifted_interval
from edgemat.ops.accumulation import emit_limb_products, windows
from edgemat.ops.cases import tensor
from edgemat.ops.conv import check_geometry, output_extent, window_params

MAX_WINDOW = 1 << 24
"""Largest number of window elements over all channels: the body of a padded average holds that many constants."""


def pooled_extent(size: int, kernel: int, stride: int, dilation: int, begin: int, end: int, ceil_mode: int) -> int:
    """Output length; in ceil mode the last window must still start inside the input or its left padding."""
    out = output_extent(size, kernel, stride, dilation, begin + end)
    if ceil_mode:
        out = -(-(size + begin + end - dilation * (kernel - 1) - 1) // stride) + 1
        if (out - 1) * stride >= size + begin:
            out -= 1
    return out


class Pool(Op):
    """Common geometry of the poolings."""

    attributes = {
        "kernel_shape": Attr(tuple),
        "strides": Attr(tuple),
        "pads": Attr(tuple),
        "ceil_mode": Attr(int, 0),
    }
    has_epilogue = True

    def dilations(self, call: Call) -> tuple[int, ...]:
        """Dilation by axis."""
        return call.attrs.get("dilations") or (1,) * len(call.attrs["kernel_shape"])

    def output_shape(self, call: Call) -> tuple[int | None, ...]:
        """Shape of the result; refuses geometry that has none."""
        x, kernel, pads = call.x[0], call.attrs["kernel_shape"], call.attrs["pads"]
        rank = len(kernel)
        if rank not in (1, 2) or len(x.shape) != rank + 2 or min(kernel) < 1:
            raise call.refuse(f"kernel {kernel} on input {x.shape}", "expected 1-D or 2-D pooling")
        check_geometry(call, rank, ("strides",))
        for key in ("ceil_mode", "count_include_pad"):
            if call.attrs.get(key, 0) not in (0, 1):
                raise call.refuse(f"{key} {call.attrs[key]}", "expected 0 or 1")
        dilations = self.dilations(call)
        if len(dilations) != rank or min(dilations) < 1:
            raise call.refuse(f"dilations {dilations}", f"expected {rank} positive integers")
        spatial = []
        for i in range(rank):
            if max(pads[i], pads[rank + i]) >= kernel[i] * dilations[i] + 1 - dilations[i]:
                raise call.refuse(f"pads {pads} for kernel {kernel}", "padding must be smaller than the kernel")
            size, stride = int(x.shape[2 + i] or 0), call.attrs["strides"][i]
            out = pooled_extent(size, kernel[i], stride, dilations[i], pads[i], pads[rank + i], call.attrs["ceil_mode"])
            if out < 1:
                raise call.refuse(f"the kernel {kernel} is larger than the padded input {x.shape}", "pad the input")
            for start in range(-pads[i], (out - 1) * stride - pads[i] + 1, stride):
                if start >= size or not any(0 <= start + t * dilations[i] < size for t in range(kernel[i])):
                    raise call.refuse(f"a window of kernel {kernel} lies wholly in the padding", "pad less")
            spatial.append(out)
        return (x.shape[0], x.shape[1], *spatial)

    def full_pads(self, call: Call) -> tuple[int, ...]:
        """Padding as numpy needs it: the end widened to what ceil_mode's last windows reach."""
        x, kernel, pads = call.x[0].shape, call.attrs["kernel_shape"], call.attrs["pads"]
        rank = len(kernel)
        dilations = self.dilations(call)
        ends = []
        for i in range(rank):
            out = int(call.exact[0].shape[2 + i] or 0)
            reach = (out - 1) * call.attrs["strides"][i] + dilations[i] * (kernel[i] - 1) + 1
            ends.append(max(pads[rank + i], reach - int(x[2 + i] or 0) - pads[i]))
        return (*pads[:rank], *ends)

    def native(self, call: Call) -> Native:
        return Native(window_params(call, call.attrs["kernel_shape"]))


class MaxPool(Pool):
    """Largest code of each window; padding is never chosen. Formats (of channels, too) and interval stay."""

    name = "MaxPool"
    stem = "max_pool"
    attributes = {**Pool.attributes, "dilations": Attr(tuple, (), optional=True)}
    has_epilogue = False
    keeps_channels = True

    def infer(self, call: Call) -> tuple[Result, ...]:
        x = call.x[0]
        return (Result(self.output_shape(call), x.format, x.lo, x.hi),)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        kernel = call.attrs["kernel_shape"]
        lowest = int(np.iinfo(np.int64).min)
        view = windows(x[0], kernel, call.attrs["strides"], self.dilations(call), self.full_pads(call), lowest)
        return view.max(axis=tuple(range(-len(kernel), 0)))

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        carrier = x[0].dtype
        if carrier.itemsize != 1:
            if call.x[0].magnitude >= 1 << 53:
                raise call.refuse("codes of more than 53 bits", "max pooling needs narrower inputs; requantise first")
            carrier = np.dtype(np.float32 if call.x[0].magnitude < 1 << 24 else np.float64)
        out = body.op(
            "MaxPool",
            body.cast(x[0], carrier).value,
            kernel_shape=list(call.attrs["kernel_shape"]),
            strides=list(call.attrs["strides"]),
            pads=list(call.attrs["pads"]),
            dilations=list(self.dilations(call)),
            ceil_mode=call.attrs["ceil_mode"],
        )
        return Coded(out, carrier)

    def native(self, call: Call) -> Native:
        made = super().native(call)
        dilations = self.dilations(call)
        made.params["dilation_h"] = dilations[0] if len(dilations) == 2 else 1
        made.params["dilation_w"] = dilations[-1]
        return made

    def cases(self) -> list[Call]:
        made = []
        for index, (shape, kernel, strides, pads, dilations, ceil_mode) in enumerate(
            [
                ((3, 6, 6), (2, 2), (2, 2), (0, 0, 0, 0), (1, 1), 0),
                ((2, 7, 5), (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 0),
                ((2, 7, 6), (3, 2), (2, 2), (0, 0, 0, 0), (1, 1), 1),
                ((2, 9, 9), (2, 3), (1, 2), (0, 1, 0, 1), (2, 1), 0),
                ((4, 10), (3,), (3,), (1, 0), (1,), 0),
                ((1, 1, 1), (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 0),
            ]
        ):
            for fmt in ("fixed<8,3>", "ufixed<6,3>", "fixed<20,3>", "fixed<32,3>"):
                attrs: dict[str, Any] = {"kernel_shape": kernel, "strides": strides, "pads": pads}
                attrs |= {"dilations": dilations, "ceil_mode": ceil_mode}
                made.append(Call(self, f"{index}_{fmt}", [tensor(fmt, (None, *shape))], attrs))
        attrs = {"kernel_shape": (2, 2), "strides": (1, 2), "pads": (1, 0, 0, 1)}
        for fmt in ("fixed<8,[3,1,4]>", "fixed<[12,0,2],[3,-4,9]>", "bipolar"):
            made.append(Call(self, f"channels_{fmt}", [tensor(fmt, (None, 3, 5, 4))], attrs))
        return made


class AveragePool(Pool):
    """``round(sum * 2**(frac_y - frac_x) / count)``; the target format (`requantize`) is required."""

    name = "AveragePool"
    stem = "average_pool"
    attributes = {**Pool.attributes, "count_include_pad": Attr(int, 0)}

    def infer(self, call: Call) -> tuple[Result, ...]:
        if not call.attrs.get("requantize"):
            raise call.refuse("no target format", "an average is a rational number: give the attribute 'requantize'")
        if call.format_attr("requantize").per_channel:
            raise call.refuse("a binary point per channel", "an average takes one for the whole tensor")
        x = call.x[0]
        shape = self.output_shape(call)
        area = math.prod(call.attrs["kernel_shape"])
        if area * x.sample_shape[0] > MAX_WINDOW:
            raise call.refuse(f"windows of {area} elements", f"expected at most {MAX_WINDOW} over all channels")
        lo, hi = min(x.lo * area, x.lo, 0), max(x.hi * area, x.hi, 0)
        return (Result(shape, accumulator(lo, hi, x.format.fracs), lo, hi),)

    def bounds(self, call: Call) -> Bounds:
        x = call.x[0]
        area = math.prod(call.attrs["kernel_shape"])
        span = (min(x.lo * area, 0), max(x.hi * area, 0))
        return Bounds(span, span)

    def requantized_interval(self, call: Call, lo: int, hi: int) -> tuple[int, int]:
        x = call.x[0]
        assert call.epilogue is not None
        padded = any(call.attrs["pads"]) and call.attrs["count_include_pad"]
        lo, hi = (min(x.lo, 0), max(x.hi, 0)) if padded else (x.lo, x.hi)
        return shifted_interval(lo, hi, call.epilogue.shift, call.epilogue.format)

    def counts(self, call: Call) -> list[np.ndarray]:
        """Counted positions along each axis; the divisor of a window is their product."""
        x, kernel, pads = call.x[0].shape, call.attrs["kernel_shape"], call.attrs["pads"]
        rank = len(kernel)
        axes = []
        for i in range(rank):
            size, begin, end = int(x[2 + i] or 0), pads[i], pads[rank + i]
            first, last = (-begin, size + end) if call.attrs["count_include_pad"] else (0, size)
            starts = np.arange(int(call.exact[0].shape[2 + i] or 0)) * call.attrs["strides"][i] - begin
            axes.append(np.minimum(starts + kernel[i], last) - np.maximum(starts, first))
        return axes

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        kernel = call.attrs["kernel_shape"]
        view = windows(x[0], kernel, call.attrs["strides"], (1,) * len(kernel), self.full_pads(call), 0)
        return view.sum(axis=tuple(range(-len(kernel), 0)))

    def reference(self, call: Call, *x: np.ndarray) -> np.ndarray:
        assert call.epilogue is not None
        (shift,) = call.epilogue.shift
        total = formats.round_shift(self.compute(call, *x), min(shift, 0), "TRN")
        axes = self.counts(call)
        counts = axes[0] if len(axes) == 1 else np.multiply.outer(axes[0], axes[1])
        divisor = counts.astype(object if total.dtype == object or shift > 40 else np.int64)
        rounded = formats.round_div(total.astype(divisor.dtype), divisor << max(shift, 0), call.epilogue.rounding)
        return formats.wrap(rounded, call.epilogue.format)

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        kernel = call.attrs["kernel_shape"]
        rank = len(kernel)
        magnitude = call.bounds.magnitude
        if kernel == call.x[0].sample_shape[1:] and not any(call.attrs["pads"]):
            carrier = np.dtype(np.float32 if magnitude < 1 << 24 else np.float64 if magnitude < 1 << 53 else np.int64)
            axes = body.const(list(range(2, 2 + rank)), np.int64)
            return Coded(body.op("ReduceSum", body.cast(x[0], carrier).value, axes, keepdims=1), carrier)
        channels = call.x[0].sample_shape[0]
        ones = Coded(body.const(np.ones((channels, 1, *kernel)), np.float32), np.dtype(np.float32))
        geometry: dict[str, Any] = {
            "strides": list(call.attrs["strides"]),
            "pads": list(self.full_pads(call)),
            "group": channels,
        }
        x_range = (min(call.x[0].lo, 0), max(call.x[0].hi, 0))
        if magnitude < 1 << 24:
            single = np.dtype(np.float32)
            return Coded(body.op("Conv", body.cast(x[0], single).value, ones.value, **geometry), single)
        return emit_limb_products(body, "Conv", x[0], x_range, ones, (0, 1), math.prod(kernel), magnitude, **geometry)

    def emit_epilogue(self, body: Body, call: Call, acc: Coded) -> Coded:
        assert call.epilogue is not None
        (shift,) = call.epilogue.shift
        fmt = call.epilogue.format
        counts = self.counts(call)
        result = call.exact[0]
        uniform = all((axis == axis[0]).all() for axis in counts)
        first = math.prod(int(axis[0]) for axis in counts)
        if uniform and first & (first - 1) == 0:
            total = (shift + first.bit_length() - 1,)
            return emit_requantize(body, acc, total, fmt, result.lo, result.hi, len(result.shape))
        bound = max(abs(result.lo), abs(result.hi), 1) << max(-shift, 0)
        if shift > 40 or bound >= 1 << 62 or (fmt.overflow == "WRAP" and fmt.width > 62):
            raise call.refuse(f"an average from {call.x[0].format} to {fmt}", "bring the two formats closer together")
        scaled = body.scale(body.cast(acc, np.int64), 1 << max(-shift, 0))
        if uniform:
            divisor = body.number(first << max(shift, 0), scaled)
        else:
            divisor = body.number(counts[-1] << max(shift, 0), scaled)
            if len(counts) == 2:
                divisor = body.binary("Mul", body.number(counts[0][:, None], scaled), divisor)
        rounded = body.round_div_int64(scaled, divisor, fmt.rounding)
        return body.overflow(rounded, fmt, -bound, bound, len(result.shape))

    def native(self, call: Call) -> Native:
        made = super().native(call)
        made.params["count_include_pad"] = call.attrs["count_include_pad"]
        return made

    def cost(self, call: Call) -> Cost:
        size = math.prod(int(d or 1) for d in call.exact[0].shape)
        return Cost(0, size * math.prod(call.attrs["kernel_shape"]))

    def cases(self) -> list[Call]:
        made = []
        for index, (shape, kernel, strides, pads, ceil_mode, include) in enumerate(
            [
                ((3, 6, 6), (2, 2), (2, 2), (0, 0, 0, 0), 0, 0),
                ((2, 7, 5), (3, 3), (2, 2), (1, 1, 1, 1), 0, 0),
                ((2, 7, 5), (3, 3), (2, 2), (1, 1, 1, 1), 0, 1),
                ((2, 7, 6), (3, 2), (2, 2), (0, 0, 0, 0), 1, 0),
                ((2, 8, 8), (3, 3), (2, 2), (1, 1, 1, 1), 1, 1),
                ((4, 10), (3,), (3,), (1, 0), 0, 0),
                ((5, 5, 5), (5, 5), (1, 1), (0, 0, 0, 0), 0, 0),
            ]
        ):
            for fmt, target in (
                ("fixed<8,3>", "fixed<8,3>"),
                ("ufixed<6,3>", "ufixed<6,3,RND_CONV,SAT>"),
                ("fixed<8,3>", "fixed<12,3,RND_ZERO,SAT_SYM>"),
                ("fixed<8,3>", "fixed<5,3,RND_INF,WRAP>"),
                ("fixed<20,3>", "fixed<20,3,RND_MIN_INF,SAT>"),
                ("fixed<8,3>", "bipolar"),
                ("bipolar", "fixed<6,2>"),
            ):
                attrs = {"kernel_shape": kernel, "strides": strides, "pads": pads, "ceil_mode": ceil_mode}
                attrs |= {"count_include_pad": include, "requantize": target}
                made.append(Call(self, f"{index}_{fmt}_{target}", [tensor(fmt, (None, *shape))], attrs))
        return made
