"""A second opinion in plain Python: values as fractions, loops over indices, nothing of edgemat's arithmetic.

`codes` computes a call from the meaning of its attributes in docs/numerics.md; the tests compare it with the
dossiers' references. It is slow and only meant for small cases.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np

from edgemat.formats import Fixed
from edgemat.op import Call
from tests.normalization import definition


def rounded(value: Fraction, mode: str) -> int:
    """A rational rounded to an integer by one of the seven modes."""
    floor = value.numerator // value.denominator
    rest = value - floor
    half = Fraction(1, 2)
    if mode == "TRN":
        return floor
    if mode == "TRN_ZERO":
        return floor + (1 if value < 0 and rest else 0)
    if rest != half:
        return floor + (rest > half)
    upper, lower = floor + 1, floor
    return {
        "RND": upper,
        "RND_MIN_INF": lower,
        "RND_ZERO": lower if value > 0 else upper,
        "RND_INF": upper if value > 0 else lower,
        "RND_CONV": upper if lower % 2 else lower,
    }[mode]


def width_of(fmt: Fixed, channel: int) -> int:
    """Bits of a channel's code."""
    return fmt.width if fmt.widths is None else fmt.widths[channel % len(fmt.widths)]


def overflowed(code: int, fmt: Fixed, channel: int = 0) -> int:
    """A rounded integer brought into the code range by one of the four modes."""
    width = width_of(fmt, channel)
    if width == 0:
        return 0
    low = -(2 ** (width - 1)) if fmt.signed else 0
    high = 2 ** (width - 1) - 1 if fmt.signed else 2**width - 1
    if fmt.overflow == "WRAP":
        code %= 2**fmt.width
        return code - 2**fmt.width if code > high else code
    if fmt.overflow == "SAT_SYM" and fmt.signed:
        low = -high
    if low <= code <= high:
        return code
    return 0 if fmt.overflow == "SAT_ZERO" else (high if code > high else low)


def lsb(fmt: Fixed, channel: int = 0) -> Fraction:
    """The value of code 1."""
    points = fmt.int_bits if isinstance(fmt.int_bits, tuple) else (fmt.int_bits,)
    return Fraction(2) ** (points[channel % len(points)] - width_of(fmt, channel))


def to_code(value: Fraction, fmt: Fixed, channel: int = 0) -> int:
    """Round first, then overflow; bipolar codes are signs of the value itself, 0 counting as positive."""
    if str(fmt) == "bipolar":
        return 1 if value >= 0 else -1
    return overflowed(rounded(value / lsb(fmt, channel), fmt.rounding), fmt, channel)


def valued(codes: np.ndarray, fmt: Fixed, axis: int = 1) -> np.ndarray:
    """Codes as Fractions; per-channel binary points along `axis`."""
    made = np.empty(codes.shape, object)
    for at in np.ndindex(codes.shape):
        made[at] = int(codes[at]) * lsb(fmt, at[axis] if fmt.per_channel else 0)
    return made


def codes(call: Call, *feed: np.ndarray) -> np.ndarray:
    """Codes of the call's output for input codes `feed`."""
    target = call.y[0].format
    exact = _VALUES[call.op.name](call, *feed)
    if exact.dtype != object:
        return exact
    made = np.empty(exact.shape, np.int64)
    for at in np.ndindex(exact.shape):
        channel = at[1] if target.per_channel else 0
        if width_of(target, channel) == 0:
            made[at] = 0
            assert call.epilogue is not None or exact[at] == 0
        elif call.epilogue is None:
            scaled = exact[at] / lsb(target, channel)
            assert scaled.denominator == 1, "an operator without a Requantize must be exact"
            made[at] = scaled.numerator
        else:
            made[at] = to_code(exact[at], target, channel)
    return made


def _weights(call: Call) -> np.ndarray:
    w = call.constant(1)
    assert w is not None
    fmt = Fixed.parse(call.attrs["w_format"])
    return valued(w, fmt, 0)


