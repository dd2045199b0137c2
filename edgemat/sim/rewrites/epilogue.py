r"""Folds a Requantize into the sum before it.

A sum of integer products ``acc`` is followed by ``y = clip(round(acc * 2**-s))``. With weights and bias multiplied by
``2**-s`` (exact: powers of two) the sum itself is ``v = acc * 2**-s``, and

    RND          floor(v + 1/2)      the half goes into the bias
    RND_MIN_INF  ceil(v - 1/2)       minus the half goes into the bias
    TRN          floor(v)
    RND_CONV     round half to even

Every term is a multiple of ``2**-s`` (for s >= 1 the half is one, too), so the sum is exact in float32 in any order and
with any fusing of multiply and add while every partial sum, the constant included, stays below ``2**24`` of them:

    magnitude of the partial sums + 2**(s-1) < 2**24.

A Clip with integer limits and rounding to integers change places freely (both are monotone, rounding keeps integers),
so the Clip comes first, where onnxruntime writes it into a Conv. What is left for Floor is then often proved >= 0:
truncation is Floor there, and two casts through int32 are the faster spelling.

Where ``s <= 0`` nothing is rounded and no constant is added. The three modes that look at the sign of v are those above
where every negative v ends as 0 (unsigned, saturating): TRN_ZERO is TRN, RND_INF is RND, RND_ZERO is RND_MIN_INF, since
each pair agrees for v >= 0 and gives at most 0 for v < 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgemat import formats
from edgemat.body import Body, Coded
from edgemat.formats import Fixed
from edgemat.op import Call
from edgemat.sim.carriers import SINGLE, SINGLE_LIMIT, Carried, FusedBody, Unrounded

_OPERATORS = {"RND": ("Floor", 0.5), "RND_MIN_INF": ("Ceil", -0.5), "TRN": ("Floor", 0.0), "RND_CONV": ("Round", 0.0)}
_POSITIVE = {"TRN_ZERO": "TRN", "RND_INF": "RND", "RND_ZERO": "RND_MIN_INF"}
MAX_SHIFT = 60


def effective_rounding(target: Fixed) -> str:
    """The rounding mode without its sign rule where saturation to an unsigned format makes that rule idle."""
    if not target.signed and target.overflow in ("SAT", "SAT_SYM"):
        return _POSITIVE.get(target.rounding, target.rounding)
    return target.rounding


@dataclass(frozen=True)
class Folded:
    """What to multiply and add before the rounding operator, by output channel.

    Attributes:
        scale: float64 [channels or 1], powers of two.
        constant: float64 [channels or 1], 0 or +-1/2.
        operator: ONNX rounding operator.
        target: Format of the result, or None where the sum is the result.
        low: Smallest rounded value before overflow.
        high: Largest rounded value before overflow.
    """

    scale: np.ndarray
    constant: np.ndarray
    operator: str
    target: Fixed | None
    low: int
    high: int

    @property
    def monotone(self) -> bool:
        """Whether rounding and overflow keep order, so that a maximum may be taken before them."""
        if self.target is None or self.target.overflow in ("SAT", "SAT_SYM"):
            return True
        return self.target.holds(self.low, self.high)

    def carried(self, body: FusedBody, call: Call, value: Coded) -> Carried:
        """The output of `call` from its unrounded sum; rounded when someone needs it."""
        if not self.monotone:
            return Carried(body, call.y[0], coded=lambda: self.wrap(body, value))
        if self.target is not None:
            value = body.overflow(value, self.target, self.low, self.high, len(call.exact[0].shape))
        return Carried(body, call.y[0], unrounded=Unrounded(value, lambda clipped: self.round(body, clipped)))

    def wrap(self, body: Body, value: Coded) -> Coded:
        """Rounding, then an overflow mode that does not keep order."""
        assert self.target is not None
        return body.overflow(body.unary(self.operator, value), self.target, self.low, self.high)

    def round(self, body: Body, value: Coded) -> Coded:
        """Rounds a saturated sum; the operator also keeps onnxruntime from fusing across the end of a proof."""
        bottom = self.low if self.target is None else max(self.low, self.target.rails[0])
        if self.operator == "Floor" and bottom >= 0:
            return body.cast(body.cast(value, np.int32), SINGLE)
        return body.unary(self.operator, value)


def fold(call: Call, magnitude: int) -> Folded | None:
    """How the epilogue of `call` folds into a float32 sum, or None where the proof fails.

    Args:
        call: The operator; without an epilogue its sum is the result.
        magnitude: Largest absolute partial sum, in codes of the accumulator.
    """
    result = call.exact[0]
    if call.epilogue is None:
        if magnitude >= SINGLE_LIMIT:
            return None
        return Folded(np.ones(1), np.zeros(1), "Floor", None, result.lo, result.hi)
    target, shift = call.epilogue.format, call.epilogue.shift
    rounding = effective_rounding(target)
    rounds = max(shift) > 0
    if rounding not in _OPERATORS and rounds:
        return None
    half = (1 << (max(shift) - 1)) if rounds else 0
    if max(map(abs, shift)) > MAX_SHIFT or magnitude + half >= SINGLE_LIMIT:
        return None
    low, high = rounded_interval(result.lo, result.hi, shift, rounding)
    if max(-low, high) >= SINGLE_LIMIT or target.width > 24:
        return None
    operator, constant = _OPERATORS[rounding] if rounds else ("Floor", 0.0)
    shifts = np.asarray(shift, dtype=np.float64)
    return Folded(np.exp2(-shifts), np.where(shifts > 0, constant, 0.0), operator, target, low, high)


def rounded_interval(lo: int, hi: int, shift: tuple[int, ...], rounding: str) -> tuple[int, int]:
    """Interval of the rounded codes before overflow, over all shifts; `rounding` is the mode that is applied."""
    ends = np.array([lo, hi], dtype=object)
    rounded = [formats.round_shift(ends, s, rounding) for s in set(shift)]
    return min(int(r[0]) for r in rounded), max(int(r[1]) for r in rounded)
