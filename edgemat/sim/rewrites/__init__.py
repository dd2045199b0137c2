"""Rewrites of the simulator's in-memory copy, each in a file of its own with the proof that it changes no bit.

A rewrite takes the body under construction, the call and its carried inputs; it returns the carried output, or None
where its proof does not hold. Then the dossier's own body is written, as in the file.
"""

from __future__ import annotations

from collections.abc import Callable

from edgemat.op import Call
from edgemat.sim.carriers import Carried, FusedBody
from edgemat.sim.rewrites.add_bytes import add_bytes
from edgemat.sim.rewrites.defer_rounding import defer_rounding
from edgemat.sim.rewrites.divide_average import divide_average
from edgemat.sim.rewrites.fold_add import fold_add
from edgemat.sim.rewrites.fold_conv import fold_conv
from edgemat.sim.rewrites.fold_linear import fold_linear
from edgemat.sim.rewrites.gather_stored import gather_stored
from edgemat.sim.rewrites.nibble_linear import nibble_linear
from edgemat.sim.rewrites.pool_bytes import pool_bytes
from edgemat.sim.rewrites.quantize_conv import quantize_conv
from edgemat.sim.rewrites.quantize_linear import quantize_linear
from edgemat.sim.rewrites.reshape_any import reshape_any

Rewrite = Callable[[FusedBody, Call, list[Carried]], Carried | None]

REWRITES: dict[str, tuple[Rewrite, ...]] = {
    "Linear": (nibble_linear, quantize_linear, fold_linear),
    "Conv": (quantize_conv, fold_conv),
    "MaxPool": (defer_rounding, pool_bytes),
    "AveragePool": (divide_average,),
    "Add": (add_bytes, fold_add),
    "Sub": (add_bytes, fold_add),
    "Reshape": (reshape_any,),
    "Embedding": (gather_stored,),
}
