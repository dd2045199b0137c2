"""Linear: ``y = x @ w.T + b`` over the last axis, as an exact integer sum.

Codes add up on the grid ``frac_x + frac_w`` (per output channel); the bias is an integer on that grid. Inputs of rank 3
and more keep their leading axes; there the output channels lie on the last axis, so per-channel weights are brought to
the finest grid first (weights shifted left: exact). Native kernels keep trits as they are there, and shift the finished
sums instead, in the epilogue: ``round(2**l * s * 2**-e) = round(s * 2**(l - e))``. Inputs of rank 2 may have a binary
point and a width for each feature: weights are shifted left to the grid of the finest feature, and those of features
that are always 0 left out.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgemat.body import Body, Coded
from edgemat.codes import Codes
from edgemat.formats import accumulator, holds_codes, uniform
from edgemat.op import Attr, Bounds, Call, Cost, Epilogue, Native, Op, Result, Tensor
from edgemat.ops.accumulation import (
    emit_matmul,
    emit_shifted_weights,
    exact_matmul,
    input_shifts,
    shifted_weights,
    stored_bounds,
    sum_bounds,
    term_bounds,
)
from edgemat.ops.bit_operations import channel_bits, constant_bits, operand_bits
from edgemat.ops.cases import constant, random_codes, tensor
from edgemat.ops.shift_add import KHOT_ATTRIBUTE, check_digits, digit_params, khot_cases, without_multiplies
from edgemat.ops.stated_accumulator import ACCUMULATOR, prove


def weight_fracs(call: Call, channels: int, key: str = "w_format") -> np.ndarray:
    """Fractional bits of the weights by output channel."""
    fracs = call.format_attr(key).fracs
    if len(fracs) not in (1, channels):
        raise call.refuse(f"{len(fracs)} binary points in {key}", f"expected 1 or {channels}")
    return np.broadcast_to(np.asarray(fracs, dtype=np.int64), (channels,))


def check_weights(call: Call, biased: bool) -> None:
    """Weights are constants inside `w_format`; the bias lies on the accumulator's grid and fits 32 bits."""
    stored = plain_stored(call)
    if stored is not None:
        fmt = call.format_attr("w_format")
        lo, hi = stored.survey.lo, stored.survey.hi
        if not (fmt.min_code <= lo and hi <= fmt.max_code):
            raise call.refuse(f"weight codes {lo} to {hi} do not fit {fmt}", "retrain or widen the weights' format")
        if biased:
            check_bias(call, stored.shape[0])
        return
    codes = call.constant(1)
    if codes is None:
        raise call.refuse("its weights are not an initializer", "only constant weights can be deployed")
    if codes.size == 0:
        raise call.refuse(f"its weights have shape {codes.shape}", "every axis needs at least one element")
    fmt = call.format_attr("w_format")
    lo, hi = int(codes.min()), int(codes.max())
    special = fmt.widths is not None or fmt.bipolar
    rows = by_output(call, codes) if special else codes
    if fmt.widths is not None and len(fmt.widths) not in (1, len(rows)):
        raise call.refuse(f"{len(fmt.widths)} widths in w_format", f"expected 1 or {len(rows)}")
    if not (holds_codes(rows, fmt, 0) if special else fmt.min_code <= lo and hi <= fmt.max_code):
        raise call.refuse(f"weight codes {lo} to {hi} do not fit {fmt}", "retrain or widen the weights' format")
    check_digits(call, codes)
    if not biased:
        return
    outputs = codes.shape[0]
    if call.op.name == "ConvTranspose":
        outputs = codes.shape[1] * call.attrs["groups"] if codes.ndim > 1 else 0
    check_bias(call, outputs)


