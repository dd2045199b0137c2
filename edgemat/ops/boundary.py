"""Quantize, Dequantize, Constant and Requantize: where values become codes, codes values, and formats narrower."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgemat import formats
from edgemat.body import Body, Coded
from edgemat.op import REAL, Attr, Call, Native, Op, Result, emit_requantize


class Quantize(Op):
    """``y = quantize(float32(x))`` into `y_format`: round, then overflow; infinities saturate.

    ``limit`` states the largest code that an index may have, in an unsigned format; the codes above saturate at it. A
    reader with edgemat refuses such an input instead of computing something for it.
    """

    name = "Quantize"
    stem = "quantize"
    attributes = {"y_format": Attr(str), "limit": Attr(int, None, optional=True, late=True)}

    def infer(self, call: Call) -> tuple[Result, ...]:
        fmt, limit = call.format_attr("y_format"), call.attrs["limit"]
        low, high = fmt.rails
        if limit is not None and (fmt.signed or fmt.per_channel or fmt.overflow != "SAT" or not 0 <= limit < high):
            raise call.refuse(f"the limit {limit} for {fmt}", "expected an index below the rail of an unsigned format")
        return (Result(call.x[0].shape, fmt, low, high if limit is None else limit),)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        codes = formats.quantize(np.asarray(x[0], dtype=np.float32), call.exact[0].format)
        return codes if call.attrs["limit"] is None else np.minimum(codes, call.attrs["limit"])

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
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
    """``y = code * 2**-frac_bits``: float32 up to 24 bits, float64 beyond."""

    name = "Dequantize"
    stem = "dequantize"
    keeps_channels = True

    def infer(self, call: Call) -> tuple[Result, ...]:
        return (Result(call.x[0].shape, REAL, 0, 0),)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        return formats.dequantize(x[0], call.x[0].format)

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        fmt = call.x[0].format
        value = body.cast(x[0], np.float64)
        factors = np.ldexp(1.0, -formats.channel_array(fmt.fracs, len(call.x[0].shape)))
        return body.cast(body.scale(value, factors), np.float32 if fmt.width <= 24 else np.float64)

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
