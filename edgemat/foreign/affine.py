"""Affine chains ``y = m * x + k`` by channel: what stands between the last sums and a float output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgemat.foreign.signals import Signal
from edgemat.formats import Fixed

if TYPE_CHECKING:
    from edgemat.foreign.translator import Translator

MULTIPLIER_BITS = 24


@dataclass(frozen=True)
class AffineChain:
    """``real = m[c] * code + k[c]`` of a signal, float64 [C]."""

    signal: Signal
    m: np.ndarray
    k: np.ndarray

    def written(self, tr: Translator, name: str, bits: int) -> tuple[Signal, float]:
        """An Affine and a Requantize to a format of so many bits; and how far a real output may be off."""
        tensor = tr.type(self.signal)
        channels = int(tensor.shape[1] or 1)
        m, k = (np.broadcast_to(v, (channels,)) for v in (self.m, self.k))
        ends = np.stack([m * tensor.lo + k, m * tensor.hi + k])
        reach = max(float(np.abs(ends).max()), 2.0**-60)
        int_bits = math.frexp(reach)[1] + 1
        target = Fixed(bits, int_bits)
        largest = max(float(np.abs(m).max()), 2.0**-60)
        frac = MULTIPLIER_BITS - 1 - math.frexp(largest)[1]
        a = np.rint(np.ldexp(m, frac)).astype(np.int64)
        fracs = np.broadcast_to(np.asarray(tensor.format.fracs), (channels,))
        a_frac = tuple(int(f) for f in frac - fracs)
        w_format = Fixed(MULTIPLIER_BITS + 1, MULTIPLIER_BITS + 1).with_frac(
            a_frac[0] if len(set(a_frac)) == 1 else a_frac
        )
        room = int(max(0.0, math.ceil(math.log2(max(float(np.abs(k).max()), 2.0**-60))) + frac + 1 - 31))
        b = np.rint(np.ldexp(k, frac - room)).astype(np.int64)
        bench = tr.bench
        inputs = [self.signal.value, bench.codes(a, w_format, f"{name}_multiplier")]
        if room:
            inputs.append(bench.codes(b * 0, Fixed(32, 32), f"{name}_none"))
        else:
            inputs.append(bench.codes(b, Fixed(32, 32), f"{name}_offset"))
        attrs = {"w_format": str(w_format), "b_format": str(Fixed(32, 32).with_frac(frac))}
        value = bench.add("Affine", inputs, attrs, f"{name}_scale")
        if room:
            shape = (channels,) + (1,) * (len(tensor.shape) - 2)
            offset = bench.literal(b.reshape(shape), Fixed(33, 33).with_frac(frac - room), f"{name}_offset")
            value = bench.add("Add", [value, offset], {}, f"{name}_sum")
        value = bench.requantised(value, target, f"{name}_rounded")
        codes = max(abs(tensor.lo), abs(tensor.hi))
        error = 2.0 ** -(target.fracs[0] + 1) + codes * 2.0 ** -(frac + 1) + 2.0 ** -(frac - room + 1)
        return Signal(value, np.ones((), np.float32), perm=self.signal.perm), error


def affine_of(tr: Translator, signal: Signal) -> AffineChain | None:
    """The signal's chain as an affine function of its codes, or None where it is none."""
    tensor = tr.type(signal)
    if len(tensor.shape) < 2:
        return None
    m = np.ldexp(signal.factor.astype(np.float64).reshape(-1), -np.asarray(tensor.format.fracs, np.int64))
    k = np.zeros(1)
    for step in signal.chain.steps:
        c = step.constant(1 - step.position) if step.op_type in ("Mul", "Div", "Add", "Sub") else None
        if step.op_type == "Identity":
            continue
        if c is not None and step.op_type == "Mul":
            m, k = m * c, k * c
        elif c is not None and step.op_type == "Div" and step.position == 0 and (c != 0).all():
            m, k = m / c, k / c
        elif c is not None and step.op_type == "Add":
            k = k + c
        elif c is not None and step.op_type == "Sub":
            m, k = (m, k - c) if step.position == 0 else (-m, c - k)
        elif step.op_type == "BatchNormalization":
            gain, bias, mean, var = (step.constant(i) for i in range(1, 5))
            g = gain / np.sqrt(var + float(step.attributes.get("epsilon", 1e-5)))
            m, k = m * g, (k - mean) * g + bias
        else:
            return None
    return (
        AffineChain(signal, np.atleast_1d(m), np.atleast_1d(k))
        if np.isfinite(m).all() and np.isfinite(k).all()
        else None
    )
