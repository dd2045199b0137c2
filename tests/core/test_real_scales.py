"""Boundaries with a real scale: float32 division, half to even, and the product back, on every float32 beside a tie."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from edgemat.body import Coded
from edgemat.errors import LoweringError
from edgemat.op import REAL, Call, Tensor
from edgemat.ops import BY_NAME
from edgemat.ops.boundary import MAX_SCALED
from edgemat.ops.cases import tensor
from edgemat.sim.carriers import SINGLE, FusedBody
from edgemat.sim.rewrites.quantize_input import quantize_input
from edgemat.sim.session import open_session
from tests.core.test_ops_contract import run_body

SCALES = [1.0, 0.1, 0.0078125, 0.003921569, 1 / 3, 7.3e-05, 21.7, 2.0**-126, 8.1e31, 1.9999999]
FORMATS = {
    "fixed<8,8,RND_CONV,SAT>": (None, None),
    "ufixed<8,8,RND_CONV,SAT>": (None, None),
    "fixed<9,9,RND_CONV,SAT>": (-3, 252),
    "ufixed<4,4,RND_CONV,SAT>": (1, 13),
    "fixed<16,16,RND_CONV,SAT>": (-32767, None),
    "fixed<23,23,RND_CONV,SAT>": (None, None),
}


def hexed(scale: float) -> str:
    return float(np.float32(scale)).hex()


def quantizer(fmt: str, scale: float, length: int) -> Call:
    low, high = FORMATS[fmt]
    attrs = {"y_format": fmt, "scale": hexed(scale), "low": low, "high": high}
    return Call(BY_NAME["Quantize"], "q", [Tensor("x", (None, length), REAL, 0, 0)], attrs)


def awkward(call: Call, scale: float, seed: int = 0) -> np.ndarray:
    """Multiples and halves of the scale, the nine float32 next to each, rails, subnormals, infinities: [1, n]."""
    single, (low, high) = np.float32(scale), (call.y[0].lo, call.y[0].hi)
    rng = np.random.default_rng(seed)
    codes = np.concatenate([np.arange(-40, 41), rng.integers(low, high + 1, 300), low + np.arange(-3, 4),
                            high + np.arange(-3, 4)]).astype(np.float64)  # fmt: skip
    codes = np.concatenate([codes, codes + 0.5])
    with np.errstate(over="ignore"):
        near = (codes * np.float64(single)).astype(np.float32)
        values = [near]
        for end in (-np.inf, np.inf):
            step = near
            for _ in range(4):
                step = np.nextafter(step, np.float32(end))
                values.append(step)
    odd = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-38, 3.4e38, -3.4e38, np.inf, -np.inf], np.float32)
    return np.concatenate([*values, odd])[None]


def rounded32(value: Fraction) -> float:
    """A rational rounded to float32, half to even: the definition of a division's result."""
    if value == 0:
        return 0.0
    size, exponent = abs(value), 0
    while size >= 1 << 24:
        size, exponent = size / 2, exponent + 1
    while size < 1 << 23 and exponent > -149:
        size, exponent = size * 2, exponent - 1
    whole = round(size) * Fraction(2) ** exponent
    return float("inf") * (1 if value > 0 else -1) if whole >= 1 << 128 else float(whole if value > 0 else -whole)


def oracle(value: float, scale: np.float32, low: int, high: int) -> int:
    if np.isinf(value):
        return high if value > 0 else low
    ratio = rounded32(Fraction(value) / Fraction(float(scale)))
    if np.isinf(ratio):
        return high if ratio > 0 else low
    return min(max(round(Fraction(ratio)), low), high)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_codes_are_those_of_a_float32_division(fmt: str, scale: float) -> None:
    call = quantizer(fmt, scale, 1)
    values = awkward(call, scale)
    call = quantizer(fmt, scale, values.shape[1])
    found, expected = run_body(call, call.op.body(call), [values]), call.op.reference(call, values)
    assert found.dtype == call.y[0].dtype and (found.astype(np.int64) == expected).all()
    for at in range(0, values.shape[1], 7):
        at_hand = float(values[0, at])
        assert expected[0, at] == oracle(at_hand, np.float32(scale), call.y[0].lo, call.y[0].hi), at_hand
    assert (expected.min(), expected.max()) == (call.y[0].lo, call.y[0].hi)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if "<8" in fmt or "<9" in fmt])
def test_the_simulator_quantises_into_bytes_as_the_file_does(fmt: str, scale: float) -> None:
    call = quantizer(fmt, scale, 1)
    values = awkward(call, scale)
    call = quantizer(fmt, scale, values.shape[1])
    body = FusedBody()
    made = quantize_input(body, call, Coded(body.typed_input(call.y[0], "x", SINGLE), SINGLE))
    assert made is not None and made.is_packed
    packed, coded = made.packed(), made.coded()
    body.result(Coded(packed.value, np.dtype(np.uint8)))
    body.result(coded)
    found = open_session(body.model("one"), threads=1).run(None, {"x": values})
    expected = call.op.reference(call, values)
    assert (found[0].astype(np.int64) - packed.offset == expected).all()
    assert (found[1] == expected).all()


