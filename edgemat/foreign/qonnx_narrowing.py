"""Rounding and overflow of edgemat in the terms of QONNX's Quant, exactly.

Quant saturates at the rails and then rounds; rails are integers, so the order does not matter. Its rounding modes are
what the code of the ``qonnx`` package does: ROUND is half to even, HALF_UP half *away from zero*, HALF_DOWN half toward
zero, DOWN toward zero. None is half toward +inf, and readers disagree: hls4ml knows ROUND and FLOOR alone, FINN takes
every Quant for thresholds at the halves.

So no tie is left to a Quant where that can be helped. A sum S lies on the grid of its own LSB u. Half of u added to it
moves every tie above the threshold and no other value across it:

    RND          ROUND(S + u/2)
    RND_MIN_INF  ROUND(S - u/2)
    TRN          ROUND(S - v/2 + u/2),  v the LSB of the result
    RND_CONV     ROUND(S)
    RND_INF      HALF_UP(S), as RND where no S below 0 matters
    RND_ZERO     HALF_DOWN(S), as RND_MIN_INF there
    TRN_ZERO     DOWN(S), as TRN there

The addend goes into a bias where there is one. Where float32 has no bit left for u/2, the same is FLOOR(S + v/2),
CEIL(S - v/2) and FLOOR(S).

An input is any float32 number, on no grid. It is brought to the grid v/2 first, by the mode that keeps its threshold:

    RND          ROUND(FLOOR(x) + v/4)       RND_INF   HALF_UP(DOWN(x))
    RND_MIN_INF  ROUND(CEIL(x) - v/4)        RND_ZERO  HALF_DOWN(UP(x))
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgemat import formats
from edgemat.errors import UnsupportedOpError
from edgemat.foreign.qonnx_graph import EXACT, QonnxGraph
from edgemat.formats import Fixed
from edgemat.op import Call, Epilogue
from edgemat.tensor import Shape

NAMES = {"RND_CONV": "ROUND", "RND_INF": "HALF_UP", "RND_ZERO": "HALF_DOWN", "TRN_ZERO": "DOWN", "TRN": "FLOOR"}
"""The mode of QONNX that does what a mode of edgemat does, at every value."""
RECTIFIED = {"RND_INF": "RND", "RND_ZERO": "RND_MIN_INF", "TRN_ZERO": "TRN"}
"""Modes that agree where values below 0 become 0."""
_FIRST = {"RND": ("FLOOR", 1), "RND_MIN_INF": ("CEIL", -1), "RND_INF": ("DOWN", 0), "RND_ZERO": ("UP", 0)}
"""How an input comes to the grid of half LSBs, and the quarters that are added then."""


@dataclass(frozen=True)
class Plan:
    """How a Quant rounds the sums of a node.

    Attributes:
        mode: Rounding mode of the Quant.
        offsets: float64 reals to add to the sum before, one or one per channel.
    """

    mode: str
    offsets: np.ndarray


def refusal(call: Call, found: str, remedy: str) -> UnsupportedOpError:
    """A refusal that names the node."""
    return UnsupportedOpError(f"node {call.name!r} ({call.op.name}): {found}; {remedy}")


def lay(values: np.ndarray, rank: int) -> np.ndarray:
    """One value as a scalar, values of channels as [1, C, 1, ...]."""
    values = np.asarray(values)
    return values.reshape(()) if values.size == 1 else values.reshape((1, -1) + (1,) * (rank - 2))


def scales(fmt: Fixed) -> np.ndarray:
    """float64 LSBs of a format, one or one per channel; a channel that is always 0 gets that of the finest."""
    widths = fmt.widths or (1,) * len(fmt.fracs)
    return np.ldexp(1.0, [-(frac if width else fmt.finest) for frac, width in zip(fmt.fracs, widths, strict=True)])


def rounded_interval(lo: int, hi: int, shifts: tuple[int, ...], rounding: str) -> tuple[int, int]:
    """Smallest and largest code that rounding alone makes of the codes lo..hi."""
    ends = [formats.round_shift(np.array([lo, hi], dtype=object), shift, rounding) for shift in set(shifts)]
    return min(int(end[0]) for end in ends), max(int(end[1]) for end in ends)


def check_overflow(call: Call, target: Fixed, low: int, high: int) -> None:
    """Refuses an overflow mode that a Quant has not, unless codes low..high are within the format.

    Raises:
        UnsupportedOpError: for WRAP and SAT_ZERO that can act.
    """
    if target.overflow in ("WRAP", "SAT_ZERO") and not target.holds(low, high):
        raise refusal(
            call,
            f"rounded codes {low} to {high} can leave {target}, and QONNX's Quant only saturates",
            f"widen the format until it holds them, or train with SAT instead of {target.overflow}",
        )


def plan(call: Call, epilogue: Epilogue, lo: int, hi: int, magnitude: int) -> Plan:
    """How codes lo..hi of a sum, whose partial sums stay within `magnitude`, become codes of the epilogue's format.

    Raises:
        UnsupportedOpError: if float32 cannot hold what is added, or the overflow mode has no counterpart.
    """
    target, shifts = epilogue.format, epilogue.shift
    if target.bipolar:
        return Plan("ROUND", np.zeros(1))
    check_overflow(call, target, *rounded_interval(lo, hi, shifts, target.rounding))
    rounding = RECTIFIED.get(target.rounding, target.rounding) if lo >= 0 or not target.signed else target.rounding
    if max(shifts) <= 0:
        return Plan("ROUND", np.zeros(1))
    if rounding in RECTIFIED or rounding == "RND_CONV":
        if rounding in ("RND_INF", "RND_ZERO"):  # their code adds half an LSB
            _check_room(call, magnitude + (1 << (max(shifts) - 1)))
        return Plan(NAMES[rounding], np.zeros(1))
    count = max(len(shifts), len(target.fracs))
    spread = [shifts[i % len(shifts)] for i in range(count)]
    halves = [_halves(rounding, shift) for shift in spread]
    mode = "ROUND"
    if 2 * magnitude + max(abs(h) for h in halves) >= EXACT:
        mode = "CEIL" if rounding == "RND_MIN_INF" else "FLOOR"
        sign = {"RND": 1, "RND_MIN_INF": -1, "TRN": 0}[rounding]
        halves = [sign << shift if shift > 0 else 0 for shift in spread]
        _check_room(call, magnitude + max(abs(h) for h in halves) // 2)
    fracs, widths = target.fracs, target.widths or (1,)
    live = [widths[i % len(widths)] > 0 and _alive(call, i) for i in range(count)]
    exponents = [-(fracs[i % len(fracs)] + spread[i]) - 1 for i in range(count)]
    offsets = [float(np.ldexp(float(h), e)) if on else 0.0 for h, e, on in zip(halves, exponents, live, strict=True)]
    return Plan(mode, np.array(offsets[:1] if len(set(offsets)) == 1 else offsets))


def _halves(rounding: str, shift: int) -> int:
    """What is added before ROUND, in halves of the sum's LSB."""
    if shift <= 0:
        return 0
    return {"RND": 1, "RND_MIN_INF": -1, "TRN": 1 - (1 << shift)}[rounding]


