"""The attribute ``khot`` of the operators with weights, scales or slopes: no multiplication is needed.

``khot=K`` states that every constant code is a sum of at most K signed powers of two, counted in canonical signed
digits (`edgemat.signed_digits`). The reader counts them. Each product is then K shifts and additions at most, which is
how native code computes it; the integers are the same.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgemat.op import Attr, Call, Cost
from edgemat.signed_digits import KHOT, digit_count, project

KHOT_ATTRIBUTE = {"khot": Attr(int, None, optional=True, late=True)}


def check_digits(call: Call, codes: np.ndarray) -> None:
    """Refuses codes of more digits than the node states.

    Args:
        call: A node whose dossier has the attribute.
        codes: int64 codes of its weights, scales or slopes.

    Raises:
        LoweringError: names the number of digits found.
    """
    khot = call.attrs.get("khot")
    if khot is None:
        return
    if khot not in KHOT:
        raise call.refuse(f"khot is {khot}", f"expected one of {', '.join(map(str, KHOT))}")
    counts = digit_count(codes)
    if int(counts.max()) > khot:
        worst = int(codes.reshape(-1)[int(counts.reshape(-1).argmax())])
        raise call.refuse(
            f"the code {worst} is a sum of {int(counts.max())} signed powers of two, but khot is {khot}",
            f"train its weights with khot={khot} (edgemat.Recipe), or leave the attribute out",
        )


def digit_params(call: Call) -> dict[str, int | tuple[int, ...]]:
    """The parameter by which native targets choose shift-add kernels; none where the node states nothing."""
    return {} if call.attrs.get("khot") is None else {"khot": call.attrs["khot"]}


def without_multiplies(call: Call, cost: Cost, codes: np.ndarray, uses: int, summed: bool = True) -> Cost:
    """`cost` of a node with `codes`, its multiplications replaced by shifts and additions where ``khot`` is stated.

    Args:
        call: The node.
        cost: What it costs with multiplications.
        codes: int64 codes of its constants.
        uses: How often each constant meets an input in one sample.
        summed: Whether products are added to a sum; else the first digit of each product needs no addition.
    """
    if call.attrs.get("khot") is None:
        return cost
    counts = digit_count(codes)
    terms = uses * int(counts.sum())
    additions = terms if summed else uses * int(np.maximum(counts - 1, 0).sum())
    return replace(cost, multiplies=0, additions=additions, shift_adds=terms)


def khot_cases(cases: list[Call], key: str = "w_format") -> list[Call]:
    """Every fourth case with its constants brought to at most 1, 2 or 3 digits, and saying so.

    Args:
        cases: Cases of a dossier with this attribute; those of channels with widths of their own, of bipolar codes and
            of a stated accumulator are left out.
        key: Attribute with the format of the constants.
    """
    made = []
    for index, call in enumerate(cases):
        fmt, khot = call.format_attr(key), 1 + index // 4 % 3
        if fmt.widths is not None or fmt.bipolar or call.attrs.get("accumulator") or index % 4:
            continue
        codes = project(call.constants[1].astype(np.float64), *fmt.rails, khot)
        x = list(call.x)
        x[1] = replace(x[1], lo=int(codes.min()), hi=int(codes.max()))
        attrs = {**call.attrs, "khot": khot}
        made.append(Call(call.op, f"{khot}hot_{call.name}", x, attrs, {**call.constants, 1: codes}))
    return made
