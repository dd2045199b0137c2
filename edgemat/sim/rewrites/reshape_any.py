"""Reshape of whichever carrier its reader wants: it moves nothing and changes nothing."""

from __future__ import annotations

import numpy as np

from edgemat.body import Coded
from edgemat.op import Call
from edgemat.sim.carriers import Carried, FusedBody, Packed


def reshape_any(body: FusedBody, call: Call, x: list[Carried]) -> Carried | None:
    """Rewrites a Reshape lazily, so that bytes stay bytes."""
    source = x[0]
    if not source.is_packed:
        return None

    def shaped(value):  # type: ignore[no-untyped-def]
        return body.op("Reshape", value, body.const([-1, *call.attrs["shape"]], np.int64))

    def coded() -> Coded:
        whole = source.coded()
        return Coded(shaped(whole.value), whole.dtype)

    def packed() -> Packed:
        whole = source.packed()
        return Packed(shaped(whole.value), whole.offset)

    return Carried(body, call.y[0], coded=coded, packed=packed)
