"""Sums of products: their proved intervals, and exact ways to compute them in numpy and in ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgemat.body import Body, Coded
from edgemat.codes import Codes
from edgemat.op import Bounds, Call, carrier_for


def sum_bounds(weights: np.ndarray, lo: int, hi: int, bias: np.ndarray | None) -> Bounds:
    """Intervals of ``sum_k w[o, k] * x[k] + b[o]`` for x in lo..hi, over all rows o.

    The partial interval widens every term's interval to contain 0, the bias included, so it holds in any order.

    Args:
        weights: [rows, terms] int64 codes.
        lo: Smallest code of x.
        hi: Largest code of x.
        bias: [rows] int64 codes, or None.
    """
    largest = int(np.abs(weights).max(initial=0)) * max(abs(lo), abs(hi), 1) * max(weights.shape[1], 1)
    kind = np.dtype(np.int64) if largest < 1 << 61 else np.dtype(object)
    positive = np.maximum(weights, 0).astype(kind).sum(axis=1)
    negative = np.minimum(weights, 0).astype(kind).sum(axis=1)
    return _bounds_of_rows(positive, negative, lo, hi, bias)


def stored_bounds(weights: Codes, lo: int, hi: int, bias: np.ndarray | None) -> Bounds:
    """`sum_bounds` of weights that stay in their file, by the sums of their rows."""
    found = weights.survey
    largest = max(-found.lo, found.hi, 0) * max(abs(lo), abs(hi), 1) * (weights.size // weights.shape[0])
    kind = np.dtype(np.int64) if largest < 1 << 61 else np.dtype(object)
    return _bounds_of_rows(found.positive.astype(kind), found.negative.astype(kind), lo, hi, bias)


def _bounds_of_rows(positive: np.ndarray, negative: np.ndarray, lo: int, hi: int, bias: np.ndarray | None) -> Bounds:
    """Intervals by the sums of each row's positive and negative weights."""
    kind, zero = positive.dtype, np.zeros((), positive.dtype)
    b = np.zeros(len(positive), kind) if bias is None else bias.astype(kind)
    low = positive * lo + negative * hi + b
    high = positive * hi + negative * lo + b
    plo, phi = min(lo, 0), max(hi, 0)
    under = positive * plo + negative * phi + np.minimum(b, zero)
    over = positive * phi + negative * plo + np.maximum(b, zero)
    return Bounds((int(low.min()), int(high.max())), (int(under.min()), int(over.max())))


def term_bounds(weights: np.ndarray, lo: np.ndarray, hi: np.ndarray, bias: np.ndarray | None) -> Bounds:
    """`sum_bounds` where the terms have intervals of their own: `lo` and `hi` broadcast against `weights`."""
    rows, terms = weights.shape
    reach = max(-int(lo.min()), int(hi.max()), 1)
    largest = int(np.abs(weights).max(initial=0)) * reach * max(terms, 1)
    kind = np.dtype(np.int64) if largest < 1 << 61 else np.dtype(object)
    w, zero = weights.astype(kind), np.zeros((), kind)
    ends = w * lo.astype(kind), w * hi.astype(kind)
    least, most = np.minimum(*ends), np.maximum(*ends)
    b = np.zeros(rows, kind) if bias is None else bias.astype(kind)
    low, high = least.sum(axis=1) + b, most.sum(axis=1) + b
    under = np.minimum(least, zero).sum(axis=1) + np.minimum(b, zero)
    over = np.maximum(most, zero).sum(axis=1) + np.maximum(b, zero)
    return Bounds((int(low.min()), int(high.max())), (int(under.min()), int(over.max())))


def input_shifts(call: Call, limit: int) -> np.ndarray | None:
    """Left shifts that bring the weights of each input channel to the grid of the finest one, or None without any.

    The codes of input channel c lie on the grid ``frac_x[c]``, so ``sum_c w[c] * x[c]`` is the sum of codes
    ``w[c] * 2**(F - frac_x[c])`` times ``x[c]`` on the grid ``frac_w + F`` with ``F = max_c frac_x[c]``, exactly. What
    multiplies a channel of width 0 multiplies the code 0: it is left out (shift -1).

    Args:
        call: A sum of products whose input 0 has its channels on axis 1.
        limit: Largest shift allowed.

    Returns:
        int64 [channels], -1 for channels that are always 0; None where the input has one binary point and width.
    """
    fmt = call.x[0].format
    if not fmt.per_channel:
        return None
    count = int(call.x[0].shape[1] or 1)
    fracs = np.broadcast_to(np.asarray(fmt.fracs, np.int64), (count,))
    live = np.broadcast_to(np.asarray(fmt.widths if fmt.widths is not None else 1) != 0, (count,))
    shifts = np.where(live, fmt.finest - fracs, -1)
    if int(shifts.max()) > limit:
        raise call.refuse(
            f"input channels whose binary points lie {int(shifts.max())} bits apart", f"expected at most {limit}"
        )
    return None if not shifts.any() else shifts


