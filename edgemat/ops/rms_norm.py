"""RmsNorm: x / sqrt(mean(x**2) + eps), times a gain, along the last axis (Zhang and Sennrich, arXiv 1910.07467).

With n codes x_i, and `eps` a code on the grid of their squares (``eps * 2**(-2 * frac_x)``)::

    S   = sum(x_i**2)                       exact
    T   = S + n * eps                       exact: n times the mean square plus eps
    z_i = Requantize(x_i * sqrt(n / T))     `edgemat.ops.row_norm`, into `norm_format`
    y_i = z_i * gain_i                      exact
"""

from __future__ import annotations

import numpy as np

from edgemat.body import Body, Coded
from edgemat.op import Call, carrier_for
from edgemat.ops.row_norm import RowNorm


class RmsNorm(RowNorm):
    """Inputs x [N, ..., n] and gain [n] (optional); every row divided by its root mean square."""

    name = "RmsNorm"
    stem = "rms_norm"
    arity = (1, 2)

    def count(self, call: Call) -> int:
        return self.features(call)

    def offset(self, call: Call) -> int:
        return self.features(call) * int(call.attrs["eps"])

    def numerator_interval(self, call: Call) -> tuple[int, int]:
        return call.x[0].lo, call.x[0].hi

    def largest_total(self, call: Call) -> int:
        return self.features(call) * call.x[0].magnitude ** 2 + self.offset(call)

    def totals(self, call: Call, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return x, (x * x).sum(axis=-1, keepdims=True)

    def emit_totals(self, body: Body, call: Call, x: Coded) -> tuple[Coded, Coded]:
        value = body.cast(x, carrier_for(self.largest_total(call)))
        axes = body.const([len(call.x[0].shape) - 1], np.int64)
        squares = body.binary("Mul", value, value)
        return value, Coded(body.op("ReduceSum", squares.value, axes, keepdims=1), value.dtype)
