"""Add and Sub of bytes with channels last, back to bytes: the shortcut of a residual network.

DequantizeLinear gives ``(byte - offset) * 2**p`` exactly, so each side arrives scaled as `fold_add` wants it; its proof
holds for the sum with the rounding constant. The result's byte offset, an integer, is added with the constant and is
part of the bound. The Clip leaves values from 0 to 255, where the cast to uint8 truncates: Floor.
"""

from __future__ import annotations

import numpy as np

from edgemat.body import Coded
from edgemat.op import Call
from edgemat.sim.carriers import SINGLE, Carried, FusedBody, Packed, byte_offset
from edgemat.sim.rewrites.epilogue import fold


def add_bytes(body: FusedBody, call: Call, x: list[Carried]) -> Carried | None:
    """Rewrites an Add or Sub of equal shapes of which one side is written with channels last."""
    offset = byte_offset(call.y[0])
    if not any(side.is_channels_last for side in x) or not all(side.can_pack for side in x):
        return None
    if offset is None or call.constants or call.epilogue is None or len({t.shape for t in call.x}) > 1:
        return None
    (shift,) = call.epilogue.shift if len(call.epilogue.shift) == 1 else (None,)
    if shift is None:
        return None
    folded = fold(call, call.bounds.magnitude + (offset << max(shift, 0)))
    if folded is None or not folded.monotone or folded.operator != "Floor" or call.epilogue.format.per_channel:
        return None
    fracs = [t.format.fracs[0] for t in call.x]
    terms = []
    for side, frac in zip(x, fracs, strict=True):
        packed = side.packed(channels_last=True)
        factor = body.const(float(folded.scale[0]) * 2.0 ** (max(fracs) - frac), SINGLE)
        terms.append(body.op("DequantizeLinear", packed.value, factor, body.const(packed.offset, np.uint8)))
    value = Coded(body.op(call.op.name, *terms), SINGLE)
    constant = float(folded.constant[0]) + offset
    if constant:
        value = body.binary("Add", value, body.number(constant, value))
    result = call.y[0]
    limits = [body.number(code + offset, value).value for code in (result.lo, result.hi)]
    made = body.op("Cast", body.op("Clip", value.value, *limits), to=2)  # uint8
    return Carried(body, result, packed=lambda: Packed(made, offset, channels_last=True))
