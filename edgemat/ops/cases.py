"""Helpers that build the cases of dossiers: typed tensors, constant operands and the codes to feed them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgemat.formats import Fixed
from edgemat.op import Call, Shape, Tensor


def tensor(fmt: str, shape: Shape, name: str = "x", lo: int | None = None, hi: int | None = None) -> Tensor:
    """A Tensor of the format `fmt` whose interval is the whole code range unless given."""
    parsed = Fixed.parse(fmt)
    low, high = parsed.rails
    return Tensor(name, shape, parsed, low if lo is None else lo, high if hi is None else hi)


def constant(fmt: str, codes: np.ndarray, name: str = "w") -> tuple[Tensor, np.ndarray]:
    """A constant operand and its Tensor."""
    codes = np.asarray(codes, dtype=np.int64)
    return Tensor(name, codes.shape, Fixed.parse(fmt), int(codes.min()), int(codes.max())), codes


def random_codes(fmt: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Uniform codes over the whole range of `fmt`, both rails included."""
    low, high = Fixed.parse(fmt).rails
    codes = np.random.default_rng(seed).integers(low, high, shape, np.int64, endpoint=True)
    codes.flat[0] = low
    codes.flat[-1] = high
    return codes


def feeds(call: Call, batch: int = 4, seed: int = 0) -> Iterator[list[np.ndarray]]:
    """Input codes for a call: rails, zero, alternating rails, ties of the epilogue, then random.

    Yields:
        One list with the int64 codes of every input (constants included) for each kind of data.
    """
    rng = np.random.default_rng(seed)

    def filled(make: str) -> list[np.ndarray]:
        arrays = []
        for i, x in enumerate(call.x):
            fixed = call.constant(i)
            if fixed is not None:
                arrays.append(fixed)
                continue
            shape = tuple(batch if d is None else d for d in x.shape)
            if make == "random":
                codes = rng.integers(x.lo, x.hi, shape, np.int64, endpoint=True)
            elif make == "alternating":
                codes = np.where(np.arange(int(np.prod(shape))).reshape(shape) % 2, x.lo, x.hi)
            elif make == "sweep":
                span = x.hi - x.lo + 1
                step = max(1, span // max(1, int(np.prod(shape))))
                kind = np.int64 if span < 1 << 62 else object
                codes = x.lo + (np.arange(int(np.prod(shape))).astype(kind).reshape(shape) * step) % span
            else:
                codes = np.full(shape, {"low": x.lo, "high": x.hi, "zero": min(max(0, x.lo), x.hi)}[make])
            arrays.append(x.legal(codes))
        return arrays

    for make in ("low", "high", "zero", "alternating", "sweep", "random", "random"):
        yield filled(make)
