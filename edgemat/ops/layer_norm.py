"""LayerNorm: (x - mean) / sqrt(var + eps), times a gain, plus a bias, along the last axis (arXiv 1607.06450).

With n codes x_i, and `eps` a code on the grid of their squares (``eps * 2**(-2 * frac_x)``)::

    M   = sum(x_i)                          exact
    d_i = n * x_i - M                       exact: n times the deviation from the mean
    V   = n * sum(x_i**2) - M**2            exact: n**2 times the variance (of n, not n - 1)
    T   = V + n**2 * eps                    exact
    z_i = Requantize(d_i * sqrt(1 / T))     `edgemat.ops.row_norm`, into `norm_format`
    y_i = z_i * gain_i + bias_i             exact

No mean is ever rounded.
"""

from __future__ import annotations

import numpy as np

from edgemat.body import Body, Coded
from edgemat.op import Call, Cost, carrier_for
from edgemat.ops.row_norm import RowNorm


class LayerNorm(RowNorm):
    """Inputs x [N, ..., n], gain [n] and bias [n] (both optional); every row brought to mean 0 and variance 1."""

    name = "LayerNorm"
    stem = "layer_norm"
    arity = (1, 3)

    def count(self, call: Call) -> int:
        return 1

    def offset(self, call: Call) -> int:
        return self.features(call) ** 2 * int(call.attrs["eps"])

    def numerator_interval(self, call: Call) -> tuple[int, int]:
        reach = (self.features(call) - 1) * (call.x[0].hi - call.x[0].lo)
        return -reach, reach

    def largest_total(self, call: Call) -> int:
        return (self.features(call) * call.x[0].magnitude) ** 2 + self.offset(call)

    def totals(self, call: Call, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n, total = self.features(call), x.sum(axis=-1, keepdims=True)
        return n * x - total, n * (x * x).sum(axis=-1, keepdims=True) - total * total

    def emit_totals(self, body: Body, call: Call, x: Coded) -> tuple[Coded, Coded]:
        n = self.features(call)
        value = body.cast(x, carrier_for(self.largest_total(call)))
        axes = body.const([len(call.x[0].shape) - 1], np.int64)
        total = Coded(body.op("ReduceSum", value.value, axes, keepdims=1), value.dtype)
        squares = body.binary("Mul", value, value)
        squares = Coded(body.op("ReduceSum", squares.value, axes, keepdims=1), value.dtype)
        spread = body.binary("Sub", body.scale(squares, n), body.binary("Mul", total, total))
        return body.binary("Sub", body.scale(value, n), total), spread

    def cost(self, call: Call) -> Cost:
        cost = super().cost(call)
        size = call.x[0].size
        return Cost(cost.multiplies + size, cost.additions + 2 * size, cost.weight_bits)
