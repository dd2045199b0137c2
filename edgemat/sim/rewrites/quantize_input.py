"""The input quantiser in float32 and in bytes, exact for every float32.

With ``v = x * 2**f`` and f >= 0 the product is exact (or infinite, which saturates as it should).

RND. ``floor(v + 1/2)`` is wrong at 0.49999997. But ``h = floor(2 v)`` is exact, ``floor((h + 1) / 2)`` is the same
number as ``floor(v + 1/2)`` in exact arithmetic (write 2v = h + r, 0 <= r < 1: adding r cannot reach the next even
integer), and its operations are exact in float32 for |h| < 2**23; beyond that the result is at least 2**21 in size and
saturates, since formats of at most `MAX_WIDTH` bits are taken.

In bytes: QuantizeLinear computes ``saturate(round_half_even((h + 1/2) / 2) + zero_point)``; ``h/2 + 1/4`` is never a
tie, and rounds to h/2 for even h and to (h + 1)/2 for odd h: the same number again. ``h + 1/2`` is exact for
|h| < 2**22, beyond which bytes saturate.

With a real scale, QuantizeLinear is the very operator the file imitates, ``saturate(round_half_even(x / scale) +
zero_point)`` in float32; other codes than 256 in a row, and all as float32, come from the file's own body.

TRN is floor(v), RND_CONV is Round(v), RND_MIN_INF mirrors RND with Ceil. Other modes, WRAP and SAT_ZERO, f < 0 and wide
formats keep the file's body in float64.
"""

from __future__ import annotations

import numpy as np

from edgemat import formats
from edgemat.body import Coded
from edgemat.op import Call
from edgemat.ops.boundary import real_scale
from edgemat.sim.carriers import SINGLE, Carried, FusedBody, Packed
from edgemat.sim.rewrites.epilogue import effective_rounding

MAX_WIDTH = 20
MAX_FRAC = 60


def quantize_input(body: FusedBody, call: Call, x: Coded) -> Carried | None:
    """Rewrites a Quantize whose format the proofs above cover."""
    fmt, tensor, scale = call.y[0].format, call.y[0], real_scale(call)
    if scale is not None:
        return _scaled(body, call, x, scale)
    rounding = effective_rounding(fmt)
    low, high = fmt.rails
    if fmt.overflow not in ("SAT", "SAT_SYM") or fmt.width > MAX_WIDTH or min(fmt.fracs) < 0:
        return None
    if max(fmt.fracs) > MAX_FRAC or rounding not in ("RND", "TRN", "RND_CONV", "RND_MIN_INF"):
        return None
    fracs = formats.channel_array(fmt.fracs, len(tensor.shape))

    def scaled(extra: int) -> Coded:
        return body.scale(x, np.ldexp(1.0, fracs + extra))

    def coded() -> Coded:
        if rounding == "TRN":
            value = body.unary("Floor", scaled(0))
        elif rounding == "RND_CONV":
            value = body.unary("Round", scaled(0))
        else:
            operator, half = ("Floor", 0.5) if rounding == "RND" else ("Ceil", -0.5)
            value = body.scale(body.unary(operator, scaled(1)), 0.5)
            value = body.unary(operator, body.binary("Add", value, body.number(half, value)))
        if fmt.widths is not None:
            lows, highs = (formats.channel_array(rail, len(tensor.shape)) for rail in fmt.channel_rails())
            return body.minimum(body.maximum(value, body.number(lows, value)), body.number(highs, value))
        return Coded(body.op("Clip", value.value, body.const(low, SINGLE), body.const(high, SINGLE)), SINGLE)

    def packed() -> Packed:
        value = body.unary("Floor", scaled(1))
        value = body.binary("Add", value, body.number(0.5, value))
        made = body.op("QuantizeLinear", value.value, body.const(2.0, SINGLE), body.const(-low, np.uint8))
        if high - low < 255:
            made = body.op("Clip", made, None, body.const(high - low, np.uint8))
        return Packed(made, -low)

    fits = rounding == "RND" and high - low <= 255 and not fmt.per_channel
    return Carried(body, tensor, coded=coded, packed=packed if fits else None)


def _scaled(body: FusedBody, call: Call, x: Coded, scale: np.float32) -> Carried:
    """The input quantiser of a tensor with a real scale."""
    tensor = call.y[0]
    low, high = tensor.lo, tensor.hi

    def packed() -> Packed:
        made = body.op("QuantizeLinear", x.value, body.const(scale, SINGLE), body.const(-low, np.uint8))
        if high - low < 255:
            made = body.op("Clip", made, None, body.const(high - low, np.uint8))
        return Packed(made, -low)

    fits = high - low <= 255 and 0 <= -low <= 255
    return Carried(body, tensor, coded=lambda: call.op.emit(body, call, x), packed=packed if fits else None)
