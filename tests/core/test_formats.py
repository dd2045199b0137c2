"""Formats, rounding and overflow: against exact fractions, against `ap_fixed` and against SystemC, code by code."""

from __future__ import annotations

import contextlib
import subprocess
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemat import formats
from edgemat.errors import EdgematError, FormatError
from edgemat.formats import OVERFLOWS, ROUNDINGS, Fixed, dequantize, quantize, requantize, round_shift, wrap
from edgemat.targets.toolchain import Compiler, compilers
from tests.core import oracle

PAIRS = list(product(ROUNDINGS, OVERFLOWS))
SOURCE = Fixed(10, 4)
CPP = Path(__file__).with_name("fixed_point.cpp")


def points(width: int) -> tuple[int, ...]:
    """Inside, negative and over-wide int_bits."""
    return (2, -1, width + 2)


@pytest.mark.parametrize(("rounding", "overflow"), PAIRS)
@pytest.mark.parametrize("signed", [True, False])
def test_every_code_of_every_width_to_ten_bits(rounding: str, overflow: str, signed: bool) -> None:
    """All source codes of 1 to 10 bits of both signs, to narrower, wider, finer and coarser targets."""
    for width, source_signed in product(range(1, 11), (True, False)):
        source = Fixed(width, width // 2, source_signed)
        every = np.arange(source.min_code, source.max_code + 1)
        targets = [
            Fixed(max(1, width - 3), max(1, width - 3) // 2, signed, rounding, overflow),
            Fixed(width, width + 3, signed, rounding, overflow),
            Fixed(min(10, width + 1), -2, signed, rounding, overflow),
        ]
        for target in targets:
            found = requantize(every, source, target).tolist()
            assert found == [oracle.to_code(code * oracle.lsb(source), target) for code in every.tolist()]


def expected_by_edgemat(all_points: bool) -> np.ndarray:
    """What fixed_point.cpp should print."""
    every = np.arange(-512, 512)
    parts = []
    for signed, width in product((True, False), range(1, 11)):
        chosen = points(width) if all_points else (points(width)[(width + signed) % 3],)
        for point in chosen:
            parts += [requantize(every, SOURCE, Fixed(width, point, signed, q, o)) for q, o in PAIRS]
    return np.stack(parts)


def printed_by(program: Path) -> np.ndarray:
    done = subprocess.run([str(program)], capture_output=True, timeout=120, check=True)
    return np.frombuffer(done.stdout, np.dtype("<i2")).reshape(-1, 1024).astype(np.int64)


def compiled(compiler: Compiler, flags: list[str], folder: Path, libraries: tuple[str, ...] = ()) -> Path:
    program = folder / "fixed_point"
    command = [*compiler.command, *flags, "-w", str(CPP), "-o", str(program), *libraries]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=compiler.environment())
    assert done.returncode == 0, done.stderr[-2000:]
    return program


def test_ap_fixed_gives_the_same_codes(cxx: Compiler, ap_headers: Path, tmp_path: Path) -> None:
    """1,024 codes x 20 target formats x 28 mode pairs, by the vendor's own type."""
    program = compiled(cxx, ["-std=c++14", "-O0", "-isystem", str(ap_headers), *cxx.ap_flags], tmp_path)
    found, expected = printed_by(program), expected_by_edgemat(all_points=False)
    assert found.shape == expected.shape
    # ap_fixed<1, I, Q, AP_SAT_SYM> leaves -1 where SystemC and edgemat give the only symmetric code, 0.
    lonely = [PAIRS.index((q, "SAT_SYM")) for q in ROUNDINGS]
    assert set(np.unique(found[lonely])) == {-1, 0} and not expected[lonely].any()
    assert (np.delete(found, lonely, axis=0) == np.delete(expected, lonely, axis=0)).all()
    for row in range(len(PAIRS), 2 * len(PAIRS) - 1):  # the control: the neighbouring mode pair differs
        assert (found[row] != expected[row + 1]).any()


def test_systemc_gives_the_same_codes(tmp_path: Path) -> None:
    """The same by SystemC's sc_fix (sc_fixed is this class with its parameters in the type)."""
    if not Path("/usr/include/systemc").exists():
        pytest.skip("SystemC is not installed: apt-get install libsystemc-dev")
    native = [c for c in compilers("c++") if c.name != "zig"]
    if not native:
        pytest.skip("SystemC's library needs the system's C++ compiler: apt-get install g++")
    program = compiled(native[0], ["-DUSE_SYSTEMC", "-std=c++17", "-O1"], tmp_path, ("-lsystemc",))
    found, expected = printed_by(program), expected_by_edgemat(all_points=True)
    assert found.shape == expected.shape
    assert (found == expected).all()


TIES = [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]
TABLE = {
    "TRN": [-3, -2, -1, 0, 1, 2],
    "TRN_ZERO": [-2, -1, 0, 0, 1, 2],
    "RND": [-2, -1, 0, 1, 2, 3],
    "RND_ZERO": [-2, -1, 0, 0, 1, 2],
    "RND_INF": [-3, -2, -1, 1, 2, 3],
    "RND_MIN_INF": [-3, -2, -1, 0, 1, 2],
    "RND_CONV": [-2, -2, 0, 0, 2, 2],
}


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_ties(rounding: str) -> None:
    """The table of docs/numerics.md, from reals, from codes and by division."""
    fmt = Fixed(8, 8, rounding=rounding)
    assert quantize(np.array(TIES), fmt).tolist() == TABLE[rounding]
    assert round_shift(np.array([int(4 * t) for t in TIES]), 2, rounding).tolist() == TABLE[rounding]
    assert formats.round_div(np.array([int(6 * t) for t in TIES]), 6, rounding).tolist() == TABLE[rounding]
    cells = " | ".join(str(v).replace("-", "−") for v in TABLE[rounding])
    page = Path(__file__).resolve().parents[2] / "docs" / "numerics.md"
    (row,) = [line for line in page.read_text("utf-8").splitlines() if line.startswith(f"| `{rounding}` |")]
    assert row.endswith(f"| {cells} |")


def test_floats_that_a_careless_floor_gets_wrong() -> None:
    fmt = Fixed(8, 8)
    assert quantize(np.array([0.49999997], np.float32), fmt).tolist() == [0]
    assert quantize(np.array([-0.49999997, -1e-30, -0.0, 1e-45], np.float32), fmt).tolist() == [0, 0, 0, 0]
    assert quantize(np.array([-1e-30, 1e-30]), Fixed(8, 8, rounding="TRN")).tolist() == [-1, 0]
    assert quantize(np.array([-1e-30, 1e-30]), Fixed(8, 8, rounding="TRN_ZERO")).tolist() == [0, 0]
    assert quantize(np.array([8388609.5]), Fixed(32, 32)).tolist() == [8388610]
    assert quantize(np.array([8388609.5], np.float32), Fixed(32, 32)).tolist() == [int(np.float32(8388609.5))]


def test_other_types_are_cast_to_float32_first() -> None:
    fmt = Fixed(40, 2)
    third = np.float32(1 / 3)
    assert quantize(np.array([third]), fmt).tolist() == [round(Fraction(float(third)) * 2**38)]
    assert quantize(np.array([16777217]), Fixed(32, 32)).tolist() == [16777216]
    assert quantize(np.array([1 / 3], np.float16), fmt).tolist() == [int(float(np.float16(1 / 3)) * 2**38)]


@pytest.mark.parametrize("fmt", ["fixed<8,3>", "ufixed<8,3>", "fixed<8,3,RND,SAT_SYM>", "fixed<64,3>", "ufixed<63,1>"])
def test_infinities_saturate_and_nan_is_refused(fmt: str) -> None:
    parsed = Fixed.parse(fmt)
    low, high = parsed.rails
    assert quantize(np.array([np.inf, -np.inf, 1e38, -1e38]), parsed).tolist() == [high, low, high, low]
    with pytest.raises(FormatError, match="NaN"):
        quantize(np.array([0.0, np.nan]), parsed)


def test_infinities_under_zero_and_wrap() -> None:
    assert quantize(np.array([np.inf, -np.inf]), Fixed(8, 3, overflow="SAT_ZERO")).tolist() == [0, 0]
    with pytest.raises(FormatError, match="infinite"):
        quantize(np.array([np.inf]), Fixed(8, 3, overflow="WRAP"))


@pytest.mark.parametrize("width", [1, 2, 8, 24, 31, 32, 53, 54, 63, 64])
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_reals_against_fractions_at_every_width(width: int, overflow: str) -> None:
    """Rails, one LSB beside them, ties and far away, for signed and unsigned formats, in every rounding mode."""
    for signed, rounding in product((True, False), ROUNDINGS):
        if width == 64 and not signed:
            continue
        fmt = Fixed(width, width - 2, signed, rounding, overflow)
        whole = [fmt.min_code, fmt.min_code - 1, fmt.max_code, fmt.max_code + 1, 0, 1, -1, 3, 3 * 2**width]
        values = np.array([(c + part) / 4 for c in whole for part in (0.0, 0.5, -0.5, 0.25)])
        found = quantize(values, fmt).tolist()
        assert found == [oracle.to_code(Fraction(v), fmt) for v in values.tolist()]


@given(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(1, 64),
    st.integers(-200, 200),
    st.integers(-200, 200),
    st.sampled_from(PAIRS),
    st.booleans(),
)
def test_any_64_bit_code_into_any_format(
    code: int, width: int, source_point: int, point: int, pair: tuple[str, str], signed: bool
) -> None:
    """64-bit accumulators, shifts far beyond the word both ways."""
    source = Fixed(64, source_point)
    target = Fixed(width if signed else min(width, 63), point, signed, *pair)
    found = requantize(np.array([code]), source, target)
    assert found.dtype == np.int64
    assert found.tolist() == [oracle.to_code(code * oracle.lsb(source), target)]


def test_wrap_of_python_integers_beyond_64_bits() -> None:
    big = np.array([2**70 + 5, -(2**70) - 5], object)
    assert wrap(big, Fixed(8, 8, overflow="WRAP")).tolist() == [5, -5]
    assert wrap(big, Fixed(64, 64, overflow="WRAP")).tolist() == [5, -5]
    assert wrap(big, Fixed(64, 64)).tolist() == [2**63 - 1, -(2**63)]


def test_binary_points_by_channel() -> None:
    fmt = Fixed(8, (3, 0, -2))
    values = np.array([[[0.5, 1.0], [0.25, -0.25], [0.0625, -1.0]]], np.float32)
    codes = quantize(values, fmt)
    assert codes.tolist() == [[[16, 32], [64, -64], [64, -128]]]
    assert dequantize(codes, fmt).tolist() == [[[0.5, 1.0], [0.25, -0.25], [0.0625, -0.125]]]
    flat = requantize(codes, fmt, Fixed(16, 4))
    assert flat.tolist() == [[[2048, 4096], [1024, -1024], [256, -512]]]
    assert requantize(flat, Fixed(16, 4), fmt).tolist() == codes.tolist()
    on_rows = quantize(np.full((3, 2), 0.125), fmt, axis=0)
    assert on_rows.tolist() == [[4, 4], [32, 32], [127, 127]]


def test_dequantize_chooses_its_type_by_width() -> None:
    assert dequantize(np.array([2**23 - 1]), Fixed(24, 24)).dtype == np.float32
    wide = dequantize(np.array([2**24 - 1]), Fixed(25, 25))
    assert wide.dtype == np.float64 and wide.tolist() == [2**24 - 1]
    assert dequantize(np.array([1]), Fixed(8, -100)).tolist() == [2.0**-108]


def test_every_code_survives_a_round_trip_through_values() -> None:
    for width, point, signed in product(range(1, 11), (-3, 0, 5, 14), (True, False)):
        fmt = Fixed(width, point, signed)
        every = np.arange(fmt.min_code, fmt.max_code + 1)
        assert (quantize(dequantize(every, fmt), fmt) == every).all()


fixed_formats = st.builds(
    Fixed,
    st.integers(1, 63),
    st.one_of(st.none(), st.integers(-256, 256), st.lists(st.integers(-256, 256), min_size=1, max_size=5).map(tuple)),
    st.booleans(),
    st.sampled_from(ROUNDINGS),
    st.sampled_from(OVERFLOWS),
)


@given(fixed_formats)
def test_text_round_trip(fmt: Fixed) -> None:
    assert Fixed.parse(str(fmt)) == fmt
    assert Fixed.parse(f"  {str(fmt).replace(',', ' , ')} ") == fmt


def test_modes_left_out_mean_rnd_and_sat() -> None:
    assert Fixed.parse("fixed<8,3>") == Fixed(8, 3, True, "RND", "SAT")
    assert Fixed.parse("ufixed<6>") == Fixed(6, None, False)
    assert Fixed.parse("fixed<8,TRN,WRAP>") == Fixed(8, None, True, "TRN", "WRAP")
    assert str(Fixed(8, 3)) == "fixed<8,3,RND,SAT>"


@pytest.mark.parametrize(
    "text",
    [
        "", "fixed", "fixed<>", "fixed<0,0>", "fixed<65,3>", "ufixed<64,3>", "fixed<8,3,RND,SAT", "fixed<8,3,NEAR,SAT>",
        "fixed<8,3,RND,CLAMP>", "fixed<8,3,RND,SAT>;", "fixed<8,3.5>", "fixed<-8,3>", "fixed<8,[]>", "fixed<8,[1,]>",
        "fixed<8,9999>", "fixed<8,3>\n#include <x>", "Fixed<8,3>", "int8", "fixed<٨,3>", "fixed<8,3,SAT,RND>",
        "fixed<" + "9" * 5000 + ",3>",
    ],
)  # fmt: skip
def test_malformed_text_is_one_sentence(text: str) -> None:
    with pytest.raises(FormatError) as caught:
        Fixed.parse(text)
    assert "expected" in str(caught.value) and len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@given(st.text(max_size=40))
def test_any_text_parses_or_is_refused(text: str) -> None:
    with contextlib.suppress(EdgematError):
        assert Fixed.parse(str(Fixed.parse(text))) == Fixed.parse(text)


@pytest.mark.parametrize("value", [None, 8, b"fixed<8,3>", ["fixed<8,3>"]])
def test_what_is_no_text_is_refused(value: object) -> None:
    with pytest.raises(FormatError):
        Fixed.parse(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [(0, 1), (65, 1), (True, 1), (8.0, 1), (8, 1.5), (8, True), (8, 257), (8, ()), (8, (1, None)), (8, (1, 2.0)),
     (64, 1, False), (8, 1, True, "rnd"), (8, 1, True, "RND", "CLIP")],
)  # fmt: skip
def test_illegal_fields_are_refused(fields: tuple[object, ...]) -> None:
    with pytest.raises(FormatError, match="expected"):
        Fixed(*fields)  # type: ignore[arg-type]


def test_a_learned_point_has_no_fraction_yet() -> None:
    with pytest.raises(FormatError, match="learned"):
        _ = Fixed(8).frac_bits


def test_accumulators_are_as_narrow_as_possible() -> None:
    for lo, hi, width, signed in [(0, 0, 1, False), (0, 255, 8, False), (-1, 0, 1, True), (-128, 127, 8, True),
                                  (-129, 0, 9, True), (-1, 128, 9, True), (3, 4, 3, False)]:  # fmt: skip
        fmt = formats.accumulator(lo, hi, (3,))
        assert (fmt.width, fmt.signed, fmt.frac_bits) == (width, signed, 3)
        assert fmt.holds(lo, hi)
    assert formats.accumulator(-(2**63), 2**63 - 1, (0,)).width == 64
    with pytest.raises(FormatError, match="65 bits"):
        formats.accumulator(-(2**63) - 1, 0, (0,))
    assert formats.accumulator(-4, 4, (1, 2, 1)).fracs == (1, 2, 1)
    assert formats.accumulator(-4, 4, (2, 2, 2)).fracs == (2,)
