"""Reshape, Transpose, Slice, Pad and Concat: operators that move codes and never change them.

Axes in attributes count within one sample (the batch axis is not among them).
"""

from __future__ import annotations

import math

import numpy as np

from edgemat.body import Body, Coded
from edgemat.formats import Fixed, holds_codes
from edgemat.op import Attr, Call, Native, Op, Result
from edgemat.ops.cases import tensor


def native_axes(call: Call, rank: int) -> tuple[int, ...]:
    """Order of the sample axes in native layout: channels last for two or three axes."""
    return (*range(1, rank), 0) if call.x[0].batched and rank in (2, 3) else tuple(range(rank))


def to_four(values: tuple[int, ...], fill: int) -> tuple[int, ...]:
    """Pads a tuple on the left to four entries."""
    return (fill,) * (4 - len(values)) + values


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def check_rank(call: Call) -> None:
    """Native strided copies know four axes."""
    if len(call.x[0].sample_shape) > 4:
        raise call.refuse(f"an input of shape {call.x[0].shape}", "at most 4 axes besides the batch are supported")


MAX_POINTS = 1 << 20
"""Flattening writes one binary point per element into the format; larger tensors are aligned first."""


class Reshape(Op):
    """Another shape for the same codes; a per-channel binary point is expanded where channels are flattened away."""

    name = "Reshape"
    stem = "reshape"
    attributes = {"shape": Attr(tuple)}
    keeps_channels = True

    def infer(self, call: Call) -> tuple[Result, ...]:
        x, shape = call.x[0], call.attrs["shape"]
        if not x.batched:
            raise call.refuse("an input without a batch axis", "keep the batch on axis 0")
        if math.prod(shape) != x.size or min(shape, default=1) < 1:
            raise call.refuse(f"{x.sample_shape} to {shape}", "the number of elements must stay")
        fmt = x.format
        if fmt.per_channel and shape[:1] != x.sample_shape[:1]:
            fracs = fmt.fracs
            repeat = x.size // len(fracs)
            if len(shape) != 1 or x.size > MAX_POINTS:
                raise call.refuse("per-channel binary points", "align the channels before this reshape")
            fmt = _repeated(fmt, repeat)
        return (Result((None, *shape), fmt, x.lo, x.hi),)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        return x[0].reshape((x[0].shape[0], *call.attrs["shape"]))

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        shape = body.const([-1, *call.attrs["shape"]], np.int64)
        return Coded(body.op("Reshape", x[0].value, shape), x[0].dtype)

    def row_major(self, call: Call) -> bool:
        return True

    def cases(self) -> list[Call]:
        x = tensor("fixed<8,3>", (None, 3, 2, 4))
        made = [Call(self, f"{shape}", [x], {"shape": shape}) for shape in ((24,), (3, 8), (4, 3, 2), (1, 1, 24))]
        for fmt in ("fixed<8,[3,2,5]>", "fixed<[8,0,3],[3,2,5],TRN,SAT_SYM>"):
            x = tensor(fmt, (None, 3, 2, 4))
            made += [Call(self, f"{fmt}_{shape}", [x], {"shape": shape}) for shape in ((24,), (3, 8))]
        return made


def _repeated(fmt: Fixed, repeat: int) -> Fixed:
    """The format of each channel, `repeat` times over."""
    fracs, widths = fmt.fracs, fmt.widths or (fmt.width,) * len(fmt.fracs)
    widths, fracs = (tuple(n for n in numbers for _ in range(repeat)) for numbers in (widths, fracs))
    return Fixed.of_channels(widths, fracs, fmt.signed, fmt.rounding, fmt.overflow)


class Transpose(Op):
    """Permutes the sample axes."""

    name = "Transpose"
    stem = "transpose"
    attributes = {"perm": Attr(tuple)}

    def infer(self, call: Call) -> tuple[Result, ...]:
        x, perm = call.x[0], call.attrs["perm"]
        check_rank(call)
        if sorted(perm) != list(range(len(x.sample_shape))) or not x.batched:
            raise call.refuse(f"perm {perm} for input {x.shape}", "permute the axes behind the batch only")
        return (Result((None, *(x.sample_shape[p] for p in perm)), x.format, x.lo, x.hi),)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        return x[0].transpose(0, *(p + 1 for p in call.attrs["perm"]))

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        perm = [0, *(p + 1 for p in call.attrs["perm"])]
        return Coded(body.op("Transpose", x[0].value, perm=perm), x[0].dtype)

    def native(self, call: Call) -> Native:
        perm = call.attrs["perm"]
        axes = native_axes(call, len(perm))
        stride = dict(zip(axes, contiguous(call.x[0].native_shape), strict=True))
        return Native(
            {
                "dims": to_four(tuple(call.x[0].sample_shape[perm[a]] for a in axes), 1),
                "stride": to_four(tuple(stride[perm[a]] for a in axes), 0),
                "offset": 0,
            }
        )

    def cases(self) -> list[Call]:
        made = []
        for shape, perm in (((3, 2, 4), (1, 2, 0)), ((3, 2, 4), (0, 2, 1)), ((5, 3), (1, 0)), ((7,), (0,))):
            made.append(Call(self, f"{perm}", [tensor("fixed<8,3>", (None, *shape))], {"perm": perm}))
        return made


