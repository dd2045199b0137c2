"""Signed digits and the projection, against brute force: every sum of signed powers of two is tried."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgemat.errors import FormatError
from edgemat.formats import ROUNDINGS, Fixed, round_float
from edgemat.signed_digits import digit_count, pack_digits, project, signed_digits, sparse_codes, unpack_digits


def fewest_terms(width: int) -> dict[int, int]:
    """Fewest signed powers of two (up to three) that sum to each integer, by trying all sums."""
    powers = [s << p for p in range(width + 2) for s in (1, -1)]
    found: dict[int, int] = {0: 0}
    for count in (1, 2, 3):
        for terms in itertools.combinations_with_replacement(powers, count):
            found.setdefault(sum(terms), count)
    return found


FEWEST = fewest_terms(12)


def allowed(width: int, signed: bool, khot: int) -> list[int]:
    low, high = Fixed(width, 0, signed).rails
    return [code for code in range(low, high + 1) if FEWEST.get(code, 4) <= khot]


def by_hand(x: float, codes: list[int], rounding: str) -> int:
    """The rule of the module's docstring, one number at a time, in the words of the rule."""
    if x <= codes[0] or x >= codes[-1]:
        return codes[0] if x <= codes[0] else codes[-1]
    a = max(code for code in codes if code <= x)
    b = min(code for code in codes if code >= x)
    nearer_zero, farther = sorted((a, b), key=abs)
    if rounding == "TRN" or a == b:
        return a
    if rounding == "TRN_ZERO":
        return nearer_zero
    if x - a != b - x:
        return a if x - a < b - x else b
    if rounding == "RND_CONV":
        return max((a, b), key=lambda code: code & -code if code else 1 << 40)
    return {"RND": b, "RND_MIN_INF": a, "RND_INF": farther, "RND_ZERO": nearer_zero}[rounding]


def test_digit_counts_are_the_fewest() -> None:
    codes = np.arange(-(1 << 12), 1 << 12)
    counts = digit_count(codes)
    for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
        assert FEWEST.get(code, 4) == min(count, 4)
    wide = np.array([(1 << 62) + 1, (1 << 63) - 1, -(1 << 63), 0x5555555555555555])
    assert digit_count(wide).tolist() == [2, 2, 1, 32]


def test_digits_sum_to_their_code_and_no_two_are_neighbours() -> None:
    codes = sparse_codes(-(1 << 20), 1 << 20, 3)
    signs, shifts = signed_digits(codes, 3)
    assert (np.sum(signs.astype(np.int64) << shifts.astype(np.int64), axis=0) == codes).all()
    for k in range(2):
        assert (shifts[k + 1] - shifts[k] >= 2)[signs[k + 1] != 0].all()
    with pytest.raises(FormatError, match="11 is a sum of 3 signed powers of two, expected at most 2"):
        signed_digits(np.array([1, 11]), 2)


@pytest.mark.parametrize("khot", [1, 2, 3])
@pytest.mark.parametrize("width", range(1, 13))
def test_projection_equals_brute_force(width: int, khot: int) -> None:
    """Every half and quarter between the rails and beyond, all rounding modes, signed and unsigned."""
    for signed in (True, False):
        codes = allowed(width, signed, khot)
        low, high = Fixed(width, 0, signed).rails
        assert sparse_codes(low, high, khot).tolist() == codes
        steps = np.arange(4 * low - 6, 4 * high + 7) / 4.0
        if width > 7:  # all ties, all codes, and a sample of the rest
            ties = (np.array(codes[1:]) + np.array(codes[:-1])) / 2.0
            around = [np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf)]
            steps = np.concatenate([steps[:: 1 << (width - 7)], ties, codes, *around])
        for rounding in ROUNDINGS if width <= 8 else ("RND", "RND_CONV", "TRN_ZERO"):
            found = project(steps, low, high, khot, rounding)
            sparse = np.array(codes)
            assert np.isin(found, sparse).all()
            if width <= 8:
                assert found.tolist() == [by_hand(x, codes, rounding) for x in steps.tolist()]
                continue
            # The same rule on arrays: both neighbours of each number, then the mode.
            inside = np.clip(steps, codes[0], codes[-1])
            a = sparse[np.searchsorted(sparse, inside, side="right") - 1]
            b = sparse[np.searchsorted(sparse, inside, side="left")]
            up = inside - a >= b - inside if rounding == "RND" else inside - a > b - inside
            if rounding == "RND_CONV":
                power = [np.where(v == 0, 1 << 40, v & -v) for v in (a, b)]
                up |= (inside - a == b - inside) & (power[1] > power[0])
            if rounding == "TRN_ZERO":
                up = inside < 0
            assert (found == np.where(up, b, a)).all(), rounding


def test_without_a_limit_the_projection_is_ordinary_rounding() -> None:
    """Six bits have at most three digits, so every code is allowed: then a tie's rule is the mode's own."""
    steps = np.arange(-32 * 8, 31 * 8 + 1) / 8.0
    for rounding in ROUNDINGS:
        rounded = np.clip(round_float(steps, rounding), -32, 31)
        assert (project(steps, -32, 31, 3, rounding) == rounded).all(), rounding
        assert (project(steps, -32, 31, 2, rounding) != rounded).any()


def test_a_tie_between_codes_has_one_even_side() -> None:
    for khot in (1, 2, 3):
        codes = sparse_codes(-(1 << 15), 1 << 15, khot)
        power = np.where(codes == 0, 1 << 40, codes & -codes)
        assert (power[1:] != power[:-1]).all()


@pytest.mark.parametrize("khot", [1, 2, 3])
@pytest.mark.parametrize("dense", [False, True])
def test_words_hold_their_codes(khot: int, dense: bool) -> None:
    for width in (1, 2, 3, 6, 8, 12, 20, 32):
        codes = sparse_codes(-(1 << (width - 1)), (1 << (width - 1)) - 1, khot)
        packed = pack_digits(codes, khot, dense)
        assert (unpack_digits(packed) == codes).all()
        assert packed.words.min() >= 0 and int(packed.words.max()) < 1 << packed.width
        full = dense and khot > 1
        assert (packed.none >= 1 << (packed.field_bits - 1)) == full, "full words need no mark for a missing digit"
        wrong = packed.words.copy()
        wrong[-1] ^= 1  # a sign
        changed = unpack_digits(type(packed)(wrong, *(getattr(packed, k) for k in ("count", "field_bits", "none"))))
        assert (changed[:-1] == codes[:-1]).all() and (changed[-1] != codes[-1] or codes[-1] == 0)


def test_words_of_eight_bit_weights_take_a_byte_for_two_digits() -> None:
    codes = sparse_codes(-128, 127, 2)
    assert pack_digits(codes, 2, dense=True).width == 8
    assert pack_digits(sparse_codes(-128, 127, 1), 1, dense=True).width == 5
