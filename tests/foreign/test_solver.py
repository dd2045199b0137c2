"""Thresholds and multipliers: found exactly, or not at all."""

from __future__ import annotations

import numpy as np
import pytest

from edgemat.foreign.solver import Gaps, Multipliers, find_thresholds, solve_multipliers, solve_offset

RNG = np.random.default_rng(5)


def staircase(slopes: np.ndarray, low: int, high: int):  # type: ignore[no-untyped-def]
    """A float32 requantisation, as integer kernels of onnxruntime do it."""
    scale = slopes.astype(np.float32)[:, None]
    return lambda x: np.clip(np.round(x.astype(np.float32) * scale), low, high).astype(np.int64)


def every(function, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:  # type: ignore[no-untyped-def]
    codes = np.arange(int(lo.min()), int(hi.max()) + 1)[None, :].repeat(len(lo), 0)
    return function(np.clip(codes, lo[:, None], hi[:, None]))


def test_thresholds_are_those_of_every_code() -> None:
    slopes = RNG.uniform(0.001, 0.1, 7)
    lo, hi = -RNG.integers(1, 3000, 7), RNG.integers(1, 3000, 7)
    function = staircase(slopes, -128, 127)
    found = find_thresholds(function, lo, hi, -128, 127)
    for c in range(7):
        codes = np.arange(lo[c], hi[c] + 1)
        values = function(codes[None, :].repeat(7, 0))[c]
        for level in range(-127, 128):
            reached = codes[values >= level]
            assert found[c, level + 127] == (reached[0] if reached.size else hi[c] + 1)


@pytest.mark.parametrize("low", [-128, 0])
def test_multipliers_equal_the_function_everywhere(low: int) -> None:
    slopes = RNG.uniform(0.002, 0.09, 5)
    lo, hi = np.full(5, -20_000), np.full(5, 20_000)
    function = staircase(slopes, low, 127)
    gaps = Gaps.of(find_thresholds(function, lo, hi, low, 127), lo, hi, low)
    solved = solve_multipliers(gaps, slopes)
    assert solved is not None and solved.width <= 24
    assert (every(lambda x: applied(solved, x, low), lo, hi) == every(function, lo, hi)).all()
    # The control: the narrowest multiplier is the narrowest one; a bit less of it is another function.
    worse = type(solved)(solved.a >> 2 << 2, solved.b, solved.shift, solved.rounding)
    assert (every(lambda x: applied(worse, x, low), lo, hi) != every(function, lo, hi)).any()


def applied(m, x: np.ndarray, low: int, high: int = 127) -> np.ndarray:  # type: ignore[no-untyped-def]
    total = m.a[:, None] * x + m.b[:, None]
    half = np.where(m.shift > 0, 1 << np.maximum(m.shift - 1, 0), 0)[:, None]
    rounded = (total + half) >> m.shift[:, None]
    if m.rounding == "RND_CONV":
        tie = (((total + half) & ((1 << m.shift[:, None]) - 1)) == 0) & (m.shift[:, None] > 0)
        rounded = np.where(tie & (rounded & 1 == 1), rounded - 1, rounded)
    return np.clip(rounded, low, high)


def test_halves_to_even_need_their_own_rounding() -> None:
    lo, hi = np.array([-999]), np.array([999])
    function = staircase(np.array([0.125]), -128, 127)
    gaps = Gaps.of(find_thresholds(function, lo, hi, -128, 127), lo, hi, -128)
    solved = solve_multipliers(gaps, np.array([0.125]))
    assert solved is not None and solved.rounding == "RND_CONV" and solved.width == 1
    assert (every(lambda x: applied(solved, x, -128), lo, hi) == every(function, lo, hi)).all()


def test_no_line_is_found_where_there_is_none() -> None:
    lo, hi = np.array([-50]), np.array([50])
    bent = lambda x: np.where(x < 0, x, 3 * x).astype(np.int64)  # noqa: E731
    gaps = Gaps.of(find_thresholds(bent, lo, hi, -50, 150), lo, hi, -50)
    assert solve_multipliers(gaps, np.array([1.0])) is None


def twice(m, x: np.ndarray, low: int, high: int) -> np.ndarray:  # type: ignore[no-untyped-def]
    """RND to the grid, then RND_CONV."""
    rest = (m.shift - m.grid)[:, None]
    first = ((m.a[:, None] * x + m.b[:, None]) + np.where(rest > 0, 1 << np.maximum(rest - 1, 0), 0)) >> rest
    unit = (1 << m.grid)[:, None]
    whole, part = first // unit, first % unit
    up = (part * 2 > unit) | ((part * 2 == unit) & (whole & 1 == 1))
    return np.clip(whole + up, low, high)


def test_two_roundings_equal_float32_where_no_line_does() -> None:
    """As in MLPerf's QDQ ResNet8: a float32 product is rounded onto a half, and the half to even."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        slopes = rng.uniform(0.0005, 0.004, 8).astype(np.float32).astype(np.float64)
        lo, hi = np.full(8, -90_000), np.full(8, 140_000)
        function = staircase(slopes, 0, 255)
        gaps = Gaps.of(find_thresholds(function, lo, hi, 0, 255), lo, hi, 0)
        solved = solve_multipliers(gaps, slopes)
        if solved is None or solved.grid is None:
            continue
        codes = np.concatenate([gaps.above, gaps.below], axis=1)
        codes = np.clip(codes, lo[:, None], hi[:, None])
        expected = function(codes)
        assert (twice(solved, codes, 0, 255) == expected).all()
        once = type(solved)(solved.a, solved.b, solved.shift, "RND_CONV")
        assert (applied(once, codes, 0, 255) != expected).any()
        return
    pytest.fail("no slope needed two roundings")


@pytest.mark.parametrize(("ratios", "mode"), [((0.5, 1.5), "RND_CONV"), ((0.8357, 1.6521), "RND")])
def test_an_offset_separates_every_pair_of_a_sum(ratios: tuple[float, float], mode: str) -> None:
    a, b = np.arange(-128, 128)[:, None], np.arange(256)[None, :]
    values = a.astype(np.float32) * np.float32(ratios[0]) + b.astype(np.float32) * np.float32(ratios[1])
    expected = np.clip(np.round(values), -128, 127).astype(np.int64)
    shift = 20
    z = round(ratios[0] * 2**shift) * a + round(ratios[1] * 2**shift) * b
    solved = solve_offset(Gaps.between(z, expected, -128, 127), shift)
    assert solved is not None and solved[0].mode == mode and solved[0].grid is None
    one = np.ones(1, np.int64)
    found = Multipliers(one, one * solved[1], one * shift, solved[0].mode)
    assert (applied(found, z.reshape(1, -1), -128) == expected.reshape(1, -1)).all()
    other = Multipliers(one, one * solved[1], one * shift, "RND" if mode == "RND_CONV" else "RND_CONV")
    if mode == "RND_CONV":
        assert (applied(other, z.reshape(1, -1), -128) != expected.reshape(1, -1)).any()
    assert solve_offset(Gaps.between(z, expected[::-1], -128, 127), shift) is None
