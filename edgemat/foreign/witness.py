"""How often a quantised result differs from the file's float32 arithmetic, where that is no function of one integer.

A product of two tensors, an average and a softmax are computed on codes; the file computes them in float32 from real
numbers, rounding after every operation. A `Witness` holds both for all inputs, or for a sample of them, so that the
quantiser behind them can say for how many codes they part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgemat.foreign.requantisers import Compiled
from edgemat.foreign.signals import Signal
from edgemat.op import Tensor

MAX_PAIRS = 1 << 20
SAMPLES = 1 << 14
SEED = 0


@dataclass(frozen=True)
class Witness:
    """Inputs of one operator, and its results.

    Attributes:
        codes: What the integer operator makes of them, int64 [K].
        values: What the file's operator makes of them, float32 [K].
        of: What was tried, for people: "pairs of codes", "sampled windows".
        kernel: Whether the 8-bit kernel's result is one multiplication of the integer operator's.
        sums: Whether the integers are the exact result of what the file does, in whatever order float32 adds it up.
    """

    codes: np.ndarray
    values: np.ndarray
    of: str
    sums: bool = True
    kernel: bool = False

    def fidelity(self, function: Compiled) -> tuple[str, str]:
        """A note of what was tried, and the fidelity: for how many of the inputs the quantised codes differ."""
        alone = function.alone()
        count = self.codes.size if alone.channels == 1 else min(self.codes.size, MAX_PAIRS // alone.channels)
        shape = (alone.channels, count)
        ours = alone(np.broadcast_to(self.codes[:count], shape))
        theirs = alone.finish(np.broadcast_to(self.values[:count], shape))
        wrong = int((ours != theirs).sum())
        tried = f"{ours.size} {self.of}"
        if wrong:
            return "", f"differs for {wrong} of {tried}, by at most {int(np.abs(ours - theirs).max())}"
        return f"float32 agrees on {tried}", "exact" if self.sums else f"differs for 0 of {tried}"


def codes_of(tensor: Tensor) -> np.ndarray:
    """Every code of a tensor, int64."""
    return np.array([-1, 1]) if tensor.format.bipolar else np.arange(tensor.lo, tensor.hi + 1, dtype=np.int64)


def real(tensor: Tensor, signal: Signal, codes: np.ndarray) -> np.ndarray:
    """float32 real numbers of codes of a tensor with one scale."""
    plain = np.ldexp(codes.astype(np.float64), -tensor.format.fracs[0]).astype(np.float32)
    return np.asarray(plain * signal.factor.astype(np.float32).reshape(()), np.float32)


def plain(tensor: Tensor, signal: Signal) -> bool:
    """Whether a tensor has one scale, and at most 16 bits."""
    return not tensor.format.per_channel and signal.factor.size == 1 and tensor.format.width <= 16 and not signal.chain


def products(first: tuple[Tensor, Signal], second: tuple[Tensor, Signal]) -> Witness | None:
    """All products of two tensors with real scales, or a sample where there are too many pairs; None where exact."""
    pair = (first, second)
    if not all(plain(*one) for one in pair) or all(float(signal.factor) == 1 for _, signal in pair):
        return None
    a, b = (codes_of(tensor) for tensor, _ in pair)
    of = "pairs of codes"
    if a.size * b.size <= MAX_PAIRS:
        a, b = (grid.reshape(-1) for grid in np.meshgrid(a, b, indexing="ij"))
    else:
        rng = np.random.default_rng(SEED)
        a, b = (rng.choice(codes, MAX_PAIRS) for codes in (a, b))
        of = "sampled pairs of codes"
    values = real(*first, a) * real(*second, b)
    return Witness(a * b, np.asarray(values, np.float32), of, kernel=True)


def averages(tensor: Tensor, signal: Signal, count: int) -> Witness | None:
    """Sampled windows of so many codes, summed one after the other in float32 (the division is the chain's)."""
    if not plain(tensor, signal) or float(signal.factor) == 1 or count > 1 << 12:
        return None
    codes = np.random.default_rng(SEED).choice(codes_of(tensor), (min(SAMPLES, (1 << 22) // count), count))
    total = np.zeros(len(codes), np.float32)
    for column in real(tensor, signal, codes).T:
        total = total + column
    return Witness(codes.sum(axis=1), total, "sampled windows")


def rows(tensor: Tensor, size: int) -> np.ndarray:
    """Sampled rows of codes, int64 [K, size]: spread over the whole range, about one code, and mostly equal."""
    rng, codes = np.random.default_rng(SEED), codes_of(tensor)
    count = max(min(SAMPLES, (1 << 20) // max(size, 1)) // 3, 1)
    wide = rng.choice(codes, (count, size))
    near = rng.choice(codes, (count, 1)) + rng.integers(-12, 13, (count, size))
    flat = np.where(rng.random((count, size)) < 0.1, wide, wide[:, :1])
    return np.clip(np.concatenate([wide, near, flat]), tensor.lo, tensor.hi)
