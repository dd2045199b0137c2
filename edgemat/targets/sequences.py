"""Sequences for generated code that computes one step of one sample at a time.

A model with recurrent states gets the steps of one sequence after the other. With each step goes a flag that tells
whether it begins a sequence; the model is reset there.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Codes = dict[str, np.ndarray]


def in_order(codes: Mapping[str, np.ndarray]) -> tuple[Codes, np.ndarray]:
    """The steps of all sequences one after the other, and which of them begin one.

    Args:
        codes: int64 codes ``[T, N, *shape]`` of N sequences of T steps, by code-tensor name.

    Returns:
        int64 codes ``[N * T, *shape]`` by name, and bool ``[N * T]``.
    """
    steps, samples = next(iter(codes.values())).shape[:2]
    flat = {name: array.swapaxes(0, 1).reshape(samples * steps, *array.shape[2:]) for name, array in codes.items()}
    return flat, np.arange(samples * steps) % steps == 0


def by_step(codes: Mapping[str, np.ndarray], steps: int) -> Codes:
    """The inverse of `in_order`: int64 codes ``[T, N, *shape]`` by name."""
    return {
        name: array.reshape(len(array) // steps, steps, *array.shape[1:]).swapaxes(0, 1)
        for name, array in codes.items()
    }


def resets_of(codes: Mapping[str, np.ndarray], resets: np.ndarray | None) -> np.ndarray:
    """Which samples begin a sequence: those that `resets` tells, or every one."""
    return np.ones(len(next(iter(codes.values()))), bool) if resets is None else np.asarray(resets, bool)
