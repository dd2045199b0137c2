"""FINN's MultiThreshold: how many thresholds a number has reached, scaled and shifted."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgemat.foreign.handlers.elementwise import channels_first
from edgemat.foreign.handlers.qonnx import DOMAINS
from edgemat.foreign.quantisers import LAYOUTS, Quantiser
from edgemat.foreign.signals import Joined, Raw, Signal
from edgemat.foreign.translator import Handler, Translator

_CHANNEL_AXES = {"NC": 1, "NCW": 1, "NCHW": 1, "NWC": 2, "NHWC": 3}


@dataclass(frozen=True)
class Staircase(Quantiser):
    """``code = low + count(x >= thresholds)``; of a bipolar one, -1 below the only threshold and +1 from there on.

    Attributes:
        thresholds: float32 [C or 1, K], rising in each row.
    """

    thresholds: np.ndarray = field(default_factory=lambda: np.zeros((1, 0), np.float32))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """int64 codes of float32 values: [C, K] where thresholds differ by channel, else of any shape."""
        values = np.asarray(values, np.float32)
        if len(self.thresholds) == 1:
            count = np.searchsorted(self.thresholds[0], values, side="right")
        else:
            rows = zip(self.thresholds, values, strict=True)
            count = np.stack([np.searchsorted(row, given, side="right") for row, given in rows])
        return self.low + count.astype(np.int64) * (2 if self.bipolar else 1)


def multi_threshold(tr: Translator, node: ir.Node) -> None:
    """MultiThreshold: x, thresholds [C or 1, K]; attributes out_scale, out_bias, data_layout."""
    quantity, thresholds = tr.quantity(node, 0), np.asarray(tr.known(node, 1).array, np.float32)
    if not isinstance(quantity, (Signal, Joined)):
        found = "a float input without a quantiser" if isinstance(quantity, Raw) else "a constant"
        raise tr.refuse(node, f"thresholds behind {found}", "expected the codes of another quantiser")
    if thresholds.ndim != 2 or thresholds.shape[1] < 1 or np.isnan(thresholds).any():
        raise tr.refuse(node, f"thresholds of shape {thresholds.shape}, or NaN", "expected numbers [C or 1, K]")
    if len(thresholds) > 1:
        quantity = _by_row(tr, node, quantity, len(thresholds))
    made = tr.quantised(node, quantity, _staircase(tr, node, np.sort(thresholds, axis=1)))
    tr.set(node, made)


def _staircase(tr: Translator, node: ir.Node, thresholds: np.ndarray) -> Staircase:
    scale, bias = tr.real(node, "out_scale", 1.0), tr.real(node, "out_bias", 0.0)
    levels = thresholds.shape[1]
    if not (np.isfinite(scale) and np.isfinite(bias) and scale > 0):
        raise tr.refuse(node, f"out_scale {scale}, out_bias {bias}", "expected a positive scale")
    # AWAY: no Requantize does what thresholds do.
    if levels == 1 and bias == -scale / 2:
        unit = np.full(_spread(thresholds), scale / 2, np.float32)
        return Staircase(unit, 0, -1, 1, "AWAY", "onnx", True, thresholds)
    low = bias / scale
    if low != int(low):
        raise tr.refuse(node, f"out_bias {bias}, which is no multiple of out_scale {scale}", "use a multiple")
    unit = np.full(_spread(thresholds), scale, np.float32)
    return Staircase(unit, 0, int(low), int(low) + levels, "AWAY", "onnx", False, thresholds)


def _spread(thresholds: np.ndarray) -> tuple[int, ...]:
    return () if len(thresholds) == 1 else (len(thresholds),)


def _by_row(tr: Translator, node: ir.Node, quantity: Signal | Joined, channels: int) -> Signal | Joined:
    """The data with its channels on axis 1 of what is built."""
    shape = tr.shape(quantity) if isinstance(quantity, Signal) else ()
    layout = tr.text(node, "data_layout") or LAYOUTS.get(len(shape), "")
    axis = _CHANNEL_AXES.get(layout)
    if axis is None or axis >= len(shape) or shape[axis] != channels:
        raise tr.refuse(node, f"{channels} rows of thresholds for data {shape} in {layout!r}", "expected one a channel")
    return channels_first(tr, node, quantity, {axis}) if isinstance(quantity, Signal) else quantity


HANDLERS: dict[tuple[str, str], Handler] = {
    (domain, "MultiThreshold"): multi_threshold for domain in (*DOMAINS, "finn.custom_op.fpgadataflow")
}