def _bias(call: Call, channel: int) -> Fraction:
    """The bias is an integer on the accumulator's grid."""
    b = call.constant(2)
    if b is None:
        return Fraction(0)
    x = call.x[0].format
    live = [c for c in range(len(x.fracs)) if width_of(x, c)]
    finest = min((lsb(x, c) for c in live), default=Fraction(1))
    if call.op.name == "Affine":
        finest = lsb(x, channel)
    return int(b[channel]) * finest * lsb(Fixed.parse(call.attrs["w_format"]), channel)


def _linear(call: Call, x: np.ndarray, *_: np.ndarray) -> np.ndarray:
    w, v = _weights(call), valued(x, call.x[0].format)
    made = np.empty((*x.shape[:-1], len(w)), object)
    for at in np.ndindex(made.shape):
        made[at] = sum((a * b for a, b in zip(v[at[:-1]], w[at[-1]], strict=True)), _bias(call, at[-1]))
    return made


def _conv(call: Call, x: np.ndarray, *_: np.ndarray) -> np.ndarray:
    w, v = _weights(call), valued(x, call.x[0].format)
    made = np.empty((len(x), *call.y[0].shape[1:]), object)
    per_group = len(w) // call.attrs["groups"]
    for n, o, *place in np.ndindex(made.shape):
        total = _bias(call, o)
        for c, *tap in np.ndindex(w.shape[1:]):
            at = [
                p * s - b + t * d
                for p, t, s, d, b in zip(
                    place, tap, call.attrs["strides"], call.attrs["dilations"], call.attrs["pads"], strict=False
                )
            ]
            if all(0 <= i < e for i, e in zip(at, x.shape[2:], strict=True)):
                total += w[(o, c, *tap)] * v[(n, o // per_group * w.shape[1] + c, *at)]
        made[(n, o, *place)] = total
    return made


def _conv_transpose(call: Call, x: np.ndarray, *_: np.ndarray) -> np.ndarray:
    raw, v = call.constant(1), valued(x, call.x[0].format)
    assert raw is not None
    fmt, groups = Fixed.parse(call.attrs["w_format"]), call.attrs["groups"]
    made = np.empty((len(x), *call.y[0].shape[1:]), object)
    for at in np.ndindex(made.shape):
        made[at] = _bias(call, at[1])
    per = raw.shape[0] // groups
    for n, c, *place in np.ndindex(x.shape):
        for k, *tap in np.ndindex(raw.shape[1:]):
            o = c // per * raw.shape[1] + k
            at = [
                p * s - b + t * d
                for p, t, s, d, b in zip(
                    place, tap, call.attrs["strides"], call.attrs["dilations"], call.attrs["pads"], strict=False
                )
            ]
            if all(0 <= i < e for i, e in zip(at, made.shape[2:], strict=True)):
                made[(n, o, *at)] += int(raw[(c, k, *tap)]) * lsb(fmt, o) * v[(n, c, *place)]
    return made


def _pool(call: Call, x: np.ndarray) -> tuple[np.ndarray, dict[tuple[int, ...], list[tuple[int, ...]]]]:
    """Values, and the positions (padding included, hanging over not) of each window."""
    rank = len(call.attrs["kernel_shape"])
    begin, end = call.attrs["pads"][:rank], call.attrs["pads"][rank:]
    dilations = call.attrs.get("dilations") or (1,) * rank
    shape = (len(x), *call.y[0].shape[1:])
    windows: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for at in np.ndindex(*shape):
        spots = []
        for tap in itertools.product(*map(range, call.attrs["kernel_shape"])):
            spot = [
                p * s - b + t * d
                for p, t, s, d, b in zip(at[2:], tap, call.attrs["strides"], dilations, begin, strict=True)
            ]
            if all(i < e + after for i, e, after in zip(spot, x.shape[2:], end, strict=True)):
                spots.append((*at[:2], *spot))
        windows[at] = spots
    return valued(x, call.x[0].format), windows


def _inside(spot: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return all(0 <= i < e for i, e in zip(spot, shape, strict=True))


def _max_pool(call: Call, x: np.ndarray) -> np.ndarray:
    v, windows = _pool(call, x)
    made = np.empty((len(x), *call.y[0].shape[1:]), object)
    for at, spots in windows.items():
        made[at] = max(v[spot] for spot in spots if _inside(spot, x.shape))
    return made


def _average_pool(call: Call, x: np.ndarray) -> np.ndarray:
    v, windows = _pool(call, x)
    made = np.empty((len(x), *call.y[0].shape[1:]), object)
    for at, spots in windows.items():
        inside = [spot for spot in spots if _inside(spot, x.shape)]
        count = len(spots) if call.attrs["count_include_pad"] else len(inside)
        made[at] = sum((v[spot] for spot in inside), Fraction(0)) / count
    return made


def _affine(call: Call, x: np.ndarray, *_: np.ndarray) -> np.ndarray:
    a, v = _weights(call), valued(x, call.x[0].format)
    made = np.empty(x.shape, object)
    for at in np.ndindex(x.shape):
        made[at] = a[at[1]] * v[at] + _bias(call, at[1])
    return made


def _each(call: Call, x: np.ndarray, function) -> np.ndarray:  # type: ignore[no-untyped-def]
    v = valued(x, call.x[0].format)
    made = np.empty(x.shape, object)
    for at in np.ndindex(x.shape):
        made[at] = function(v[at], at)
    return made


def _clip(call: Call, x: np.ndarray) -> np.ndarray:
    step = lsb(call.x[0].format) / 2 ** call.attrs["align"]
    low, high = call.attrs["low"] * step, call.attrs["high"] * step
    return _each(call, x, lambda v, at: min(max(v, low), high))


def _prelu(call: Call, x: np.ndarray, *_: np.ndarray) -> np.ndarray:
    slope, unit = call.constant(1), lsb(Fixed.parse(call.attrs["slope_format"]))
    assert slope is not None
    return _each(call, x, lambda v, at: v if v >= 0 else v * int(slope[at[1] % slope.size]) * unit)


def _pair(call: Call, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    u, v = np.broadcast_arrays(valued(a, call.x[0].format), valued(b, call.x[1].format))
    made = np.empty(u.shape, object)
    for at in np.ndindex(u.shape):
        made[at] = {"Add": u[at] + v[at], "Sub": u[at] - v[at], "Mul": u[at] * v[at]}[call.op.name]
    return made


def _matmul(call: Call, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    u, v = valued(a, call.x[0].format), valued(b, call.x[1].format)
    made = np.empty((*a.shape[:-1], b.shape[-1]), object)
    for at in np.ndindex(made.shape):
        made[at] = sum((u[(*at[:-1], k)] * v[(*at[:-2], k, at[-1])] for k in range(a.shape[-1])), Fraction(0))
    return made


def _slice(call: Call, x: np.ndarray) -> np.ndarray:
    picked = x
    for axis, (start, size, step) in enumerate(
        zip(call.attrs["starts"], call.attrs["sizes"], call.attrs["steps"], strict=True)
    ):
        picked = picked.take([start + i * step for i in range(size)], axis + 1)
    return picked


def _pad(call: Call, x: np.ndarray) -> np.ndarray:
    before, after = call.attrs["before"], call.attrs["after"]
    shape = [e + b + a for e, b, a in zip(x.shape[1:], before, after, strict=True)]
    made = np.full((len(x), *shape), call.attrs["value"], np.int64)
    for at in np.ndindex(x.shape):
        made[(at[0], *(i + b for i, b in zip(at[1:], before, strict=True)))] = x[at]
    return made


def _arg_max(call: Call, x: np.ndarray) -> np.ndarray:
    rows = np.moveaxis(x, call.attrs["axis"] + 1, -1)
    made = np.empty(rows.shape[:-1], np.int64)
    for at in np.ndindex(made.shape):
        row = rows[at].tolist()
        made[at] = len(row) - 1 - row[::-1].index(max(row)) if call.attrs["last"] else row.index(max(row))
    return np.expand_dims(made, call.attrs["axis"] + 1) if call.attrs["keepdims"] else made


def _upsample(call: Call, x: np.ndarray) -> np.ndarray:
    scales = call.attrs["scales"]
    made = np.empty((*x.shape[:2], *(e * s for e, s in zip(x.shape[2:], scales, strict=True))), np.int64)
    for at in np.ndindex(made.shape):
        made[at] = x[(*at[:2], *(i // s for i, s in zip(at[2:], scales, strict=True)))]
    return made


def _table(call: Call, x: np.ndarray, table: np.ndarray) -> np.ndarray:
    low = call.x[0].format.min_code
    return np.array([table[int(c) - low] for c in x.reshape(-1)], np.int64).reshape(x.shape)


def _thresholds(call: Call, x: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    made = np.empty(x.shape, np.int64)
    for at in np.ndindex(x.shape):
        row = thresholds[at[1] % len(thresholds)].tolist()
        made[at] = call.attrs["start"] + call.attrs["step"] * sum(int(x[at]) >= t for t in row)
    return made


def _embedding(call: Call, x: np.ndarray, table: np.ndarray) -> np.ndarray:
    rows = [table[int(index)].tolist() for index in x.reshape(-1)]
    return np.array(rows, np.int64).reshape(*x.shape, -1)


def _softmax(call: Call, x: np.ndarray, table: np.ndarray) -> np.ndarray:
    fmt = Fixed.parse(call.attrs["y_format"])
    rows = np.moveaxis(x, call.attrs["axis"] + 1, -1)
    made = np.empty(rows.shape, np.int64)
    for at in np.ndindex(rows.shape[:-1]):
        row = rows[at].tolist()
        powers = [int(table[max(row) - code]) for code in row]
        made[at] = [to_code(Fraction(power, sum(powers)), fmt) for power in powers]
    return np.moveaxis(made, -1, call.attrs["axis"] + 1)


def _reshape(call: Call, x: np.ndarray) -> np.ndarray:
    assert math.prod(call.attrs["shape"]) == x[0].size
    return np.array(x.reshape(-1).tolist(), np.int64).reshape(len(x), *call.attrs["shape"])


def _token_exponent(call: Call, x: np.ndarray) -> np.ndarray:
    made = [definition.token_exponent(row, call.attrs["width"]) for _, row in definition.rows_of(x)]
    return np.array(made, np.int64).reshape(*x.shape[:-1], 1)


def _token_quantize(call: Call, x: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    fmt, values = Fixed.parse(call.attrs["y_format"]), valued(x, call.x[0].format)
    return np.array(
        [to_code(values[at] / 2 ** int(exponents[*at[:-1], 0]), fmt) for at in np.ndindex(x.shape)], np.int64
    ).reshape(x.shape)


def _token_rescale(call: Call, x: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    return valued(x, call.x[0].format) * (2 ** exponents.astype(object))


_VALUES = {
    "Requantize": lambda call, x: _each(call, x, lambda v, at: v),
    "Linear": _linear,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Affine": _affine,
    "Relu": lambda call, x: _each(call, x, lambda v, at: max(v, Fraction(0))),
    "Clip": _clip,
    "PRelu": _prelu,
    "Table": _table,
    "Thresholds": _thresholds,
    "Embedding": _embedding,
    "Softmax": _softmax,
    "RmsNorm": lambda call, *x: definition.norm(call, to_code, lsb, *x),
    "LayerNorm": lambda call, *x: definition.norm(call, to_code, lsb, *x),
    "TokenExponent": _token_exponent,
    "TokenQuantize": _token_quantize,
    "TokenRescale": _token_rescale,
    "Add": _pair,
    "Sub": _pair,
    "Mul": _pair,
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "Concat": lambda call, *x: np.concatenate(x, call.attrs["axis"] + 1),
    "Slice": _slice,
    "Pad": _pad,
    "Reshape": _reshape,
    "Transpose": lambda call, x: x.transpose(0, *(p + 1 for p in call.attrs["perm"])),
    "Upsample": _upsample,
    "ArgMax": _arg_max,
}
OPERATORS = frozenset(_VALUES)
