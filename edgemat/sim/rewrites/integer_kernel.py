r"""When onnxruntime's integer kernels with a fused requantisation (QGemm, QLinearConv) are exact, and how to feed them.

They compute ``saturate_u8(round_half_even(float32(acc) * scale) + zero_point)`` with an exact int32 accumulator
``acc = sum (x_byte - offset_x) * w + bias``.

1. *The accumulator.* Operands are u8 x s8. CPUs without VNNI add pairs of products in saturating 16-bit arithmetic, so
   the largest byte times the two largest |w| of a channel must stay within 32767. Where it does not, the sum is taken
   over the input twice, with weights ``w // 2`` and ``w - w // 2``: no |w| exceeds 64, and 255 * (64 + 64) = 32640.
   Depthwise convolutions have their weights offset by 128 instead: u8 x u8, which every CPU widens first.
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

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgemat.op import Call
from edgemat.sim.carriers import SINGLE_LIMIT, FusedBody, byte_offset
from edgemat.sim.rewrites.epilogue import effective_rounding, rounded_interval

MAX_SHIFT = 13
TIE_BREAK = 2.0**-22


@dataclass(frozen=True)
class Kernel:
    """What an integer kernel is fed with.

    Attributes:
        scale: float64 [1 or channels].
        bias: int64 [channels], within int32.
        zero_point: Of the result.
        top: Largest byte of the result if the kernel's own saturation at 255 is too late, else None.
    """

    scale: np.ndarray
    bias: np.ndarray
    zero_point: int
    top: int | None

    def clipped(self, body: FusedBody, value: ir.Value) -> ir.Value:
        """The kernel's result with the upper rail applied."""
        return value if self.top is None else body.op("Clip", value, None, body.const(self.top, np.uint8))


def pairs_are_safe(weight: np.ndarray, largest_byte: int) -> bool:
    """Whether no pair of u8 x s8 products can leave 16 bits.

    Args:
        weight: int64 [out, ...] codes.
        largest_byte: Largest unsigned operand.
    """
    top = np.sort(np.abs(weight.reshape(weight.shape[0], -1)), axis=1)[:, -2:].sum(axis=1)
    return int(top.max()) * largest_byte <= 32767


def halves(weight: np.ndarray) -> np.ndarray:
    """[out, 2 in, ...] weights for an input that is there twice: the same sums, no |w| above 64.

    Args:
        weight: [out, in, ...] codes of at most 8 bits.
    """
    return np.concatenate([weight // 2, weight - weight // 2], axis=1)


def plan_kernel(call: Call, bias: np.ndarray) -> Kernel | None:
    """How to feed a kernel for `call` and its epilogue, or None where the proof fails.

    Args:
        call: Linear or Conv.
        bias: int64 [channels].
    """
    magnitude = call.bounds.magnitude
    if call.epilogue is None:
        return Kernel(np.ones(1), bias, 0, None) if magnitude < SINGLE_LIMIT else None
    target, shift = call.epilogue.format, call.epilogue.shift
    exact, result = call.exact[0], call.y[0]
    rounding = effective_rounding(target) if max(shift) > 0 else "RND"
    low, high = rounded_interval(exact.lo, exact.hi, shift, rounding)
    offset = byte_offset(result)
    if offset is None or result.format.per_channel:
        return None
    if target.overflow not in ("SAT", "SAT_SYM") and not target.holds(low, high):
        return None
    top = result.hi + offset if high > result.hi and result.hi + offset < 255 else None
    shifts = np.asarray(shift, dtype=np.int64)
    breaks = {"RND": TIE_BREAK, "TRN": TIE_BREAK, "RND_MIN_INF": -TIE_BREAK, "RND_CONV": 0.0}
    if rounding not in breaks or max(shift) > MAX_SHIFT or min(shift) < -MAX_SHIFT:
        return None
    reach = magnitude + (1 << max(0, max(shift))) * (offset + 1)
    if reach >= SINGLE_LIMIT:
        return None
    scale = np.exp2(-shifts.astype(np.float64)) * np.where(shifts > 0, 1 + breaks[rounding], 1.0)
    if rounding == "RND_CONV" or max(shift) <= 0:
        return Kernel(scale, bias, offset, top)
    if min(shift) < 0 and offset:
        return None
    whole = np.int64(1) << np.maximum(shifts, 0)
    extra = offset * whole
    if rounding == "TRN":
        extra = extra - np.where(shifts > 0, whole >> 1, 0)
    return Kernel(scale, bias + extra, 0, top)
