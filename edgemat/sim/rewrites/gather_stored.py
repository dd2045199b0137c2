"""Embedding whose table stays in its file: rows of a mapped table in the narrowest integers that hold its codes.

Only the rows that are asked for become resident. Nothing is computed: the rows are cast to the code type.
"""

from __future__ import annotations

import numpy as np

from edgemat.body import Coded
from edgemat.op import Call
from edgemat.sim.carriers import Carried, FusedBody


def gather_stored(body: FusedBody, call: Call, x: list[Carried]) -> Carried | None:
    """Rewrites an Embedding whose table stays in its file."""
    stored = call.stored(1)
    if stored is None:
        return None
    found = stored.survey
    dtype = next(kind for kind in map(np.dtype, ("int8", "int16", "int32", "int64"))
                 if np.iinfo(kind).min <= found.lo and found.hi <= np.iinfo(kind).max)  # fmt: skip
    table = body.large((block.astype(dtype) for block in stored.blocks()), stored.shape, dtype)
    index = body.cast(x[0].coded(), np.int32)
    rows = body.cast(Coded(body.op("Gather", table, index.value, axis=0), dtype), call.y[0].dtype)
    return Carried(body, call.y[0], coded=lambda: rows)