def shifted_weights(weights: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Weights times ``2**shifts``; 0 where a shift is -1."""
    return np.where(shifts < 0, 0, weights * (np.int64(1) << np.maximum(shifts, 0)))


def emit_shifted_weights(body: Body, weights: Coded, shifts: np.ndarray) -> Coded:
    """`shifted_weights` in a body, in int64."""
    return body.scale(body.cast(weights, np.int64), np.where(shifts < 0, 0, np.int64(1) << np.maximum(shifts, 0)))


def exact_matmul(a: np.ndarray, b: np.ndarray, magnitude: int) -> np.ndarray:
    """int64 matrix product; through float64 (BLAS) where every partial sum is below 2**53 and so exact there."""
    if magnitude < 1 << 53:
        return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)
    return a.astype(np.int64) @ b.astype(np.int64)


def emit_matmul(body: Body, call: Call, x: Coded, weight: Coded, magnitude: int) -> Coded:
    """``x @ weight`` in float32, float64 or int64, whichever is the fastest that stays exact."""
    carrier = carrier_for(max(magnitude, call.x[0].magnitude))
    return body.binary("MatMul", body.cast(x, carrier), body.cast(weight, carrier))


def emit_bias(body: Body, acc: Coded, bias: Coded | None, ndim: int) -> Coded:
    """Adds a [C] bias along axis 1."""
    if bias is None:
        return acc
    value = body.cast(bias, acc.dtype)
    if ndim > 2:
        value = Coded(body.op("Reshape", value.value, body.const([1, -1] + [1] * (ndim - 2), np.int64)), value.dtype)
    return body.binary("Add", acc, value)


def split_limbs(body: Body, x: Coded, lo: int, hi: int, bits: int) -> list[Coded]:
    """Digits of integers lo..hi in base 2**bits as float32, lowest first; all but the last are not negative."""
    if max(abs(lo), abs(hi)) < 1 << bits:
        return [body.cast(x, np.float32)]
    rest = body.cast(x, np.float64) if max(abs(lo), abs(hi)) < 1 << 53 else body.cast(x, np.int64)
    digits = []
    while max(abs(lo), abs(hi)) >= 1 << bits:
        base = body.number(1 << bits, rest)
        if rest.dtype.kind == "f":
            upper = body.unary("Floor", body.binary("Div", rest, base))
            digit = body.binary("Sub", rest, body.binary("Mul", upper, base))
        else:
            digit = body.binary("Mod", rest, base)
            upper = body.binary("Div", body.binary("Sub", rest, digit), base)
        digits.append(body.cast(digit, np.float32))
        rest, lo, hi = upper, lo >> bits, hi >> bits
    return [*digits, body.cast(rest, np.float32)]


def emit_limb_products(
    body: Body,
    product: str,
    x: Coded,
    x_range: tuple[int, int],
    w: Coded,
    w_range: tuple[int, int],
    terms: int,
    magnitude: int,
    **attrs: Any,
) -> Coded:
    """A float32 operator (Conv, ConvTranspose) over limbs of both operands, recombined exactly.

    Every product of two limbs summed over `terms` stays below 2**24, so each float32 operator is exact.
    """
    room = 24 - max(terms, 1).bit_length()
    w_bits = max(abs(w_range[0]), abs(w_range[1]), 1).bit_length()
    w_step = min(w_bits, room // 2) if w_bits > room - 4 else w_bits
    x_step = room - w_step
    carrier = carrier_for(magnitude, minimum=np.dtype(np.float64))
    total: Coded | None = None
    weights = split_limbs(body, w, *w_range, w_step)
    for i, digit in enumerate(split_limbs(body, x, *x_range, x_step)):
        for j, weight in enumerate(weights):
            part = body.cast(Coded(body.op(product, digit.value, weight.value, **attrs), np.dtype(np.float32)), carrier)
            part = body.scale(part, (1 << (i * x_step + j * w_step)))
            total = part if total is None else body.binary("Add", total, part)
    assert total is not None
    return total


def windows(
    x: np.ndarray,
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    pads: tuple[int, ...],
    fill: int,
) -> np.ndarray:
    """Sliding windows of a [N, C, *spatial] array: [N, C, *out, *kernel] (a view of the padded array)."""
    rank = len(kernel)
    width = [(0, 0), (0, 0)] + [(pads[i], pads[rank + i]) for i in range(rank)]
    padded = np.pad(x, width, constant_values=fill)
    extent = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True))
    view = np.lib.stride_tricks.sliding_window_view(padded, extent, axis=tuple(range(2, 2 + rank)))
    steps = [slice(None), slice(None)] + [slice(None, None, s) for s in strides]
    return view[tuple(steps + [slice(None, None, d) for d in dilations])]
