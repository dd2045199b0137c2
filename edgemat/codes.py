"""Constant codes that stay where they are and are read in blocks of rows: large weights in a data file, or in torch.

A weight of some ten million trits takes eight bytes a trit as int64 codes. What most readers ask of it are its shape,
its interval and the sums of its rows; `Codes` finds these in one pass over blocks, and hands out the int64 array only
where it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np

BLOCK_ELEMENTS = 1 << 17
"""About as many elements are in memory at a time."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Survey:
    """What one pass over codes finds.

    Attributes:
        lo: Smallest code.
        hi: Largest code.
        positive: Sum of the positive codes of each row [rows], in the narrowest of int16, int32 and int64 that holds
            them: a large model has many rows.
        negative: Sum of the negative codes of each row, likewise.
        pair: Largest sum of the two largest magnitudes of a row (of the one, where a row has one).
    """

    lo: int
    hi: int
    positive: np.ndarray
    negative: np.ndarray
    pair: int


class Codes:
    """Codes of a constant, read on demand.

    Attributes:
        shape: Shape, at least one axis and one element.
        dtype: Integer type of the blocks.

    Args:
        shape: See above.
        dtype: See above.
        read: Gives rows ``first`` to ``last - 1`` (axis 0) as an array of `dtype`.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[int, int], np.ndarray]) -> None:
        self.shape, self.dtype = shape, dtype
        self._read = read

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    def blocks(self) -> Iterator[np.ndarray]:
        """All rows in order, some at a time."""
        for first, last in row_blocks(self.shape):
            yield self._read(first, last)

    def part(self, first: int, last: int) -> Codes:
        """Rows ``first`` to ``last - 1`` as codes of their own, which stay where they are."""
        return Codes(
            (last - first, *self.shape[1:]), self.dtype, lambda begin, end: self._read(first + begin, first + end)
        )

    def array(self) -> np.ndarray:
        """All codes as int64: eight bytes an element, not kept."""
        made = np.empty(self.shape, np.int64)
        for first, last in row_blocks(self.shape):
            made[first:last] = self._read(first, last)
        return made

    @cached_property
    def survey(self) -> Survey:
        """Interval and row sums, found once."""
        lows, highs, pairs = [], [], []
        sums = np.empty((2, self.shape[0]), np.int64)
        for (first, last), block in zip(row_blocks(self.shape), self.blocks(), strict=True):
            rows = block.reshape(len(block), -1)
            lows.append(int(rows.min()))
            highs.append(int(rows.max()))
            sums[0, first:last] = np.maximum(rows, 0).sum(axis=1, dtype=np.int64)
            sums[1, first:last] = np.minimum(rows, 0).sum(axis=1, dtype=np.int64)
            pairs.append(_largest_pair(rows))
        return Survey(min(lows), max(highs), _narrow(sums[0]), _narrow(sums[1]), max(pairs))


def _narrow(whole: np.ndarray) -> np.ndarray:
    """A copy of an int64 array in the narrowest type that holds it."""
    low, high = int(whole.min()), int(whole.max())
    fitting = (kind for kind in (np.int16, np.int32) if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)
    return whole.astype(next(fitting, np.int64))


def _largest_pair(rows: np.ndarray) -> int:
    """Largest sum of the two largest magnitudes of a row."""
    if int(rows.min()) >= -1 and int(rows.max()) <= 1:
        return int(np.minimum(np.count_nonzero(rows, axis=1), 2).max())
    two = min(2, rows.shape[1])
    return int(np.partition(np.abs(rows.astype(np.int64)), -two, axis=1)[:, -two:].sum(axis=1).max())


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First row and the row behind the last of each block of about `BLOCK_ELEMENTS` elements."""
    width = int(np.prod(shape[1:], dtype=np.int64))
    step = max(1, BLOCK_ELEMENTS // max(1, width))
    for first in range(0, shape[0], step):
        yield first, min(first + step, shape[0])


class Constants(Mapping[Key, np.ndarray], Generic[Key]):
    """int64 codes by key. Those held as `Codes` become an array at each look-up, which is not kept."""

    def __init__(self, held: Mapping[Key, np.ndarray | Codes] | None = None) -> None:
        self.held: dict[Key, np.ndarray | Codes] = dict(held.held if isinstance(held, Constants) else held or {})

    def __getitem__(self, key: Key) -> np.ndarray:
        found = self.held[key]
        return found.array() if isinstance(found, Codes) else found

    def __iter__(self) -> Iterator[Key]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)

    def __contains__(self, key: object) -> bool:
        return key in self.held

    def stored(self, key: Key) -> Codes | None:
        """The codes under a key where they stay in their file, else None."""
        found = self.held.get(key)
        return found if isinstance(found, Codes) else None