def _alive(call: Call, channel: int) -> bool:
    """Whether a channel of the sum can hold anything but 0."""
    widths = call.exact[0].format.widths
    return widths is None or widths[channel % len(widths)] > 0


def _check_room(call: Call, reach: int) -> None:
    if reach >= EXACT:
        raise refusal(
            call,
            f"its sums reach {reach} LSBs with what rounding adds, and float32 holds integers below {EXACT}",
            "narrow the input, the weights or the bias, or export to hls or mcu, which have no such bound",
        )


def quantise(graph: QonnxGraph, x: str, shape: Shape, lo: int, target: Fixed, mode: str, name: str) -> str:
    """Saturates and rounds a tensor.

    Args:
        graph: Where the nodes go.
        x: The tensor, with the plan's offsets.
        shape: Its dimensions.
        lo: Smallest code before; an unsigned format of what can be negative is a Relu first, as readers expect.
        target: Format of the result.
        mode: Rounding mode of the Quant.
        name: Name of the node that narrows.
    """
    if target.bipolar:
        return graph.bipolar_quant(x, shape, f"{name}_quant")
    if lo < 0 and not target.signed:
        x = graph.node("Relu", [x], shape, f"{name}_relu")
    bits = target.width
    lsb = lay(scales(target), len(shape))
    if target.widths is not None or (target.signed and bits == 1):  # rails that a Quant of one width has not
        bits = max(bits, 2)
        low, high = (lay(rail, len(shape)) * lsb for rail in target.channel_rails())
        for op_type, rail in (("Max", low), ("Min", high)):
            x = graph.node(op_type, [x, graph.constant(rail, f"{name}_{op_type}")], shape, f"{name}_{op_type}")
    narrow = target.signed and target.overflow == "SAT_SYM"
    return graph.quant(x, shape, lsb, bits, target.signed, narrow, mode, f"{name}_quant")


