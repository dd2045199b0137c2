"""QONNX's FloatQuant: taken for constants, and for data where its numbers lie on one grid.

``x / scale`` is rounded to m mantissa bits beside its own leading bit, but no finer than ``2**(1 - bias - m)``, and
clipped to the largest number. Constants are rounded here, once. Data is a fixed-point number where the largest number
is at most ``2**(2 - bias)``: everything then lies on the finest grid.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgemat.foreign.handlers.qonnx import DOMAINS, channel_axis
from edgemat.foreign.quantisers import ROUNDING_NAMES, Quantiser
from edgemat.foreign.signals import Joined, Known, Raw, Signal
from edgemat.foreign.translator import Handler, Translator


def float_quant(tr: Translator, node: ir.Node) -> None:
    """FloatQuant: x, scale, exponent width, mantissa width, exponent bias, largest number.

    Raises:
        LoweringError: for data whose grid depends on its exponent, and for numbers that overflow to infinity.
    """
    scale = np.asarray(tr.known(node, 1).array, np.float32)
    numbers = [tr.optional(node, index) for index in range(2, 6)]
    if any(value is None or value.size != 1 for value in numbers[:2]) or not (scale > 0).all():
        raise tr.refuse(node, "widths by channel, or a scale that is not positive", "expected one number each")
    exponent, mantissa, bias, largest = (None if v is None else float(np.asarray(v).reshape(-1)[0]) for v in numbers)
    assert exponent is not None and mantissa is not None
    if not 0 <= exponent <= 8 or not 0 <= mantissa <= 23 or exponent != int(exponent) or mantissa != int(mantissa):
        raise tr.refuse(node, f"{exponent} exponent and {mantissa} mantissa bits", "expected integers up to 8 and 23")
    bias = 2.0 ** (exponent - 1) - 1 if bias is None else bias
    reach = (2 - 2.0**-mantissa) * 2.0 ** (2**exponent - 1 - bias)
    top = reach if largest is None else min(reach, largest)
    name = tr.text(node, "rounding_mode", "ROUND").upper()
    if name not in ROUNDING_NAMES or not tr.integer(node, "saturation", 1) or bias != int(bias):
        raise tr.refuse(node, f"{name[:20]}, bias {bias}, or no saturation", "round, and saturate")
    rounding, lowest = ROUNDING_NAMES[name], 1.0 - bias - mantissa
    quantity = tr.quantity(node, 0)
    if isinstance(quantity, Known):
        made = rounded(np.asarray(quantity.array, np.float32) / scale, mantissa, lowest, top, rounding)
        tr.set(node, Known((made * scale).astype(np.float32)))
        return
    step = 2.0**lowest
    code = top / step
    if not isinstance(quantity, (Raw, Signal, Joined)):
        raise tr.refuse(node, "its input is nothing that can be quantised", "expected data or a constant")
    if top > 2.0 ** (lowest + mantissa + 1) or code != int(code) or code >= 1 << 31:
        raise tr.refuse(
            node,
            f"data in a floating-point format of {int(exponent)} exponent and {int(mantissa)} mantissa bits",
            "quantise data to fixed point; constants may be minifloats",
        )
    channel_axis(tr, node, quantity, scale)
    flat = scale.reshape(()) if scale.size == 1 else scale.reshape(-1)
    quantiser = Quantiser(np.asarray(flat * np.float32(step)), 0, -int(code), int(code), rounding, "onnx")
    tr.set(node, tr.quantised(node, quantity, quantiser))


def rounded(x: np.ndarray, mantissa: float, lowest: float, top: float, rounding: str) -> np.ndarray:
    """float32 numbers rounded to their own grids, saturated."""
    tiny = np.finfo(np.float32).tiny
    place = np.maximum(np.floor(np.log2(np.abs(x) + tiny)) - np.float32(mantissa), np.float32(lowest))
    grid = np.exp2(place).astype(np.float32)
    codes = Quantiser(np.ones((), np.float32), 0, -(1 << 30), 1 << 30, rounding).round((x / grid).astype(np.float32))
    return np.clip(grid * codes, -top, top).astype(np.float32)


HANDLERS: dict[tuple[str, str], Handler] = {(domain, "FloatQuant"): float_quant for domain in DOMAINS}