class Slice(Op):
    """``x[start : start + size * step : step]`` on every sample axis; Split is lowered to several of these."""

    name = "Slice"
    stem = "slice"
    attributes = {"starts": Attr(tuple), "sizes": Attr(tuple), "steps": Attr(tuple)}

    def infer(self, call: Call) -> tuple[Result, ...]:
        x = call.x[0]
        check_rank(call)
        starts, sizes, steps = (call.attrs[k] for k in ("starts", "sizes", "steps"))
        if not len(starts) == len(sizes) == len(steps) == len(x.sample_shape) or not x.batched:
            raise call.refuse(f"slice {starts} {sizes} {steps} of {x.shape}", "one entry per axis behind the batch")
        for extent, start, size, step in zip(x.sample_shape, starts, sizes, steps, strict=True):
            last = start + (size - 1) * step
            if size < 1 or step == 0 or not 0 <= start < extent or not 0 <= last < extent or abs(step) > extent:
                raise call.refuse(f"slice start {start}, size {size}, step {step} of {extent}", "stay inside the axis")
        return (Result((None, *sizes), x.format, x.lo, x.hi),)

    def _indices(self, call: Call) -> tuple[slice, ...]:
        parts = zip(call.attrs["starts"], call.attrs["sizes"], call.attrs["steps"], strict=True)
        made = [slice(None)]
        for start, size, step in parts:
            stop = start + size * step
            made.append(slice(start, stop if stop >= 0 else None, step))
        return tuple(made)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        return x[0][self._indices(call)]

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        starts, sizes, steps = (call.attrs[k] for k in ("starts", "sizes", "steps"))
        rank = len(starts)
        stops = [a + n * s for a, n, s in zip(starts, sizes, steps, strict=True)]
        stops = [stop if stop >= 0 else -(1 << 62) for stop in stops]
        consts = [body.const(list(v), np.int64) for v in (starts, stops, range(1, rank + 1), steps)]
        return Coded(body.op("Slice", x[0].value, *consts), x[0].dtype)

    def native(self, call: Call) -> Native:
        starts, sizes, steps = (call.attrs[k] for k in ("starts", "sizes", "steps"))
        axes = native_axes(call, len(sizes))
        stride = dict(zip(axes, contiguous(call.x[0].native_shape), strict=True))
        return Native(
            {
                "dims": to_four(tuple(sizes[a] for a in axes), 1),
                "stride": to_four(tuple(stride[a] * steps[a] for a in axes), 0),
                "offset": sum(stride[a] * starts[a] for a in axes),
            }
        )

    def cases(self) -> list[Call]:
        made = []
        for shape, starts, sizes, steps in (
            ((4, 5, 6), (1, 0, 2), (2, 5, 2), (1, 1, 2)),
            ((4, 5, 6), (3, 4, 5), (2, 3, 6), (-2, -2, -1)),
            ((9,), (8,), (9,), (-1,)),
            ((3, 7), (0, 3), (3, 1), (1, 1)),
        ):
            attrs = {"starts": starts, "sizes": sizes, "steps": steps}
            made.append(Call(self, f"{starts}{steps}", [tensor("fixed<8,3>", (None, *shape))], attrs))
        return made


