"""MaxPool before the rounding of the sum it reads.

Floor, Ceil and Round never decrease: ``max(floor(v))`` over a window is ``floor(max(v))``, and there is less to round.
Padding is never chosen on either side. Applied where the pool is the only reader.
"""

from __future__ import annotations

from edgemat.body import Coded
from edgemat.op import Call
from edgemat.sim.carriers import SINGLE, Carried, FusedBody, Unrounded


def defer_rounding(body: FusedBody, call: Call, x: list[Carried]) -> Carried | None:
    """Rewrites a MaxPool that reads an unrounded sum."""
    raw = x[0].unrounded
    if raw is None or x[0].readers != 1 or raw.coded.dtype != SINGLE:
        return None
    return Carried(body, call.y[0], unrounded=Unrounded(_pooled(body, call, raw.coded), raw.finish))


def _pooled(body: FusedBody, call: Call, value: Coded) -> Coded:
    made = call.op.emit(body, call, value)
    assert made.dtype == SINGLE
    return made