def test_control_other_arithmetic_is_seen() -> None:
    """A reciprocal, a division in float64 or ties away from zero would differ on these very values."""
    differ = {"reciprocal": 0, "float64": 0, "ties": 0}
    for scale in SCALES[:7]:
        call = quantizer("fixed<16,16,RND_CONV,SAT>", scale, 1)
        values, single = awkward(call, scale), np.float32(scale)
        expected = call.op.reference(call, values)
        finite = np.isfinite(values) & (np.abs(values) < 1e30)
        with np.errstate(over="ignore", invalid="ignore"):
            ratio = values / single
            others = {
                "reciprocal": np.rint(values * (np.float32(1) / single)),
                "float64": np.rint(values.astype(np.float64) / np.float64(single)),
                "ties": np.floor(ratio.astype(np.float64) + 0.5),
            }
        for name, other in others.items():
            codes = np.clip(other[finite], call.y[0].lo, call.y[0].hi)
            differ[name] += int((codes != expected[finite]).sum())
    assert all(differ.values()), differ


@pytest.mark.parametrize("scale", SCALES[:7])
def test_values_come_back_as_their_codes(scale: float) -> None:
    call = quantizer("fixed<23,23,RND_CONV,SAT>", scale, 1)
    low, high = call.y[0].lo, call.y[0].hi
    assert low == -MAX_SCALED
    codes = np.concatenate([np.arange(low, low + 9999), np.arange(-9999, 9999), np.arange(high - 9999, high + 1)])
    assert (call.op.reference(call, call.op.values(call, codes)) == codes).all()


@pytest.mark.parametrize("scale", SCALES[:7])
@pytest.mark.parametrize("fmt", ["fixed<8,8>", "ufixed<16,16>", "fixed<40,40>", "bipolar"])
def test_values_are_float32_products(fmt: str, scale: float) -> None:
    x = tensor(fmt, (None, 64))
    call = Call(BY_NAME["Dequantize"], "d", [x], {"scale": hexed(scale)})
    codes = x.legal(np.random.default_rng(0).integers(x.lo, x.hi, (9, 64), endpoint=True))
    found, expected = run_body(call, call.op.body(call), [codes]), call.op.reference(call, codes)
    assert found.dtype == expected.dtype == np.float32 and (found == expected).all()
    for code, value in zip(codes[0].tolist(), expected[0].tolist(), strict=True):
        assert value == rounded32(Fraction(rounded32(Fraction(code))) * Fraction(float(np.float32(scale))))


def test_what_a_scale_cannot_mean_is_refused() -> None:
    x = Tensor("x", (None, 4), REAL, 0, 0)
    plain = "fixed<8,8,RND_CONV,SAT>"
    for attrs, word in (
        ({"scale": "0.1"}, "float.hex"),
        ({"scale": (0.1).hex()}, "float32"),
        ({"scale": (-0.5).hex()}, "positive"),
        ({"scale": (0.0).hex()}, "positive"),
        ({"scale": (2.0**-140).hex()}, "normal"),
        ({"scale": "inf"}, "positive"),
        ({"scale": "nan"}, "positive"),
        ({"scale": "0x1p99999"}, "positive"),
        ({"scale": hexed(0.1), "y_format": "fixed<8,8,RND,SAT>"}, "RND_CONV"),
        ({"scale": hexed(0.1), "y_format": "fixed<8,8,RND_CONV,WRAP>"}, "SAT"),
        ({"scale": hexed(0.1), "y_format": "fixed<8,7,RND_CONV,SAT>"}, "plain integers"),
        ({"scale": hexed(0.1), "y_format": "fixed<8,[8,7,8,8],RND_CONV,SAT>"}, "plain integers"),
        ({"scale": hexed(0.1), "y_format": "bipolar"}, "plain integers"),
        ({"scale": hexed(0.1), "y_format": "fixed<24,24,RND_CONV,SAT>"}, "within"),
        ({"scale": hexed(0.1), "low": -129}, "within"),
        ({"scale": hexed(0.1), "low": 5, "high": 4}, "low <= high"),
        ({"scale": hexed(0.1), "y_format": "ufixed<8,8,RND_CONV,SAT>", "limit": 9}, "index"),
        ({"low": -3}, "without a scale"),
    ):
        with pytest.raises(LoweringError, match=word):
            _ = Call(BY_NAME["Quantize"], "q", [x], {"y_format": plain, **attrs}).y
    with pytest.raises(LoweringError, match="finite"):
        _ = Call(BY_NAME["Quantize"], "q", [x], {"y_format": plain, "scale": hexed(3e38)}).y
    for fmt in ("fixed<8,7>", "fixed<8,[8,7,8,8]>"):
        with pytest.raises(LoweringError, match="plain integers"):
            _ = Call(BY_NAME["Dequantize"], "d", [tensor(fmt, (None, 4))], {"scale": hexed(0.1)}).y
