"""FixedQuantizer against exact rational arithmetic: every mode, every code, ties, traps; gradients against the
formulas."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import edgemat
from edgemat.errors import FormatError
from edgemat.formats import OVERFLOWS, ROUNDINGS, Fixed, quantize
from edgemat.nn import FixedQuantizer
from edgemat.nn.rounding import power_of_two, range_frac, round_doubled_

LN2 = math.log(2.0)
BELOW_HALF = float(np.nextafter(np.float32(0.5), np.float32(0.0)))
ABOVE_HALF = float(np.nextafter(np.float32(0.5), np.float32(1.0)))


def exact_round(v: Fraction, mode: str) -> int:
    """The seven modes, straight from their definitions."""
    floor = v.numerator // v.denominator
    rest = v - floor
    half = Fraction(1, 2)
    up = {
        "TRN": False,
        "TRN_ZERO": v < 0 and rest > 0,
        "RND": rest >= half,
        "RND_MIN_INF": rest > half,
        "RND_ZERO": rest > half or (rest == half and v < 0),
        "RND_INF": rest > half or (rest == half and v > 0),
        "RND_CONV": rest > half or (rest == half and floor % 2 == 1),
    }[mode]
    return floor + int(up)


def exact_code(value: float, fmt: Fixed) -> int:
    """The code of a value, by rationals."""
    code = exact_round(Fraction(value) * Fraction(2) ** fmt.fracs[0], fmt.rounding)
    low, high = fmt.rails
    if low <= code <= high:
        return code
    if fmt.overflow == "SAT_ZERO":
        return 0
    if fmt.overflow == "WRAP":
        return (code - fmt.min_code) % (1 << fmt.width) + fmt.min_code
    return low if code < low else high


def codes(quantizer: FixedQuantizer, values: list[float]) -> list[int]:
    """Codes of values, in eval mode."""
    y = quantizer.eval()(torch.tensor(values))
    return quantizer.codes(y).tolist()


def probes(fmt: Fixed) -> list[float]:
    """Quarter steps well beyond the rails, and both neighbours of every tie near zero, as float32."""
    scale = 2.0 ** -fmt.fracs[0]
    span = range(4 * (fmt.min_code - 3), 4 * (fmt.max_code + 3) + 1)
    values = [np.float32(k * scale / 4) for k in span]
    for tie in np.arange(-3.5, 4, 0.5):
        for toward in (-np.inf, np.inf):
            values.append(np.float32(np.nextafter(np.float32(tie), np.float32(toward)) * np.float32(scale)))
    return [float(v) for v in values]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("signed", [True, False])
def test_every_code_of_small_widths(rounding: str, overflow: str, signed: bool) -> None:
    for width, int_bits in ((1, 1), (2, 0), (3, 5), (5, 2), (8, -3), (10, 4)):
        fmt = Fixed(width, int_bits, signed, rounding, overflow)
        values = probes(fmt)
        found = codes(FixedQuantizer(fmt), values)
        assert found == [exact_code(v, fmt) for v in values], fmt
        assert found == quantize(np.array(values, np.float32), fmt).tolist(), fmt


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_per_channel_equals_per_tensor(rounding: str) -> None:
    fracs = (-2, 0, 3)
    per_channel = FixedQuantizer(Fixed(5, tuple(5 - f for f in fracs), True, rounding, "SAT"), axis=1).eval()
    x = torch.randn(4, 3, 6) * 8
    y = per_channel(x)
    for index, frac in enumerate(fracs):
        one = FixedQuantizer(Fixed(5, 5 - frac, True, rounding, "SAT")).eval()
        assert torch.equal(y[:, index], one(x[:, index]))


def test_the_half_trap() -> None:
    fmt = Fixed(8, 8)
    assert codes(FixedQuantizer(fmt), [BELOW_HALF, 0.5, ABOVE_HALF, -0.5, -BELOW_HALF, -ABOVE_HALF]) == [
        0,
        1,
        1,
        0,
        0,
        -1,
    ]
    # The usual formula fails here: this test would not notice a wrong implementation otherwise.
    assert math.floor(np.float32(BELOW_HALF) + np.float32(0.5)) == 1


@pytest.mark.parametrize("width", [16, 20, 22, 23, 24, 25, 31, 32])
@pytest.mark.parametrize("rounding", ["RND", "RND_CONV", "TRN_ZERO"])
def test_wide_formats(width: int, rounding: str) -> None:
    for signed in (True, False):
        fmt = Fixed(width, 3, signed, rounding, "SAT")
        generator = np.random.default_rng(width)
        values = np.concatenate(
            [generator.normal(size=500) * 3, [4, -4, 8, -8, 3.9999998, -3.9999998, 0.0, 1e30, -1e30]]
        )
        values = values.astype(np.float32)
        assert codes(FixedQuantizer(fmt), values.tolist()) == quantize(values, fmt).tolist()


def test_double_input_of_a_requantiser() -> None:
    fmt = Fixed(8, 4)
    values = torch.tensor([2.0**-5 - 2.0**-40, 2.0**-5, 2.0**-5 + 2.0**-40], dtype=torch.float64)
    quantizer = FixedQuantizer(fmt, role="requantize").eval()
    y = quantizer(values)
    assert y.dtype == torch.float32
    assert quantizer.codes(y).tolist() == [0, 1, 1]


def test_infinities_saturate() -> None:
    assert codes(FixedQuantizer(Fixed(6, 2)), [math.inf, -math.inf]) == [31, -32]


def test_power_of_two_is_exact() -> None:
    exponents = torch.arange(-120, 121)
    assert power_of_two(exponents).tolist() == [2.0**e for e in range(-120, 121)]
    assert power_of_two(exponents, torch.float64).tolist() == [2.0**e for e in range(-120, 121)]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_rounding_of_random_floats(rounding: str) -> None:
    generator = np.random.default_rng(1)
    values = (generator.normal(size=3000) * 2.0 ** generator.integers(-30, 26, 3000)).astype(np.float32)
    found = round_doubled_(torch.from_numpy(values) * 2, rounding).tolist()
    assert found == [exact_round(Fraction(float(v)), rounding) for v in values]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("overflow", ["SAT", "SAT_SYM", "SAT_ZERO"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("relu", [False, True])
def test_gradients(rounding: str, overflow: str, signed: bool, relu: bool) -> None:
    for width in (1, 2, 4):
        fmt = Fixed(width, None, signed, rounding, overflow)
        stated = Fixed(width, width - 2, signed, rounding, overflow)
        values = probes(stated)
        for channels in (None, 1):
            quantizer = FixedQuantizer(fmt, channels=channels, axis=0, relu=relu)
            quantizer.set_frac(torch.tensor([2.0]) if channels else 2.0)
            x = torch.tensor([values], requires_grad=True)
            g = torch.randn(1, len(values), generator=torch.Generator().manual_seed(0))
            y = quantizer(x)
            y.backward(g)
            low, high = fmt.rails
            dx, df = [], 0.0
            for value, v, gradient in zip(values, y[0].tolist(), g[0].tolist(), strict=True):
                rectified = max(value, 0.0) if relu else value
                inside = low <= exact_round(Fraction(rectified) * 4, rounding) <= high
                dx.append(gradient if inside and not (relu and value <= 0) else 0.0)
                df += gradient * LN2 * ((rectified - v) if inside else -v)
            assert x.grad is not None and x.grad[0].tolist() == dx, fmt
            assert quantizer.frac.grad is not None
            assert float(quantizer.frac.grad.sum()) == pytest.approx(df, rel=1e-4, abs=1e-4)


def test_frac_rounds_half_to_even() -> None:
    quantizer = FixedQuantizer("fixed<8>")
    for frac, expected in ((0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (2.4, 2), (2.6, 3)):
        quantizer.set_frac(frac)
        assert quantizer.exponent() == expected == int(quantizer.exponents())


def test_frac_learns_toward_the_better_point() -> None:
    torch.manual_seed(0)
    x = torch.randn(4096)
    quantizer = FixedQuantizer("fixed<4>")
    quantizer.set_frac(-1.0)
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    errors = {f: float((FixedQuantizer(Fixed(4, 4 - f))(x) - x).square().mean()) for f in range(-1, 5)}
    assert errors[quantizer.exponent()] == min(errors.values())


def test_tracked_wrap_never_wraps_in_training() -> None:
    quantizer = FixedQuantizer(Fixed(6, None, True, "RND", "WRAP")).train()
    for scale in (1.0, 7.0, 3.0):
        x = torch.randn(500) * scale
        y = quantizer(x)
        assert float((y - x).abs().max()) <= 2.0 ** -quantizer.exponent() / 2
    assert "frac" in dict(quantizer.named_buffers())
    before = quantizer.exponent()
    quantizer.eval()(torch.randn(500) * 100)
    assert quantizer.exponent() == before


def test_train_and_eval_bits_are_equal() -> None:
    for overflow in ("SAT", "SAT_SYM", "SAT_ZERO"):
        quantizer = FixedQuantizer(Fixed(6, None, True, "RND", overflow))
        quantizer.set_frac(3.0)
        x = torch.randn(1000) * 5
        assert torch.equal(quantizer.train()(x), quantizer.eval()(x))


def test_uncalibrated_is_refused_and_training_settles_it() -> None:
    quantizer = FixedQuantizer("fixed<6>").eval()
    with pytest.raises(FormatError, match="calibrate"):
        quantizer(torch.randn(3))
    quantizer.train()(torch.tensor([0.9, -0.3]))
    assert quantizer.ready and bool(quantizer.calibrated) and quantizer.exponent() == 5


def test_state_round_trip() -> None:
    quantizer = FixedQuantizer("fixed<6>")
    quantizer.set_frac(3.25)
    other = FixedQuantizer("fixed<6>")
    other.load_state_dict(quantizer.state_dict())
    assert other.ready and other.frac.item() == 3.25
    other.eval()(torch.randn(3))


def test_diverged_frac_is_refused() -> None:
    quantizer = FixedQuantizer("fixed<6>")
    quantizer.set_frac(math.nan)
    with pytest.raises(FormatError, match="learning rate"):
        quantizer(torch.randn(3))


@pytest.mark.parametrize("text", ["fixed<8>", "ufixed<6>", "fixed<5,1,TRN,SAT>", "fixed<7,1,RND_CONV,SAT_SYM>"])
def test_range_frac_is_the_finest_that_holds(text: str) -> None:
    fmt = Fixed.parse(text)
    quantizer = FixedQuantizer(Fixed(fmt.width, None, fmt.signed, fmt.rounding, fmt.overflow))
    for high in (1e-3, 0.3, 0.99, 1.0, 5.7, 1000.0):
        low = -high / 3 if fmt.signed else 0.0
        frac = range_frac(low, high, quantizer.grid)
        low_rail, high_rail = fmt.rails
        for candidate, fits in ((frac, True), (frac + 1, False)):
            ends = [
                exact_round(Fraction(float(np.float64(v))) * Fraction(2) ** candidate, fmt.rounding)
                for v in (low, high)
            ]
            assert (low_rail <= ends[0] and ends[1] <= high_rail) is fits


def test_codes_of_values() -> None:
    values = torch.tensor([[0.25, -1.5], [3.0, 2.0**-20]], dtype=torch.float64)
    assert edgemat.nn.codes(values, "fixed<32,12>").tolist() == [[1 << 18, -3 << 19], [3 << 20, 1]]
    assert edgemat.nn.codes(values[:1], "fixed<8,[6,7]>").tolist() == [[1, -3]]
    with pytest.raises(FormatError, match="grid"):
        edgemat.nn.codes(values, "fixed<32,13>")
