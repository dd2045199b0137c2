"""Add and Sub of two tensors with alignment, rounding constant and scale folded into one multiplication a side.

``round((a * 2**p +- b * 2**q) * 2**-s)`` is ``floor(a * 2**(p-s) +- b * 2**(q-s) + 1/2)`` for RND. Every operand, the
sum and the half are multiples of ``2**-s`` below ``2**24`` of them by the operator's bound: exact in float32.
"""

from __future__ import annotations

import numpy as np

from edgemat.body import Coded
from edgemat.op import Call
from edgemat.sim.carriers import SINGLE, SINGLE_LIMIT, Carried, FusedBody
from edgemat.sim.rewrites.epilogue import fold


def fold_add(body: FusedBody, call: Call, x: list[Carried]) -> Carried | None:
    """Rewrites an Add or Sub whose sum fits float32."""
    folded = fold(call, call.bounds.magnitude)
    if folded is None or folded.scale.size > 1 or max(t.magnitude for t in call.x) >= SINGLE_LIMIT:
        return None
    fracs = [t.format.fracs[0] for t in call.x]
    scale, constant = float(folded.scale[0]), float(folded.constant[0])
    terms = []
    for index, (side, frac) in enumerate(zip(x, fracs, strict=True)):
        factor = scale * 2.0 ** (max(fracs) - frac)
        codes = call.constant(index)
        if codes is not None:
            offset = constant if call.op.name == "Add" else 0.0
            terms.append(Coded(body.const(codes * factor + offset, np.float32), SINGLE))
            constant = 0.0 if offset else constant
        else:
            terms.append(body.scale(body.cast(side.coded(), SINGLE), factor))
    value = body.binary(call.op.name, *terms)
    if constant:
        value = body.binary("Add", value, body.number(constant, value))
    return folded.carried(body, call, value)
