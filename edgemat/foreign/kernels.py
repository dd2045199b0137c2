"""What onnxruntime's 8-bit kernels compute, where it is not what the operator and its quantisers compute one by one."""

from __future__ import annotations

import numpy as np

from edgemat.foreign.quantisers import Quantiser
from edgemat.foreign.signals import Signal
from edgemat.op import Tensor


def qlinear_add(a: tuple[Tensor, Signal], b: tuple[Tensor, Signal], quantiser: Quantiser) -> np.ndarray:
    """QLinearAdd on every pair of codes: int64 codes [A, B].

    With ratios ``r_a = s_a / s_y`` and ``r_b = s_b / s_y``, in float32 and with fused multiply-adds (as its kernels for
    AVX2 are compiled), on the stored integers::

        fixed = z_y - fma(r_a, z_a, r_b * z_b)
        y = round(fma(q_a, r_a, fma(q_b, r_b, fixed)))        halves to even, then saturated

    Found by trying the orders: of 7.8 million pairs of codes under 120 sets of scales, none differs.
    """
    stored, ratios = [], []
    for tensor, signal in (a, b):
        codes = np.arange(tensor.lo, tensor.hi + 1, dtype=np.int64)
        stored.append((codes + signal.point).astype(np.float32))
        scale = np.float32(np.ldexp(float(signal.factor), -tensor.format.fracs[0]))
        ratios.append(np.float32(scale / np.float32(quantiser.scale)))
    points = (np.float32(a[1].point), np.float32(b[1].point))
    zero = np.float32(quantiser.zero_point)
    offset = np.float32(zero - _fma(ratios[0], points[0], np.float32(ratios[1] * points[1])))
    inner = _fma(stored[1][None, :], ratios[1], offset)
    total = _fma(stored[0][:, None], ratios[0], inner)
    kept = np.clip(np.rint(total), quantiser.low + quantiser.zero_point, quantiser.high + quantiser.zero_point)
    return np.asarray(kept, np.float32).astype(np.int64) - quantiser.zero_point


def _fma(x: np.ndarray | np.float32, y: np.ndarray | np.float32, c: np.ndarray | np.float32) -> np.ndarray:
    """float32 ``x * y + c`` rounded once: the product of two float32 numbers is exact in float64."""
    exact = np.asarray(x, np.float64) * np.asarray(y, np.float64)
    return np.asarray(exact + np.asarray(c, np.float64)).astype(np.float32)
