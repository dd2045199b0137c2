"""The attribute ``accumulator`` of Linear and Conv: a width that every partial sum, in any order, is proved to fit.

``fixed<P,I,TRN,WRAP>`` states P signed bits on the grid of the sum. Nothing is taken on trust: the interval of all
partial sums follows from the codes and the input's range, bias included, and must lie within
``-2**(P-1) .. 2**(P-1) - 1``. Native code then accumulates in exactly so many bits. No other modes may be stated:
with an accumulator that saturates or drops low bits the result would depend on the order of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgemat.formats import uniform
from edgemat.op import Attr, Bounds, Call

ACCUMULATOR = {"accumulator": Attr(str, "", optional=True, late=True)}


def needed_bits(bounds: Bounds) -> int:
    """Bits of the narrowest two's complement accumulator that holds every partial sum in any order."""
    low, high = bounds.partial
    return max(max(high, 0).bit_length(), (-min(low, 0) - 1).bit_length() if low < 0 else 0) + 1


def prove(call: Call, bounds: Bounds, fracs: Sequence[int]) -> Bounds:
    """`bounds` with the width that the node states, which must hold them; unchanged where it states none.

    Args:
        call: A node whose dossier has the attribute.
        bounds: Intervals of its sums.
        fracs: Fractional bits of the sum, one entry or one per output channel.

    Raises:
        LoweringError: if the format is not signed, saturates or rounds, lies on another grid, or cannot hold a partial
            sum.
    """
    if not call.attrs.get("accumulator"):
        return bounds
    fmt = call.format_attr("accumulator")
    if not fmt.signed or fmt.bipolar or fmt.widths is not None:
        raise call.refuse(
            f"its accumulator is {fmt}", "expected a signed format of one stated width, 'fixed<P,I,TRN,WRAP>'"
        )
    if (fmt.rounding, fmt.overflow) != ("TRN", "WRAP"):
        raise call.refuse(
            f"its accumulator is {fmt}, which rounds or saturates: the result would depend on the order of the sum",
            f"expected '{replace(fmt, rounding='TRN', overflow='WRAP')}', whose width holds every partial sum",
        )
    grid = uniform(tuple(int(f) for f in fracs))
    if uniform(fmt.fracs) != grid:
        raise call.refuse(
            f"its accumulator {fmt} has {list(uniform(fmt.fracs))} fractional bits, expected the sum's {list(grid)}",
            "put the accumulator on the grid frac_x + frac_w; behind an input of rank 3 and more that takes weights "
            "with one binary point (weight_groups='tensor')",
        )
    needed = needed_bits(bounds)
    if needed > fmt.width:
        raise call.refuse(
            f"its partial sums span {bounds.partial[0]} to {bounds.partial[1]} and need an accumulator of {needed} "
            f"bits, but the file states {fmt.width}",
            f"train with accumulator={fmt.width} (edgemat.Recipe) so that the weights keep the bound, or state "
            f"{needed} bits",
        )
    return replace(bounds, width=fmt.width)