def plain_stored(call: Call) -> Codes | None:
    """The weights of a Linear that stay in their file, where their interval and row sums say all that is asked of them:
    one width, no digits stated, multiplied by codes of one binary point as they are."""
    stored = call.stored(1)
    if stored is None or call.op.name != "Linear" or stored.ndim != 2 or call.attrs.get("khot") is not None:
        return None
    fmt, x = call.format_attr("w_format"), call.x[0]
    if fmt.bipolar or fmt.widths is not None or x.format.per_channel:
        return None
    if len(x.shape) > 2 and len(uniform(fmt.fracs)) > 1:
        return None
    return stored


def check_bias(call: Call, outputs: int) -> None:
    """A bias is constant and has one code of 32 bits for each output."""
    bias = call.constant(2)
    if bias is None:
        raise call.refuse("its bias is not an initializer", "only constant biases can be deployed")
    if bias.shape != (outputs,):
        raise call.refuse(f"a bias of shape {bias.shape} for {outputs} outputs", "expected one code per output")
    if int(bias.min()) < -(1 << 31) or int(bias.max()) >= 1 << 31:
        raise call.refuse("a bias code needs more than 32 bits", "narrow the input's or the weights' fraction")


def by_output(call: Call, codes: np.ndarray) -> np.ndarray:
    """Weights with their output channels on axis 0, and on axis 1 the inputs of one group."""
    if call.op.name != "ConvTranspose":
        return codes
    groups = call.attrs["groups"]
    if codes.ndim < 2 or groups < 1 or codes.shape[0] % groups:
        raise call.refuse(f"weights {codes.shape} in {groups} groups", "expected [inputs, outputs / groups, ...]")
    split = codes.reshape(groups, codes.shape[0] // groups, *codes.shape[1:])
    return np.swapaxes(split, 1, 2).reshape(groups * codes.shape[1], codes.shape[0] // groups, *codes.shape[2:])


def shift_limit(weights: np.ndarray) -> int:
    """How far weights may be shifted left within 62 bits."""
    return 62 - int(np.abs(weights).max()).bit_length()


class Linear(Op):
    """Fully connected layer; inputs x [N, ..., I], w [O, I], b [O] (optional)."""

    name = "Linear"
    stem = "linear"
    arity = (2, 3)
    attributes = {"w_format": Attr(str), "b_format": Attr(str, "", optional=True), **KHOT_ATTRIBUTE, **ACCUMULATOR}
    has_epilogue = True

    def takes_channels(self, tensor: Tensor) -> bool:
        return len(tensor.shape) == 2

    def _shifts(self, call: Call) -> np.ndarray | None:
        """Left shifts of the weights, broadcasting against [O, I] (-1: left out), or None."""
        check_weights(call, len(call.x) > 2)
        w = call.constant(1)
        assert w is not None
        if len(call.x[0].shape) < 3:
            shifts = input_shifts(call, shift_limit(w)) if call.x[0].shape[-1] == w.shape[-1] else None
            return None if shifts is None else shifts[None, :]
        fracs = weight_fracs(call, w.shape[0])
        return (fracs.max() - fracs)[:, None] if len(set(fracs.tolist())) > 1 else None

    def aligned(self, call: Call) -> tuple[np.ndarray, np.ndarray | None]:
        """Weights and bias that multiply input codes as they are: on the grid of the finest input channel."""
        return self._aligned(call)[:2]

    def _aligned(self, call: Call) -> tuple[np.ndarray, np.ndarray | None, tuple[int, ...]]:
        """Weights, bias and accumulator fractions; one common fraction where channels are not on axis 1."""
        check_weights(call, len(call.x) > 2)
        w, b = call.constant(1), call.constant(2)
        assert w is not None
        fracs = weight_fracs(call, w.shape[0]) + call.x[0].format.finest
        check_bias_grid(call, fracs)
        shifts = self._shifts(call)
        if shifts is not None:
            w = shifted_weights(w, shifts)
            if len(call.x[0].shape) > 2:
                b = None if b is None else b << shifts[:, 0]
                fracs = np.full_like(fracs, fracs.max())
        return w, b, uniform(tuple(fracs.tolist()))

    def bounds(self, call: Call) -> Bounds:
        stored = plain_stored(call)
        if stored is not None:
            fracs = self._stored_fracs(call, stored)
            return prove(call, stored_bounds(stored, call.x[0].lo, call.x[0].hi, call.constant(2)), fracs)
        w, b, fracs = self._aligned(call)
        lows, highs = call.x[0].channel_intervals()
        if lows.size > 1 and lows.size == w.shape[1]:
            return prove(call, term_bounds(w, lows, highs, b), fracs)
        return prove(call, sum_bounds(w, call.x[0].lo, call.x[0].hi, b), fracs)

    def _stored_fracs(self, call: Call, stored: Codes) -> tuple[int, ...]:
        """The accumulator's fractions where the weights stay in their file."""
        check_weights(call, len(call.x) > 2)
        fracs = weight_fracs(call, stored.shape[0]) + call.x[0].format.finest
        check_bias_grid(call, fracs)
        return uniform(tuple(fracs.tolist()))

    def infer(self, call: Call) -> tuple[Result, ...]:
        x = call.x[0]
        stored = plain_stored(call)
        if stored is not None:
            shape, fracs = stored.shape, self._stored_fracs(call, stored)
        else:
            w, _, fracs = self._aligned(call)
            shape = w.shape
        if len(x.shape) < 2 or x.shape[-1] != shape[1]:
            raise call.refuse(f"input of shape {x.shape} with weights {shape}", "the last axes must agree")
        lo, hi = call.bounds.final
        return (Result((*x.shape[:-1], shape[0]), accumulator(lo, hi, fracs), lo, hi),)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        stored = plain_stored(call)
        if stored is not None:
            rows = [exact_matmul(x[0], block.T, call.bounds.magnitude) for block in stored.blocks()]
            out, b = np.concatenate(rows, axis=-1), call.constant(2)
        else:
            w, b, _ = self._aligned(call)
            out = exact_matmul(x[0], w.T, call.bounds.magnitude)
        return out if b is None else out + b

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        stored = plain_stored(call)
        weight, bias = x[1], x[2] if len(x) > 2 else None
        data = x[0]
        if integer_kernel_is_safe(call, self._aligned(call)[0] if stored is None else stored):
            product = body.op(
                "MatMulInteger",
                data.value,
                body.op("Transpose", body.cast(weight, np.int8).value, perm=[1, 0]),
            )
            acc = Coded(product, np.dtype(np.int32))
            return acc if bias is None else body.binary("Add", acc, body.cast(bias, np.int32))
        shifts = self._shifts(call) if stored is None else None
        if shifts is not None:
            weight = emit_shifted_weights(body, weight, shifts)
            if bias is not None and len(call.x[0].shape) > 2:
                bias = body.scale(body.cast(bias, np.int64), np.int64(1) << shifts[:, 0])
        weight = Coded(body.op("Transpose", weight.value, perm=[1, 0]), weight.dtype)
        acc = emit_matmul(body, call, data, weight, call.bounds.magnitude)
        return acc if bias is None else body.binary("Add", acc, body.cast(bias, acc.dtype))

    def row_major(self, call: Call) -> bool:
        return len(call.x[0].shape) > 2

    def _kernel(self, call: Call) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Weights and bias of a native kernel, and left shifts of its sums, [O] or None."""
        w, b, _ = self._aligned(call)
        own, shifts = call.constant(1), self._shifts(call)
        assert own is not None
        if len(call.x[0].shape) < 3 or shifts is None or "ternary" not in sign_params(call, own):
            return w, b, None
        return own, call.constant(2), shifts[:, 0]

    def native(self, call: Call) -> Native:
        w, b, lifts = self._kernel(call)
        rows = call.x[0].size // w.shape[1]
        params = {
            "rows": rows,
            "in_features": w.shape[1],
            "out_features": w.shape[0],
            "has_bias": int(b is not None),
            **sign_params(call, w),
            **digit_params(call),
        }
        arrays = {"weight": w} if b is None else {"weight": w, "bias": b}
        if lifts is None:
            return Native(params, arrays)
        sums = replace(sum_bounds(w, call.x[0].lo, call.x[0].hi, b), width=call.bounds.width)
        return Native(params, arrays, _lifted(call, lifts), sums)

    def cost(self, call: Call) -> Cost:
        w, b, _ = self._kernel(call)
        rows = call.x[0].size // w.shape[1]
        bits = w.size * call.format_attr("w_format").width + (0 if b is None else 32 * b.size)
        operand = channel_bits(call.x[0]) if len(call.x[0].shape) == 2 else operand_bits(call.x[0])
        signs = bool(sign_params(call, w))
        work = 0 if signs else w.size * rows, (sign_additions(w) if signs else w.size) * rows
        cost = Cost(*work, bits, rows * int((constant_bits(w) * operand).sum()))
        return without_multiplies(call, cost, w, rows)

    def cases(self) -> list[Call]:
        made = []
        shapes = [(1, 1), (3, 7), (16, 33), (5, 64)]
        for index, (outs, ins) in enumerate(shapes):
            for x_fmt, w_fmt in (
                ("fixed<8,3>", "fixed<6,0>"),
                ("ufixed<8,8>", "fixed<8,1>"),
                ("fixed<16,4>", "fixed<12,2>"),
            ):
                w = constant(w_fmt, random_codes(w_fmt, (outs, ins), index))
                b = constant("fixed<16,8>", random_codes("fixed<10,0>", (outs,), index + 9), "b")
                for requantize in ("", "fixed<8,4>", "ufixed<6,5,RND_CONV,SAT>"):
                    attrs = {"w_format": w_fmt, "requantize": requantize}
                    x = tensor(x_fmt, (None, ins))
                    made.append(Call(self, f"{outs}x{ins}_{x_fmt}_{requantize}", [x, w[0]], attrs, {1: w[1]}))
                    made.append(
                        Call(
                            self,
                            f"b{outs}x{ins}_{x_fmt}_{requantize}",
                            [x, w[0], b[0]],
                            attrs,
                            {1: w[1], 2: b[1]},
                        )
                    )
        w = constant("fixed<6,[1,0,-2]>", random_codes("fixed<6,0>", (3, 5), 3))
        per_channel = {"w_format": "fixed<6,[1,0,-2]>"}
        made.append(Call(self, "channels", [tensor("fixed<8,3>", (None, 5)), w[0]], per_channel, {1: w[1]}))
        made.append(
            Call(
                self,
                "channels_requantized",
                [tensor("fixed<8,3>", (None, 5)), w[0]],
                {**per_channel, "requantize": "fixed<8,4,TRN,WRAP>"},
                {1: w[1]},
            )
        )
        made.append(Call(self, "rank3", [tensor("fixed<8,3>", (None, 4, 5)), w[0]], per_channel, {1: w[1]}))
        b = constant("fixed<16,8>", random_codes("fixed<10,0>", (3,), 4), "b")
        for x_fmt in ("fixed<8,[3,2,9,0,-1]>", "fixed<[6,3,0,1,8],[1,2,30,1,8]>", "ufixed<[2,0,5,1,3],1>", "bipolar"):
            x = tensor(x_fmt, (None, 5))
            made.append(Call(self, f"inputs_{x_fmt}", [x, w[0], b[0]], per_channel, {1: w[1], 2: b[1]}))
            attrs = {**per_channel, "requantize": "fixed<[6,0,4],[5,1,2],RND_CONV,SAT>"}
            made.append(Call(self, f"narrow_{x_fmt}", [x, w[0], b[0]], attrs, {1: w[1], 2: b[1]}))
        codes = random_codes("fixed<6,0>", (3, 5), 8) >> np.array([[0], [3], [6]])
        codes[2] = 0
        w = constant("fixed<[6,3,0],[1,0,2]>", codes)
        attrs = {"w_format": "fixed<[6,3,0],[1,0,2]>", "requantize": "bipolar"}
        made.append(Call(self, "pruned", [tensor("fixed<8,3>", (None, 5)), w[0]], attrs, {1: w[1]}))
        w = constant("bipolar", np.where(random_codes("fixed<6,0>", (3, 5), 9) < 0, -1, 1))
        made += self._stated()
        made.append(Call(self, "signs", [tensor("bipolar", (None, 5)), w[0]], {"w_format": "bipolar"}, {1: w[1]}))
        return [*made, *self._ternary(), *khot_cases(made)]

    def _ternary(self) -> list[Call]:
        """Weights -1, 0 and +1: with and without bias, one scale or one per output, rails and ties behind them."""
        made = []
        for index, (outs, ins, x_fmt, requantize) in enumerate(
            (
                (1, 1, "fixed<8,3>", ""),
                (3, 7, "ufixed<8,8>", "fixed<6,8>"),
                (5, 64, "fixed<8,1>", "ufixed<8,4,RND_CONV,SAT>"),
                (16, 33, "fixed<4,4>", "fixed<6,7,TRN,WRAP>"),
                (8, 40, "fixed<16,4>", "fixed<8,6>"),
                (4, 5, "fixed<8,[3,2,9,0,-1]>", "fixed<8,4>"),
                (4, 21, "bipolar", "bipolar"),
            )
        ):
            for points in ("0", "[" + ",".join(str(2 - o % 3) for o in range(outs)) + "]"):
                w_fmt = f"fixed<2,{points},RND,SAT_SYM>"
                w = constant("fixed<2,0,RND,SAT_SYM>", random_codes("fixed<2,0,RND,SAT_SYM>", (outs, ins), 40 + index))
                b = constant("fixed<10,0>", random_codes("fixed<10,0>", (outs,), 50 + index), "b")
                attrs = {"w_format": w_fmt, "requantize": requantize}
                x = tensor(x_fmt, (None, ins))
                made.append(Call(self, f"ternary{index}_{points}", [x, w[0]], attrs, {1: w[1]}))
                made.append(Call(self, f"ternary{index}_{points}_b", [x, w[0], b[0]], attrs, {1: w[1], 2: b[1]}))
        w = constant("fixed<2,0,RND,SAT_SYM>", np.array([[1, 0, -1], [0, 0, 0]]))
        attrs = {"w_format": "fixed<2,0,RND,SAT_SYM>", "requantize": "fixed<6,8>"}
        made.append(Call(self, "ternary_rank3", [tensor("fixed<8,8>", (None, 4, 3)), w[0]], attrs, {1: w[1]}))
        w_fmt = "fixed<2,[1,3,-4,2,1],RND,SAT_SYM>"
        w = constant(w_fmt, random_codes("fixed<2,0,RND,SAT_SYM>", (5, 21), 60))
        b = constant("fixed<10,0>", random_codes("fixed<10,0>", (5,), 61), "b")
        for requantize in ("", "fixed<8,9>", "fixed<6,3,RND_CONV,WRAP>", "ufixed<24,12,TRN_ZERO,SAT>", "bipolar"):
            attrs = {"w_format": w_fmt, "requantize": requantize}
            x = tensor("fixed<8,4>", (None, 3, 21))
            made.append(Call(self, f"ternary_rows_{requantize}", [x, w[0]], attrs, {1: w[1]}))
            made.append(Call(self, f"ternary_rows_{requantize}_b", [x, w[0], b[0]], attrs, {1: w[1], 2: b[1]}))
        return made

    def _stated(self) -> list[Call]:
        """Sums whose accumulator is stated: as narrow as they allow, with room, and beyond 16 bits."""
        made = []
        for x_fmt, w_codes, stated, requantize in (
            ("ufixed<4,4>", [[7, -8, 0, 3], [-7, 7, 1, -5]], "fixed<9,[9,7],TRN,WRAP>", "fixed<6,5>"),
            ("fixed<4,1>", [[7, -8, 0, 3], [-7, 7, 1, -5]], "fixed<16,[13,11],TRN,WRAP>", "ufixed<16,6>"),
            ("ufixed<8,8>", [[7, -8, 7, 7], [-7, -7, 1, -5]], "fixed<17,[17,15],TRN,WRAP>", ""),
        ):
            w_fmt = "fixed<4,[4,2]>"
            w = constant(w_fmt, np.array(w_codes))
            b = constant("fixed<8,8>", np.array([60, -60]), "b")
            attrs = {"w_format": w_fmt, "accumulator": stated, "requantize": requantize}
            x = tensor(x_fmt, (None, 4))
            made.append(Call(self, f"stated_{stated}", [x, w[0], b[0]], attrs, {1: w[1], 2: b[1]}))
        return made


def sign_params(call: Call, w: np.ndarray) -> dict[str, int | tuple[int, ...]]:
    """``{"bipolar": 1}`` or ``{"ternary": 1}`` for native kernels: every weight is -1 or +1, or one of -1, 0 and +1, by
    its format, so that there are signs and no products.

    Weights shifted to the finest of several grids are no longer signs, and digits that are stated (``khot``) go first.
    """
    fmt, codes = call.format_attr("w_format"), np.abs(w)
    if fmt.bipolar and bool((codes == 1).all()):
        return {"bipolar": 1}
    if fmt.ternary and call.attrs.get("khot") is None and bool((codes <= 1).all()):
        return {"ternary": 1}
    return {}


def _lifted(call: Call, lifts: np.ndarray) -> Epilogue:
    """The epilogue of sums that stand for themselves times ``2**lifts``, channel by channel."""
    given = call.epilogue
    if given is None:  # the exact code: it fits, so nothing is rounded or wraps
        exact = replace(call.exact[0].format, rounding="TRN", overflow="WRAP")
        return Epilogue(uniform(tuple((-lifts).tolist())), exact)
    if given.format.bipolar:
        return given
    return replace(given, shift=uniform(tuple((given.shift[0] - lifts).tolist())))


def sign_additions(w: np.ndarray) -> int:
    """Additions and subtractions that weights of -1, 0 and +1 ask for: one for each that is not 0."""
    return int(np.count_nonzero(w))


def check_bias_grid(call: Call, fracs: np.ndarray) -> None:
    """Refuses a bias whose stated format is not on the accumulator's grid."""
    if not call.attrs.get("b_format"):
        return
    stated = call.format_attr("b_format").fracs
    if uniform(stated) != uniform(tuple(int(f) for f in fracs)):
        raise call.refuse(
            f"its bias has {uniform(stated)} fractional bits, the accumulator {uniform(tuple(fracs.tolist()))}",
            "put the bias on the grid frac_x + frac_w",
        )


def integer_kernel_is_safe(call: Call, weights: np.ndarray | Codes) -> bool:
    """Whether MatMulInteger of u8 x s8 is exact on every x86 CPU.

    Without VNNI its kernel adds pairs of products in saturating 16-bit arithmetic, so the largest code times the two
    largest weights of a row must stay within 32767 (docs/numerics.md, section 4).
    """
    x = call.x[0]
    fmt = call.format_attr("w_format")
    if x.dtype != np.uint8 or fmt.width > 8 or not fmt.signed:
        return False
    if weights is not call.constants.held[1] or call.bounds.magnitude >= 1 << 31:
        return False
    if isinstance(weights, Codes):
        return weights.survey.pair * x.hi <= 32767
    top = np.sort(np.abs(weights), axis=1)[:, -2:].sum(axis=1)
    return int(top.max()) * x.hi <= 32767
