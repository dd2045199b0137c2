"""Widths by channel and bipolar codes: text, rails, rounding and overflow against exact fractions."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemat.errors import FormatError
from edgemat.formats import (
    BIPOLAR,
    ROUNDINGS,
    Fixed,
    dequantize,
    holds_codes,
    quantize,
    requantize,
    wrap,
)
from tests.core import oracle

MIXED = Fixed.parse("fixed<[6,3,0,1],[1,2,3,1],RND,SAT>")


def test_text_of_widths_by_channel() -> None:
    assert (MIXED.width, MIXED.widths, MIXED.int_bits) == (6, (6, 3, 0, 1), (1, 2, 3, 1))
    assert MIXED.fracs == MIXED.frac_bits == (5, 1, -3, 0)
    assert str(MIXED) == "fixed<[6,3,0,1],[1,2,3,1],RND,SAT>" and Fixed.parse(str(MIXED)) == MIXED
    assert Fixed.parse(" ufixed< [2, 0] , 1 > ") == Fixed(2, (1, 1), False, widths=(2, 0))
    assert Fixed.parse("fixed<[2,0]>").int_bits is None and Fixed.parse("fixed<[2,0]>").per_channel
    assert Fixed.of_channels((6, 3, 0, 1), (5, 1, -3, 0)) == MIXED
    assert hash(Fixed.parse(str(MIXED))) == hash(MIXED)


def test_equal_widths_are_one_width() -> None:
    assert Fixed.parse("fixed<[4,4],[1,2]>") == Fixed(4, (1, 2))
    assert Fixed.of_channels([4, 4], [3, 2], overflow="WRAP") == Fixed(4, (1, 2), overflow="WRAP")
    assert Fixed(4, 2, widths=(4, 4)) == Fixed(4, 2)
    dead = Fixed.parse("fixed<[0,0],[0,0]>")
    assert (dead.width, dead.rails, dead.widths, dead.finest) == (1, (0, 0), (0, 0), 0)
    assert Fixed.parse(str(dead)) == dead


@pytest.mark.parametrize(
    "text",
    ["fixed<[],1>", "fixed<[6,],1>", "fixed<[6,65],1>", "ufixed<[64,3],1>", "fixed<[6,-1],1>", "fixed<[6,3],[1]>",
     "fixed<[6,3],[1,2,3]>", "fixed<[6,3],1,RND,WRAP>", "fixed<[6,3],1,RND,SAT_ZERO>", "bipolar<1>", "Bipolar",
     "fixed<1,1,TRN,SIGN>2", "fixed<8,3,RND,SIGN>", "ufixed<1,1,TRN,SIGN>", "fixed<6,3],1>"],
)  # fmt: skip
def test_malformed_text_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="expected"):
        Fixed.parse(text)


@pytest.mark.parametrize("widths", [(), (7, 3), (5, 3), (6, True), (6, 2.0), 6, (6, None)])
def test_illegal_widths_are_refused(widths: object) -> None:
    with pytest.raises(FormatError, match="expected"):
        Fixed(6, 1, widths=widths)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="expected"):
        Fixed.of_channels((), ())
    with pytest.raises(FormatError, match="expected"):
        Fixed.of_channels((3, 4), (1,))


def test_rails_of_each_channel() -> None:
    low, high = MIXED.channel_rails()
    assert (low.tolist(), high.tolist()) == ([-32, -4, 0, -1], [31, 3, 0, 0]) and low.dtype == np.int64
    assert MIXED.rails == (-32, 31)
    low, high = replace(MIXED, overflow="SAT_SYM").channel_rails()
    assert (low.tolist(), high.tolist()) == ([-31, -3, 0, 0], [31, 3, 0, 0])
    low, high = Fixed.parse("ufixed<[2,0,63],1>").channel_rails()
    assert (low.tolist(), high.tolist()) == ([0, 0, 0], [3, 0, 2**63 - 1])
    low, high = Fixed(64, 3).channel_rails()
    assert (low.tolist(), high.tolist()) == ([-(2**63)], [2**63 - 1])


def test_what_a_format_holds() -> None:
    assert not MIXED.holds(-1, 0) and MIXED.holds(0, 0)
    assert MIXED.holds(np.array([-32, -4, 0, -1]), np.array([31, 3, 0, 0]))
    assert not MIXED.holds(np.array([-32, -4, 0, -1]), np.array([31, 3, 0, 1]))
    assert holds_codes(np.array([[-32, 3, 0, -1], [31, -4, 0, 0]]), MIXED)
    assert not holds_codes(np.array([[31, 4, 0, 0]]), MIXED)
    assert not holds_codes(np.array([[31, 3, 1, 0]]), MIXED)
    assert holds_codes(np.array([[-32, 31], [3, 3]]), Fixed.parse("fixed<[6,3],1>"), axis=0)
    assert BIPOLAR.holds(1, 1) and BIPOLAR.holds(-1, -1) and not BIPOLAR.holds(-1, 1) and not BIPOLAR.holds(0, 0)
    assert holds_codes(np.array([-1, 1, 1]), BIPOLAR) and not holds_codes(np.array([0]), BIPOLAR)
    assert holds_codes(np.zeros((0, 4), np.int64), MIXED)


def test_moving_the_binary_points() -> None:
    assert MIXED.with_frac(2).fracs == (2, 2, 2, 2) and MIXED.with_frac(2).widths == MIXED.widths
    assert MIXED.with_frac([1, 2, 3, 4]).fracs == (1, 2, 3, 4)
    assert MIXED.finest == 5 and Fixed.parse("fixed<[2,0],[1,-9]>").finest == 1 and Fixed(8, (3, 0)).finest == 8
    with pytest.raises(FormatError, match="4 widths"):
        MIXED.with_frac([1, 2])
    assert BIPOLAR.with_frac(0) is BIPOLAR
    with pytest.raises(FormatError, match="bipolar"):
        BIPOLAR.with_frac(1)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("overflow", ["SAT", "SAT_SYM"])
@pytest.mark.parametrize("signed", [True, False])
def test_every_code_into_channels_of_every_width(rounding: str, overflow: str, signed: bool) -> None:
    """Each of the 8-bit codes into channels of 0 to 8 bits with coarser, equal and finer grids, and back."""
    source = Fixed(8, 3)
    every = np.arange(-128, 128)
    for fracs in ([2] * 9, list(range(-1, 8)), [7, 6, 5, 5, 5, 4, 2, 1, 9]):
        target = Fixed.of_channels(range(9), fracs, signed, rounding, overflow)
        found = requantize(np.repeat(every[:, None], 9, 1), source, target)
        exact = [[oracle.to_code(c * oracle.lsb(source), target, k) for k in range(9)] for c in every.tolist()]
        assert found.tolist() == exact
        again = requantize(found, target, source)
        values = [[oracle.to_code(c * oracle.lsb(target, k), source) for k, c in enumerate(row)] for row in exact]
        assert again.tolist() == values
        reals = quantize(every[:, None] * np.full(9, 2.0**-5), target)
        assert reals.tolist() == exact
        assert quantize(dequantize(found, target), target).tolist() == exact
        # The control: one channel's width changed by one bit moves a rail.
        narrower = Fixed.of_channels([0, 1, 2, 2, *range(4, 9)], fracs, signed, rounding, overflow)
        assert (requantize(np.repeat(every[:, None], 9, 1), source, narrower) != found).any()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_channel_axis(axis: int) -> None:
    codes = np.full((4, 4, 4), 40)
    found = wrap(codes, MIXED, axis)
    assert np.moveaxis(found, axis, 0)[:, 0, 0].tolist() == [31, 3, 0, 0]
    assert (wrap(codes, MIXED, axis) == requantize(codes, MIXED, MIXED, axis)).all()
    assert (quantize(codes.astype(float) * 100, MIXED, axis) == found).all()
    assert wrap(np.array([[2**70, 2**70, -(2**70), -(2**70)]], object), MIXED).tolist() == [[31, 3, 0, -1]]


def test_infinities_and_wide_channels() -> None:
    fmt = Fixed.of_channels((64, 0, 63, 54), (2, 3, 1, 0), overflow="SAT_SYM")
    low, high = fmt.channel_rails()
    values = np.array([[np.inf] * 4, [-np.inf] * 4, [1e30] * 4, [-1e30] * 4, [-float(2**61)] * 4])
    found = quantize(values, fmt).tolist()
    assert found[0] == found[2] == high.tolist() and found[1] == found[3] == low.tolist()
    exact = [oracle.to_code(Fraction(-(2**61)), fmt, k) for k in range(4)]
    assert found[4] == exact
    with pytest.raises(FormatError, match="NaN"):
        quantize(np.full((1, 4), np.nan), fmt)


def test_bipolar_codes() -> None:
    assert Fixed.parse(" bipolar ") is BIPOLAR and str(BIPOLAR) == "bipolar"
    assert (BIPOLAR.width, BIPOLAR.fracs, BIPOLAR.rails, BIPOLAR.storage_width) == (1, (0,), (-1, 1), 2)
    assert (BIPOLAR.min_code, BIPOLAR.max_code, BIPOLAR.per_channel) == (-1, 1, False)
    assert [rail.tolist() for rail in BIPOLAR.channel_rails()] == [[-1], [1]]
    values = np.array([-np.inf, -1.5, -0.25, -1e-45, -0.0, 0.0, 1e-45, 0.75, np.inf], np.float32)
    codes = quantize(values, BIPOLAR)
    assert codes.tolist() == [-1, -1, -1, -1, 1, 1, 1, 1, 1] and codes.dtype == np.int64
    assert dequantize(codes, BIPOLAR).tolist() == codes.tolist() and dequantize(codes, BIPOLAR).dtype == np.float32
    with pytest.raises(FormatError, match="NaN"):
        quantize(np.array([np.nan]), BIPOLAR)


def test_requantising_to_bipolar_takes_the_sign_of_the_value() -> None:
    """No rounding comes first: -1/4 is negative, which RND would have made 0 and so +1."""
    for width, point in product(range(1, 11), (-4, 0, 3, 14)):
        source = Fixed(width, point)
        every = np.arange(source.min_code, source.max_code + 1)
        found = requantize(every, source, BIPOLAR)
        assert found.tolist() == [oracle.to_code(c * oracle.lsb(source), BIPOLAR) for c in every.tolist()]
    assert requantize(np.array([-1]), Fixed(8, 2), BIPOLAR).tolist() == [-1]
    assert requantize(np.array([-1]), Fixed(8, 2), Fixed(2, 2)).tolist() == [0]  # the control
    assert requantize(np.array([-1, 1]), BIPOLAR, Fixed(8, 3)).tolist() == [-32, 32]
    assert requantize(np.array([-(2**63), 2**63 - 1]), Fixed(64, 64), BIPOLAR).tolist() == [-1, 1]


@given(
    st.lists(st.tuples(st.integers(0, 63), st.integers(-256, 256)), min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from(ROUNDINGS),
    st.sampled_from(["SAT", "SAT_SYM"]),
)
def test_text_round_trip(channels: list[tuple[int, int]], signed: bool, rounding: str, overflow: str) -> None:
    widths, points = zip(*channels, strict=True)
    fmt = Fixed(max(*widths, 1), points, signed, rounding, overflow, widths)
    assert Fixed.parse(str(fmt)) == fmt
    low, high = fmt.channel_rails()
    assert low.size in (1, len(widths)) and (low <= high).all()
    assert fmt.rails == (int(low.min()), int(high.max()))