class Pad(Op):
    """Adds constant codes around the sample axes."""

    name = "Pad"
    stem = "pad"
    attributes = {"before": Attr(tuple), "after": Attr(tuple), "value": Attr(int, 0)}

    def infer(self, call: Call) -> tuple[Result, ...]:
        x, before, after, value = (call.x[0], *(call.attrs[k] for k in ("before", "after", "value")))
        check_rank(call)
        if not len(before) == len(after) == len(x.sample_shape) or min(before + after, default=0) < 0 or not x.batched:
            raise call.refuse(f"pads {before} {after} of {x.shape}", "expected one entry of at least 0 per axis")
        if not holds_codes(np.array([value]), x.format):
            raise call.refuse(f"the pad code {value} does not fit {x.format}", "pad with a value the format holds")
        shape = tuple(n + b + a for n, b, a in zip(x.sample_shape, before, after, strict=True))
        return (Result((None, *shape), x.format, min(x.lo, value), max(x.hi, value)),)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        width = [(0, 0), *zip(call.attrs["before"], call.attrs["after"], strict=True)]
        return np.pad(x[0], width, constant_values=call.attrs["value"])

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        # onnxruntime 1.31 fuses a Pad with zeros into a following MaxPool, which pads with the lowest number: wrong for
        # negative maps. A Pad that names its axes is left alone; tests/core/test_lower.py watches that it stays so. It
        # names all of them: where onnxruntime moves a Transpose past a Pad, it permutes the pads as if it did.
        pads = body.const([0, *call.attrs["before"], 0, *call.attrs["after"]], np.int64)
        value = body.const(call.attrs["value"], x[0].dtype)
        axes = body.const(list(range(1 + len(call.attrs["before"]))), np.int64)
        return Coded(body.op("Pad", x[0].value, pads, value, axes), x[0].dtype)

    def native(self, call: Call) -> Native:
        axes = native_axes(call, len(call.x[0].sample_shape))
        before, after = call.attrs["before"], call.attrs["after"]
        return Native(
            {
                "in_dims": to_four(call.x[0].native_shape, 1),
                "before": to_four(tuple(before[a] for a in axes), 0),
                "after": to_four(tuple(after[a] for a in axes), 0),
                "value": call.attrs["value"],
            }
        )

    def cases(self) -> list[Call]:
        made = []
        for shape, before, after, value in (
            ((3, 4, 5), (0, 1, 2), (0, 2, 0), 0),
            ((3, 4), (1, 1), (0, 1), -128),
            ((5,), (0,), (3,), 127),
        ):
            attrs = {"before": before, "after": after, "value": value}
            made.append(Call(self, f"{before}{after}", [tensor("fixed<8,3>", (None, *shape))], attrs))
        return made


class Concat(Op):
    """Joins tensors of one format along a sample axis (lowering aligns them first)."""

    name = "Concat"
    stem = "concat"
    arity = (1, 1 << 16)
    attributes = {"axis": Attr(int)}
    same_format = True

    def infer(self, call: Call) -> tuple[Result, ...]:
        first, axis = call.x[0], call.attrs["axis"]
        if not 0 <= axis < len(first.sample_shape):
            raise call.refuse(f"axis {axis} of {first.shape}", "join along an axis behind the batch")
        total = 0
        for x in call.x:
            rest = x.sample_shape[:axis] + x.sample_shape[axis + 1 :]
            if rest != first.sample_shape[:axis] + first.sample_shape[axis + 1 :] or not x.batched:
                raise call.refuse(f"inputs of shapes {[t.shape for t in call.x]}", "they may differ on one axis only")
            if x.format.layout != first.format.layout:
                raise call.refuse(f"formats {first.format} and {x.format}", "align the inputs to one format")
            total += x.sample_shape[axis]
        shape = (*first.sample_shape[:axis], total, *first.sample_shape[axis + 1 :])
        return (Result((None, *shape), first.format, min(t.lo for t in call.x), max(t.hi for t in call.x)),)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        return np.concatenate(x, axis=call.attrs["axis"] + 1)

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        return Coded(body.op("Concat", *(t.value for t in x), axis=call.attrs["axis"] + 1), x[0].dtype)

    def native(self, call: Call) -> Native:
        axes = native_axes(call, len(call.x[0].sample_shape))
        position = axes.index(call.attrs["axis"])
        outer = math.prod(call.x[0].native_shape[:position])
        return Native({"outer": outer, "inner": tuple(t.size // outer for t in call.x)})

    def cases(self) -> list[Call]:
        made = []
        for shapes, axis in (
            (((3, 4, 5), (2, 4, 5)), 0),
            (((3, 4, 5), (3, 1, 5), (3, 2, 5)), 1),
            (((3, 4), (3, 4)), 1),
            (((5,), (1,)), 0),
        ):
            x = [tensor("fixed<8,3>", (None, *s), f"x{i}") for i, s in enumerate(shapes)]
            made.append(Call(self, f"{len(shapes)}_{axis}", x, {"axis": axis}))
        return made