def quantise_input(graph: QonnxGraph, x: str, call: Call) -> str:
    """Rounds any float32 numbers to codes, by two Quants where one rounds otherwise."""
    fmt, shape, name = call.exact[0].format, call.exact[0].shape, call.name
    if call.attrs.get("scale"):
        return _quantise_scaled(graph, x, call)
    if call.attrs["limit"] is not None:
        raise refusal(call, f"its codes are indices up to {call.attrs['limit']}", "QONNX has no embedding to read them")
    if fmt.bipolar:
        return graph.bipolar_quant(x, shape, f"{name}_quant")
    if fmt.overflow in ("WRAP", "SAT_ZERO"):
        raise refusal(
            call,
            f"an input is quantised to {fmt}, and QONNX's Quant only saturates",
            f"train with SAT instead of {fmt.overflow}",
        )
    rounding = fmt.rounding if fmt.signed else RECTIFIED.get(fmt.rounding, fmt.rounding)
    if rounding not in _FIRST:
        return quantise(graph, x, shape, 0, fmt, NAMES[rounding], name)
    if call.exact[0].hi << 2 >= EXACT:
        raise refusal(
            call,
            f"{fmt} rounds inputs by {rounding}, which takes two bits more than float32 has left",
            "train the input with RND_CONV, or with at most 22 bits",
        )
    first, quarters = _FIRST[rounding]
    lsb = lay(scales(fmt), len(shape))
    x = graph.quant(x, shape, lsb / 2, max(fmt.width, 2) + 1, fmt.signed, False, first, f"{name}_halves")
    mode = NAMES.get(rounding, "ROUND")
    if quarters:
        addend = graph.constant(quarters * lsb / 4, f"{name}_offset")
        x = graph.node("Add", [x, addend], shape, f"{name}_offset")
    return quantise(graph, x, shape, 0, fmt, mode, name)


def _quantise_scaled(graph: QonnxGraph, x: str, call: Call) -> str:
    """``clip(round_half_even(x / scale), low, high)``, whose codes are the values of the graph."""
    result, name = call.exact[0], call.name
    scale = graph.initializer(np.array(float.fromhex(call.attrs["scale"]), np.float32), f"{name}_scale")
    x = graph.node("Div", [x, scale], result.shape, f"{name}_div")
    if (result.lo, result.hi) != (result.format.min_code, result.format.max_code):
        for op_type, rail in (("Max", result.lo), ("Min", result.hi)):
            constant = graph.constant(np.array(float(rail)), f"{name}_{op_type}")
            x = graph.node(op_type, [x, constant], result.shape, f"{name}_{op_type}")
    return quantise(graph, x, result.shape, 0, result.format, "ROUND", name)
