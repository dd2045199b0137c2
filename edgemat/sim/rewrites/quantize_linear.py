r"""Linear and its epilogue as one integer kernel, onnxruntime's ``com.microsoft.QGemm``, on bytes.

QGemm computes ``saturate_u8(round_half_even(float32(acc) * scale) + zero_point)`` with an exact int32 accumulator
``acc = sum (x_byte - offset_x) * w + bias``.

1. *The accumulator.* Operands are u8 x s8. CPUs without VNNI add pairs of products in saturating 16-bit arithmetic, so
   the largest byte times the two largest |w| of a channel must stay within 32767; elsewhere the weights are offset by
   128 and the operands are u8 x u8, which every CPU widens first.
2. *The offset.* The result's byte is ``code + offset``, ``offset = -min(lo, 0)`` for the proved interval lo..hi of the
   output. ``offset * 2**s`` goes into the bias, so bytes come from sums >= 0; a sum below that rounds to at most 0 and
   saturates to 0, the code lo, which is then the format's rail. float32(acc) is exact while ``|acc| < 2**24``.
3. *Ties.* ``scale = 2**-s * (1 + d)`` with ``d = 2**-22`` makes half-even half-up. Let ``u = acc * 2**-s`` in [0, 256),
   a multiple of ``2**-s``. At a tie ``u = k + 1/2`` the product exceeds u by ``u * 2**-22``, more than one unit in the
   last place of float32, so it is rounded to a number above the tie. Below one, ``u <= k + 1/2 - 2**-s``, the product
   exceeds u by less than ``2**-14`` and rounding adds at most ``2**-16``: it stays below the tie for ``s <= 13``.
   Elsewhere both round alike, and above 256 all saturates. RND is that; TRN subtracts ``2**(s-1)`` from the bias first
   (``floor(u) = half_up(u - 1/2)``); RND_MIN_INF takes ``-d`` by the mirrored argument; RND_CONV takes d = 0 and the
   offset as zero point, behind the rounding.
4. *No rounding* (``s <= 0``, or no epilogue): scales are powers of two, all is exact.
"""

from __future__ import annotations

import numpy as np

from edgemat.body import Coded
from edgemat.op import Call
from edgemat.sim.carriers import SINGLE, SINGLE_LIMIT, Carried, FusedBody, Packed, byte_offset
from edgemat.sim.rewrites.epilogue import effective_rounding, rounded_interval

MAX_SHIFT = 13
TIE_BREAK = 2.0**-22
WORTHWHILE = 32
"""Output features from which packing a float carrier pays for itself."""


def pairs_are_safe(weight: np.ndarray, largest_byte: int) -> bool:
    """Whether no pair of u8 x s8 products can leave 16 bits.

    Args:
        weight: int64 [out, in] codes.
        largest_byte: Largest unsigned operand.
    """
    top = np.sort(np.abs(weight), axis=1)[:, -2:].sum(axis=1)
    return int(top.max()) * largest_byte <= 32767


def quantize_linear(body: FusedBody, call: Call, x: list[Carried]) -> Carried | None:
    """Rewrites a rank-2 Linear of bytes."""
    source, result = x[0], call.y[0]
    if len(source.tensor.shape) != 2 or not source.can_pack:
        return None
    arrays = call.op.native(call).arrays
    weight = arrays["weight"]
    if not source.is_packed and weight.shape[0] < WORTHWHILE:
        return None
    if weight.min() < -128 or weight.max() > 127:
        return None
    plan = _plan(call, arrays.get("bias", np.zeros(weight.shape[0], np.int64)))
    if plan is None:
        return None
    scale, bias, zero = plan
    packed = source.packed()
    largest = source.tensor.hi + packed.offset
    kind, weight_zero = (np.int8, 0) if pairs_are_safe(weight, largest) else (np.uint8, 128)
    one = body.const(1.0, SINGLE)
    inputs = [
        packed.value,
        one,
        body.const(packed.offset, np.uint8),
        body.const(weight.T + weight_zero, kind),
        body.const(scale, SINGLE),
        body.const(np.full(scale.size, weight_zero), kind),
        body.const(bias, np.int32),
    ]
    if call.epilogue is None:
        value = Coded(body.microsoft("QGemm", *inputs), SINGLE)
        return Carried(body, result, coded=lambda: value)
    made = body.microsoft("QGemm", *inputs, one, body.const(zero, np.uint8))
    exact = call.exact[0]
    rounding = effective_rounding(call.epilogue.format)
    _, high = rounded_interval(exact.lo, exact.hi, call.epilogue.shift, rounding)
    offset = byte_offset(result)
    assert offset is not None
    if high > result.hi and result.hi + offset < 255:
        made = body.op("Clip", made, None, body.const(result.hi + offset, np.uint8))
    return Carried(body, result, packed=lambda: Packed(made, offset))


def _plan(call: Call, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray, int] | None:
    """Scales [1 or channels], int32 bias and zero point, or None where the proof fails."""
    magnitude = call.bounds.magnitude
    if call.epilogue is None:
        return (np.ones(1), bias, 0) if magnitude < SINGLE_LIMIT else None
    target, shift = call.epilogue.format, call.epilogue.shift
    exact, result = call.exact[0], call.y[0]
    rounding = effective_rounding(target) if max(shift) > 0 else "RND"
    low, high = rounded_interval(exact.lo, exact.hi, shift, rounding)
    offset = byte_offset(result)
    if offset is None or result.format.per_channel:
        return None
    if target.overflow not in ("SAT", "SAT_SYM") and not target.holds(low, high):
        return None
    shifts = np.asarray(shift, dtype=np.int64)
    breaks = {"RND": TIE_BREAK, "TRN": TIE_BREAK, "RND_MIN_INF": -TIE_BREAK, "RND_CONV": 0.0}
    if rounding not in breaks or max(shift) > MAX_SHIFT or min(shift) < -MAX_SHIFT:
        return None
    reach = magnitude + (1 << max(0, max(shift))) * (offset + 1)
    if reach >= SINGLE_LIMIT:
        return None
    scale = np.exp2(-shifts.astype(np.float64)) * np.where(shifts > 0, 1 + breaks[rounding], 1.0)
    if rounding == "RND_CONV" or max(shift) <= 0:
        return scale, bias, offset
    if min(shift) < 0 and offset:
        return None
    whole = np.int64(1) << np.maximum(shifts, 0)
    extra = offset * whole
    if rounding == "TRN":
        extra = extra - np.where(shifts > 0, whole >> 1, 0)
    return scale, bias + extra, 0
