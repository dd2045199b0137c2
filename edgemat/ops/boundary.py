"""Quantize, Dequantize, Constant and Requantize: where values become codes, codes values, and formats narrower.

``scale`` is the real scale of a tensor that another tool quantised: the text `float.hex` gives for a positive float32.
Its codes are plain integers, ``value = code * scale``, in the float32 arithmetic of ONNX's QuantizeLinear and
DequantizeLinear. Quantize then rounds half to even and saturates, at ``low`` and ``high`` where they are stated. Its
codes lie within `MAX_SCALED`, so that ``code * scale``, rounded to float32, always comes back as that code.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgemat import formats
from edgemat.body import Body, Coded
from edgemat.op import REAL, Attr, Call, Native, Op, Result, emit_requantize

MAX_SCALED = 1 << 22
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
SCALE = {"scale": Attr(str, "", optional=True, late=True)}


def real_scale(call: Call) -> np.float32 | None:
    """The real scale that a Quantize or a Dequantize states, or None.

    Raises:
        LoweringError: if it is not the text of a positive, normal float32.
    """
    text = call.attrs["scale"]
    if not text:
        return None
    try:
        value = float.fromhex(text)
    except (ValueError, OverflowError):
        value = np.nan
    fits = SMALLEST <= value <= LARGEST and float(np.float32(value)) == value
    if not fits or value.hex() != text:
        raise call.refuse(
            f"the scale {text[:40]!r}", "expected a positive, normal float32 as Python's float.hex() writes it"
        )
    return np.float32(value)


def check_reach(call: Call, scale: np.float32, *codes: int) -> None:
    """Refuses a scale whose products with codes leave float32."""
    largest = max(abs(code) for code in codes)
    if largest * float(scale) > LARGEST:
        raise call.refuse(f"the scale {scale} for codes up to {largest}", "their values must be finite float32")


class Quantize(Op):
    """``y = quantize(float32(x))`` into `y_format`: round, then overflow; infinities saturate.

    ``limit`` states the largest code that an index may have, in an unsigned format; the codes above saturate at it. A
    reader with edgemat refuses such an input instead of computing something for it.

    With ``scale``, in float32: ``y = clip(round_half_even(x / scale), low, high)``.
    """

    name = "Quantize"
    stem = "quantize"
    attributes = {
        "y_format": Attr(str),
        "limit": Attr(int, None, optional=True, late=True),
        **SCALE,
        "low": Attr(int, None, optional=True, late=True),
        "high": Attr(int, None, optional=True, late=True),
    }

    def _scaled_rails(self, call: Call) -> tuple[int, int]:
        """The smallest and the largest code of a Quantize with a scale."""
        fmt, (low, high) = call.format_attr("y_format"), (call.attrs["low"], call.attrs["high"])
        if fmt.per_channel or fmt.fracs != (0,) or (fmt.rounding, fmt.overflow) != ("RND_CONV", "SAT"):
            raise call.refuse(f"a scale for {fmt}", "expected plain integers, as in fixed<8,8,RND_CONV,SAT>")
        if call.attrs["limit"] is not None:
            raise call.refuse("both a limit and a scale", "an index has no scale")
        low, high = fmt.min_code if low is None else low, fmt.max_code if high is None else high
        bottom, top = max(fmt.min_code, -MAX_SCALED), min(fmt.max_code, MAX_SCALED)
        if not bottom <= low <= high <= top:
            raise call.refuse(f"codes {low} to {high}", f"expected low <= high within {bottom} to {top} for {fmt}")
        return low, high

    def infer(self, call: Call) -> tuple[Result, ...]:
        fmt, limit = call.format_attr("y_format"), call.attrs["limit"]
        scale = real_scale(call)
        if scale is not None:
            low, high = self._scaled_rails(call)
            check_reach(call, scale, low, high)
            return (Result(call.x[0].shape, fmt, low, high),)
        if call.attrs["low"] is not None or call.attrs["high"] is not None:
            raise call.refuse("low or high without a scale", "leave them out: the format's rails hold")
        low, high = fmt.rails
        if limit is not None and (fmt.signed or fmt.per_channel or fmt.overflow != "SAT" or not 0 <= limit < high):
            raise call.refuse(f"the limit {limit} for {fmt}", "expected an index below the rail of an unsigned format")
        return (Result(call.x[0].shape, fmt, low, high if limit is None else limit),)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        values, scale = np.asarray(x[0], dtype=np.float32), real_scale(call)
        if scale is not None:
            with np.errstate(over="ignore"):
                rounded = np.rint(values / scale)
            return np.clip(rounded, call.exact[0].lo, call.exact[0].hi).astype(np.int64)
        codes = formats.quantize(values, call.exact[0].format)
        return codes if call.attrs["limit"] is None else np.minimum(codes, call.attrs["limit"])

    def values(self, call: Call, codes: np.ndarray) -> np.ndarray:
        """float32 values that become these codes of the output."""
        scale = real_scale(call)
        if scale is not None:
            return codes.astype(np.float32) * scale
        return formats.dequantize(codes, call.exact[0].format).astype(np.float32)

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        scale = real_scale(call)
        if scale is not None:
            value = body.cast(x[0], np.float32)
            value = body.unary("Round", body.binary("Div", value, body.number(scale, value)))
            return body.clip(value, call.exact[0].lo, call.exact[0].hi)
        codes = self._rounded(body, call, *x)
        limit = call.attrs["limit"]
        return codes if limit is None else body.clip(codes, 0, limit)

    def _rounded(self, body: Body, call: Call, *x: Coded) -> Coded:
        fmt, ndim = call.exact[0].format, len(call.x[0].shape)
        value = body.cast(x[0], np.float64)
        if fmt.bipolar:
            return body.overflow(value, fmt, -1, 1)
        fracs = formats.channel_array(fmt.fracs, ndim)
        value = body.round(body.scale(value, np.ldexp(1.0, fracs)), fmt.rounding)
        far = 1 << 200
        if fmt.width > 53 and fmt.overflow != "WRAP":
            low, high = (formats.channel_array(rail, ndim) for rail in fmt.channel_rails())
            rail = np.dtype(np.int64)
            lowest = low.astype(np.float64)
            inside = body.binary("Max", value, body.number(lowest, value))
            over = body.op("Greater", inside.value, body.const(largest_double(high), np.float64))
            # float(low) of SAT_SYM is one below low: what equals it saturates as well.
            below = "Less" if fmt.overflow == "SAT_ZERO" else "LessOrEqual"
            under = body.op(below, value.value, body.const(lowest, np.float64))
            kept = body.op("Where", over, body.const(0.0, np.float64), inside.value)
            codes = body.cast(Coded(kept, np.dtype(np.float64)), rail)
            edge = (low, high) if fmt.overflow != "SAT_ZERO" else (0, 0)
            codes = Coded(body.op("Where", over, body.const(edge[1], rail), codes.value), rail)
            return Coded(body.op("Where", under, body.const(edge[0], rail), codes.value), rail)
        return body.overflow(value, fmt, -far, far, ndim)


def largest_double(codes: np.ndarray) -> np.ndarray:
    """The largest float64 that does not exceed each code."""
    near = codes.astype(np.float64)
    exceeds = np.array([int(value) > code for value, code in zip(near.ravel(), codes.ravel().tolist(), strict=True)])
    return np.where(exceeds.reshape(near.shape), np.nextafter(near, -np.inf), near)


class Dequantize(Op):
    """``y = code * 2**-frac_bits``: float32 up to 24 bits, float64 beyond.

    With ``scale``: ``y = float32(code) * scale``, rounded to float32.
    """

    name = "Dequantize"
    stem = "dequantize"
    attributes = SCALE
    keeps_channels = True

    def infer(self, call: Call) -> tuple[Result, ...]:
        fmt, scale = call.x[0].format, real_scale(call)
        if scale is not None:
            if fmt.per_channel or fmt.fracs != (0,):
                raise call.refuse(f"a scale for {fmt}", "expected plain integers, as in fixed<8,8,RND,SAT>")
            check_reach(call, scale, call.x[0].lo, call.x[0].hi)
        return (Result(call.x[0].shape, REAL, 0, 0),)

    def value_dtype(self, call: Call) -> np.dtype:
        """Type of the values."""
        exact = call.x[0].format.width > 24 and real_scale(call) is None
        return np.dtype(np.float64 if exact else np.float32)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        scale = real_scale(call)
        if scale is not None:
            return np.asarray(x[0]).astype(np.float32) * scale + np.float32(0)  # -0.0, of a float carrier, becomes 0
        return formats.dequantize(x[0], call.x[0].format)

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        scale = real_scale(call)
        if scale is not None:
            single = body.cast(x[0], np.float32)
            return body.binary("Mul", single, body.number(scale, single))
        value = body.cast(x[0], np.float64)
        factors = np.ldexp(1.0, -formats.channel_array(call.x[0].format.fracs, len(call.x[0].shape)))
        return body.cast(body.scale(value, factors), self.value_dtype(call))

    def body(self, call: Call) -> Body:
        body = Body()
        x = Coded(body.input("x0"), call.x[0].dtype)
        body.output(self.emit(body, call, x).value)
        return body


class Constant(Op):
    """Codes of a constant operand, given a format; readers hand the codes to the operator that uses them."""

    name = "Literal"  # onnxruntime takes every op_type "Constant", of any domain, for its own
    stem = "constant"
    attributes = {"y_format": Attr(str)}

    def infer(self, call: Call) -> tuple[Result, ...]:
        fmt = call.format_attr("y_format")
        codes = call.constant(0)
        if codes is None:
            raise call.refuse("its input is not an initializer", "expected constant codes")
        lo, hi = int(codes.min()), int(codes.max())
        if not formats.holds_codes(codes, fmt):
            raise call.refuse(f"codes {lo} to {hi} do not fit {fmt}", "give the constant a wider format")
        return (Result(call.x[0].shape, fmt, lo, hi),)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        return np.asarray(x[0], dtype=np.int64)

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        return body.cast(x[0], call.y[0].dtype)


class Requantize(Op):
    """Round and overflow into another format: the one operator that may lose bits."""

    name = "Requantize"
    stem = "requantize"
    has_epilogue = True
    keeps_channels = True

    def infer(self, call: Call) -> tuple[Result, ...]:
        if not call.attrs.get("requantize"):
            raise call.refuse("no target format", "give the attribute 'requantize'")
        x = call.x[0]
        return (Result(x.shape, x.format, x.lo, x.hi),)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        return np.asarray(x[0], dtype=np.int64)

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        return x[0]

    def native(self, call: Call) -> Native:
        return Native({"size": call.x[0].size})

    def cases(self) -> list[Call]:
        from edgemat.ops.cases import tensor

        made = []
        for rounding in formats.ROUNDINGS:
            for overflow in formats.OVERFLOWS:
                for target in ("fixed<4,2>", "ufixed<4,3>", "fixed<8,-2>", "fixed<12,6>"):
                    fmt = replace(formats.Fixed.parse(target), rounding=rounding, overflow=overflow)
                    name = f"{rounding}_{overflow}_{target}"
                    made.append(Call(self, name, [tensor("fixed<8,4>", (None, 6))], {"requantize": str(fmt)}))
        wide = tensor("fixed<40,20>", (None, 5))
        made.append(Call(self, "wide", [wide], {"requantize": "fixed<16,8,RND_CONV,SAT>"}))
        shape = (None, 3, 2, 2)
        made.append(Call(self, "channels", [tensor("fixed<10,[4,5,6]>", shape)], {"requantize": "fixed<8,4>"}))
        mixed, channels = "fixed<[9,0,5],[4,3,-2]>", (("fixed<10,4>", "mixed"), ("fixed<40,20>", "mixed_wide"))
        for rounding in formats.ROUNDINGS:
            for source, name in channels:
                target = str(replace(formats.Fixed.parse("fixed<[8,3,0],[4,1,3]>"), rounding=rounding))
                made.append(Call(self, f"{name}_{rounding}", [tensor(source, shape)], {"requantize": target}))
        for source, target in (
            (mixed, "fixed<8,4>"),
            (mixed, "ufixed<[2,6,1],[1,7,0],RND_CONV,SAT>"),
            (mixed, "fixed<[2,6,1],[1,7,0],TRN,SAT_SYM>"),
            ("ufixed<[3,1,0],[3,2,9]>", "fixed<[6,7,1],[6,2,1],RND_ZERO,SAT>"),
            (mixed, "fixed<6,2,RND_INF,WRAP>"),
            ("bipolar", "fixed<[2,1,0],[2,1,0]>"),
            (mixed, "bipolar"),
            ("fixed<10,[4,5,-6]>", "bipolar"),
        ):
            made.append(Call(self, f"{source}_{target}", [tensor(source, shape)], {"requantize": target}))
        for source in ("fixed<8,4>", "ufixed<3,9>", "fixed<40,20>", "fixed<1,-3>", "bipolar"):
            made.append(Call(self, f"sign_{source}", [tensor(source, (None, 7))], {"requantize": "bipolar"}))
        for target in ("fixed<8,3>", "fixed<1,1>", "ufixed<4,2>"):
            made.append(Call(self, f"bipolar_{target}", [tensor("bipolar", (None, 6))], {"requantize": target}))
        return made


__all__ = ["Constant", "Dequantize", "Quantize", "Requantize", "emit_requantize"]
