"""Thresholds: a staircase of one code per channel, counted: ``y = start + step * #{t : x >= t}``.

Every monotone function from codes to codes is one: FINN's MultiThreshold, and the exact form of a requantisation with a
real scale, whose steps lie where the real arithmetic puts them. Nothing is multiplied and nothing is rounded, so there
is no epilogue: the operator is one itself.

Only what the input's interval leaves open is computed. Thresholds up to its lowest code always count and go into
`start`; those above its highest never do.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgemat.body import Body, Coded
from edgemat.formats import Fixed, holds_codes
from edgemat.op import Attr, Call, Cost, Native, Op, Result
from edgemat.ops.cases import constant, random_codes, tensor

MAX_THRESHOLDS = 65_535
MAX_CODE = 1 << 62
"""Codes of x lie within this, so that one more than the highest is still an int64."""
FEW, FEW_WIDE = 8, 24
"""Up to so many thresholds, a body compares with each: where it could look y up, and where it would have to search."""
TABLE_ENTRIES = 1 << 18
"""A body looks y up where the codes that x can have in all channels are at most so many."""


class Thresholds(Op):
    """``y = start + step * #{t : x >= t}``; inputs x [N, C, ...] and thresholds [C, T] or [1, T] on x's grid.

    The thresholds of a channel do not decrease. x has rank 2 to 4; where its channels have binary points of their own,
    each has thresholds of its own, codes on its grid.
    """

    name = "Thresholds"
    stem = "thresholds"
    arity = (2, 2)
    keeps_channels = True
    attributes = {"y_format": Attr(str), "start": Attr(int), "step": Attr(int, 1)}

    def _thresholds(self, call: Call) -> np.ndarray:
        """The thresholds, int64 [C, T] or [1, T], checked."""
        x, found = call.x[0], call.constant(1)
        if not 2 <= len(x.shape) <= 4 or x.shape[1] is None:
            raise call.refuse(f"an input of shape {x.shape}", "expected rank 2 to 4, channels on axis 1")
        if x.lo < -MAX_CODE or x.hi >= MAX_CODE:
            raise call.refuse(f"an input of {x.format}", "requantise it to at most 62 bits")
        if found is None or found.ndim != 2 or found.shape[0] not in (1, x.shape[1]):
            shape = "no initializer" if found is None else f"of shape {found.shape}"
            raise call.refuse(f"thresholds {shape}", f"expected constant codes [{x.shape[1]}, T] or [1, T]")
        if x.format.per_channel and len(found) != x.shape[1]:
            raise call.refuse(f"one row of thresholds for {x.format}", "expected a row for each binary point")
        if not 1 <= found.shape[1] <= MAX_THRESHOLDS:
            raise call.refuse(f"{found.shape[1]} thresholds", f"expected 1 to {MAX_THRESHOLDS} for each channel")
        falls = found[:, 1:] < found[:, :-1]
        if falls.any():
            channel, at = (int(i) for i in np.argwhere(falls)[0])
            raise call.refuse(
                f"threshold {at + 1} of channel {channel} is {found[channel, at + 1]} behind {found[channel, at]}",
                "sort the thresholds of each channel in ascending order",
            )
        return found

    def _open(self, call: Call) -> tuple[slice, slice]:
        """Channels and thresholds that differ over the input's interval; at least one of each."""
        found, x = self._thresholds(call), call.x[0]
        always = int((found <= x.lo).all(axis=0).sum())
        ever = int((found <= x.hi).any(axis=0).sum())
        if always >= ever:
            always, ever = (0, 1) if ever == 0 else (ever - 1, ever)
        reached = np.clip(found[:, always:ever], x.lo, x.hi + 1)
        rows = len(found) if (reached != reached[:1]).any() else 1
        return slice(0, rows), slice(always, ever)

    def _counts(self, call: Call) -> np.ndarray:
        """The counts that some code of the input's interval has, in ascending order."""
        found, x = self._thresholds(call), call.x[0]
        ends = np.full((found.shape[0], 1), x.hi, np.int64), np.full((found.shape[0], 1), x.lo, np.int64)
        below = np.concatenate([np.minimum(found, x.hi + 1) - 1, ends[0]], axis=1)  # the last code of each count
        above = np.concatenate([ends[1], np.maximum(found, x.lo)], axis=1)  # and the first one
        return np.flatnonzero((above <= below).any(axis=0))

    def infer(self, call: Call) -> tuple[Result, ...]:
        found, fmt = self._thresholds(call), call.format_attr("y_format")
        start, step = call.attrs["start"], call.attrs["step"]
        if step == 0 or abs(start) + abs(step) * found.shape[1] >= 1 << 63:
            raise call.refuse(f"steps of {step} from {start}", "expected a step other than 0, and results of 64 bits")
        codes = start + step * self._counts(call)
        lo, hi = int(codes.min()), int(codes.max())
        if fmt.per_channel or not holds_codes(codes, fmt):
            raise call.refuse(
                f"codes {lo} to {hi} for {fmt}", "give y_format the width, and one binary point, they need"
            )
        return (Result(call.x[0].shape, fmt, lo, hi),)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        found = self._thresholds(call)
        codes = np.moveaxis(np.asarray(x[0], dtype=np.int64), 1, 0)
        counts = np.empty(codes.shape, np.int64)
        for channel in range(len(codes)):
            row = found[channel % len(found)]
            counts[channel] = np.searchsorted(row, codes[channel].reshape(-1), "right").reshape(codes[channel].shape)
        return np.ascontiguousarray(np.moveaxis(call.attrs["start"] + call.attrs["step"] * counts, 0, 1))

    # -- ONNX body ------------------------------------------------------------------------------------------------
    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        rows, columns = self._open(call)
        source, count = call.x[0], columns.stop - columns.start
        start = call.attrs["start"] + call.attrs["step"] * columns.start
        small = source.lo >= -(1 << 31) and source.hi + 1 < 1 << 31
        carrier = np.dtype(np.int32 if small else np.int64)
        steps = self._cut(body, call, x[1], rows, columns)
        steps = body.cast(body.clip(body.cast(steps, np.int64), source.lo, source.hi + 1), carrier)
        lay, codes = (-1,) + (1,) * (len(source.shape) - 2), source.hi - source.lo + 1
        looked_up = codes * rows.stop <= TABLE_ENTRIES
        if count <= (FEW if looked_up else FEW_WIDE):
            value = body.cast(x[0], carrier)
            taken: Coded | None = None
            for column in range(count):
                one: ir.Value = body.op("Gather", steps.value, body.const(column, np.int64), axis=1)
                if rows.stop > 1:
                    one = body.op("Reshape", one, body.const(lay, np.int64))
                more = body.cast(Coded(body.op("GreaterOrEqual", value.value, one), np.dtype(bool)), np.int32)
                taken = more if taken is None else body.binary("Add", taken, more)
            assert taken is not None
            return self._levels(body, call, taken, start)
        channel = np.arange(rows.stop).reshape(lay if rows.stop > 1 else (1,))
        if not looked_up:
            found = self._search(body, body.cast(x[0], carrier), steps, channel, count, source.hi + 1)
            return self._levels(body, call, found, start)
        # Constants all of them: onnxruntime makes the table when it loads the model.
        every = Coded(body.const(np.arange(source.lo, source.hi + 1)[None], carrier), carrier)
        table = self._search(body, every, steps, np.arange(rows.stop)[:, None], count, source.hi + 1)
        table = body.cast(self._levels(body, call, table, start), call.y[0].dtype)
        flat = body.op("Reshape", table.value, body.const([-1], np.int64))
        index = body.cast(x[0], carrier)
        index = body.binary("Add", index, body.number(channel * codes - source.lo, index))
        return Coded(body.op("Gather", flat, index.value, axis=0), table.dtype)

    def _cut(self, body: Body, call: Call, steps: Coded, rows: slice, columns: slice) -> Coded:
        """The thresholds of `_open`."""
        found = self._thresholds(call)
        for axis, part in ((0, rows), (1, columns)):
            if part.start > 0 or part.stop < found.shape[axis]:
                ends = (body.const([part.start], np.int64), body.const([part.stop], np.int64))
                steps = Coded(body.op("Slice", steps.value, *ends, body.const([axis], np.int64)), steps.dtype)
        return steps

    def _search(self, body: Body, value: Coded, steps: Coded, channel: np.ndarray, count: int, never: int) -> Coded:
        """int32 counts: a binary search of every element at once, one Gather for each bit of the count."""
        span = 1 << count.bit_length() - 1
        length = 2 * span - 1
        if length > count:
            filler = body.const(np.full((channel.size, length - count), never), steps.dtype)
            steps = Coded(body.op("Concat", steps.value, filler, axis=1), steps.dtype)
        flat = body.op("Reshape", steps.value, body.const([-1], np.int64))
        probe = Coded(body.const(channel * length + span - 1, np.int32), np.dtype(np.int32))
        while True:
            more = body.op("GreaterOrEqual", value.value, body.op("Gather", flat, probe.value, axis=0))
            span //= 2
            far, near = (body.number(d, probe).value for d in ((span, -span) if span else (1, 0)))
            probe = body.binary("Add", probe, Coded(body.op("Where", more, far, near), probe.dtype))
            if span == 0:
                return body.binary("Sub", probe, body.number(channel * length, probe))

    def _levels(self, body: Body, call: Call, taken: Coded, start: int) -> Coded:
        """``start + step * taken``."""
        step = call.attrs["step"]
        reach = abs(start) + abs(step) * MAX_THRESHOLDS
        level = body.scale(body.cast(taken, np.int32 if reach < 1 << 31 else np.int64), step)
        return level if start == 0 else body.binary("Add", level, body.number(start, level))

    # -- targets --------------------------------------------------------------------------------------------------
    def native(self, call: Call) -> Native:
        rows, columns = self._open(call)
        source = call.x[0]
        found = np.clip(self._thresholds(call)[rows, columns], source.lo, source.hi + 1)
        params: dict[str, int | tuple[int, ...]] = {
            "size": source.size,
            "channels": found.shape[0],
            "count": found.shape[1],
            "start": call.attrs["start"] + call.attrs["step"] * columns.start,
            "step": call.attrs["step"],
        }
        return Native(params, {"threshold": found})

    def cost(self, call: Call) -> Cost:
        """Comparisons of a binary search stand where additions do; a threshold has the bits of its input's codes."""
        rows, columns = self._open(call)
        count = columns.stop - columns.start
        bits = call.x[0].format.storage_width
        return Cost(0, call.x[0].size * count.bit_length(), rows.stop * count * bits)

    def cases(self) -> list[Call]:
        made = []

        def add(name: str, x_fmt: str, shape: tuple[int | None, ...], rows: object, y: str, start: int, step: int = 1,
                lo: int | None = None, hi: int | None = None) -> None:  # fmt: skip
            found = np.sort(np.atleast_2d(np.asarray(rows, dtype=np.int64)), axis=1)
            t, codes = constant("fixed<64,64>", found, "thresholds")
            x = tensor(x_fmt, shape, lo=lo, hi=hi)
            attrs = {"y_format": y, "start": start, "step": step}
            made.append(Call(self, f"{name}_{x_fmt}_{y}", [x, t], attrs, {1: codes}))

        def met(x_fmt: str, channels: int, count: int) -> np.ndarray:
            """Thresholds of 32 elements a channel that the sweep of `feeds` meets, every other one missed by one."""
            low, high = Fixed.parse(x_fmt).rails
            step, k = (high - low + 1) // (32 * channels), np.arange(count)
            return low + (32 * np.arange(channels)[:, None] + k * 32 // count) * step + k % 2

        # The feeds hold both rails, zero and a sweep of neighbouring codes.
        add("sign", "fixed<8,3>", (None, 3), [0], "bipolar", -1, 2)
        add("signs", "fixed<8,3>", (None, 3, 100), [[-5], [0], [4]], "bipolar", -1, 2)
        add("never_zero", "fixed<8,3>", (None, 2, 130), [[-5, -5], [4, 4]], "bipolar", -1)
        add("pair", "fixed<5,5>", (None, 2, 32), [[-3, 3], [-16, 15]], "fixed<2,2>", -1)
        add("equal", "ufixed<8,8>", (None, 256), [[1, 1, 1, 7, 7, 255]], "ufixed<3,3>", 0)
        add("fall", "fixed<8,1>", (None, 2, 8, 16), random_codes("fixed<8,1>", (2, 7), 1), "fixed<4,2>", 7, -1)
        add("outside", "fixed<8,8>", (None, 2, 128), [[-9999, -129, -128, 3, 128, 500], [-128, -2, 0, 1, 127, 128]],
            "ufixed<4,4>", 2)  # fmt: skip
        add("constant", "fixed<4,4>", (None, 16), [[-40, -30, 8, 90]], "fixed<4,4>", 1)
        add("always", "fixed<4,4>", (None, 16), [[-40, -30]], "fixed<4,4>", 1)
        add("never", "fixed<4,4>", (None, 16), [[8, 90]], "fixed<4,4>", 1)
        add("narrow", "fixed<16,16>", (None, 2, 60), np.arange(-40, 40).reshape(2, 40), "fixed<8,8>", -13, 1, -20, 29)
        far = (1 << 35) + np.arange(0, 90, 2).reshape(3, 15)
        add("far", "fixed<40,40>", (None, 3, 30), far, "ufixed<4,4>", 0, 1, (1 << 35) - 3, (1 << 35) + 86)
        add("table", "fixed<8,8>", (None, 3, 6, 16), random_codes("fixed<9,9>", (3, 15), 2), "fixed<5,3>", -8)
        add("one_table", "ufixed<8,8>", (None, 4, 64), np.arange(1, 256), "fixed<8,8>", -128)
        wide = random_codes("fixed<20,20>", (2, 255), 3)
        add("search", "fixed<20,4>", (None, 2, 5, 7), wide, "ufixed<8,8>", 0)
        add("search", "fixed<20,4>", (None, 2, 5, 7), wide[:1, :100], "fixed<12,4>", 1000, -9)
        add("search", "fixed<16,8>", (None, 4, 32), met("fixed<16,8>", 4, 64), "ufixed<7,7>", 0)
        add("search", "fixed<32,4>", (None, 16, 4, 8), met("fixed<32,4>", 16, 9), "fixed<7,7>", -3, 5)
        add("search", "fixed<40,20>", (None, 4, 32), met("fixed<40,20>", 4, 31), "fixed<40,8>", -7, 1 << 30)
        add("few", "fixed<40,20>", (None, 4, 32), met("fixed<40,20>", 4, 3), "ufixed<2,2>", 0)
        add("few", "ufixed<31,20>", (None, 1, 32), met("ufixed<31,20>", 1, 5), "ufixed<3,2>", 5, -1)
        add("signs", "bipolar", (None, 2, 9), [[0, 5], [-1, 2]], "ufixed<2,2>", 1)
        for x_fmt in ("fixed<8,[3,1,4]>", "fixed<[8,0,2],[3,-4,9]>"):
            add("channels", x_fmt, (None, 3, 60), [[-5, 3, 3], [-7, 0, 1], [-2, 1, 100]], "fixed<3,1>", 0)
        return made
