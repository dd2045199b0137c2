"""Two tensors that meet: Add, Sub and Mul of codes.

Where both have binary points the join is exact on codes. Real scales meet only at the quantiser behind the join: until
then it is kept as `Joined`, with the nodes that follow it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgemat.errors import LoweringError
from edgemat.foreign.chains import ORIGIN, Chain, Step
from edgemat.foreign.kernels import qlinear_add
from edgemat.foreign.quantisers import Quantiser
from edgemat.foreign.requantisers import clipped, rounded_first
from edgemat.foreign.settling import settled
from edgemat.foreign.signals import Joined, Known, Raw, Signal
from edgemat.foreign.solver import Gaps, Rounding, solve_offset
from edgemat.foreign.witness import products
from edgemat.formats import Fixed

if TYPE_CHECKING:
    from edgemat.foreign.translator import Translator


def joined(tr: Translator, node: ir.Node) -> None:
    """Add, Sub or Mul of two tensors.

    Raises:
        LoweringError: for other operators, and for operands that have no quantiser.
    """
    if node.op_type not in ("Add", "Sub", "Mul") or len(node.inputs) != 2:
        raise tr.refuse(node, "two variable inputs", "only Add, Sub and Mul join two tensors")
    if any(isinstance(tr.quantity(node, i), Raw) for i in range(2)):
        tr.signal(node, 0), tr.signal(node, 1)
    try:
        a, b = (settled(tr, node, tr.signal(node, i)) for i in range(2))
    except LoweringError:
        own = _with_itself(tr, node)
        if own is None:
            raise
        tr.set(node, own)
        return
    name = tr.label(node)
    if node.op_type == "Mul":
        factor = np.asarray(a.factor * b.factor, np.float32)
        witness = products((tr.type(a), a), (tr.type(b), b))
        tr.set(node, Signal(tr.bench.add("Mul", [a.value, b.value], {}, name), factor, witness=witness))
    elif a.exact and b.exact:
        tr.set(node, Signal(tr.bench.add(node.op_type, [a.value, b.value], {}, name), a.factor))
    else:
        tr.set(node, Joined(node, a, b))


def _with_itself(tr: Translator, node: ir.Node) -> Signal | None:
    """A tensor that meets a function of itself, as in ``x * hardsigmoid(x)``: still a function of one number."""
    a, b = tr.signal(node, 0), tr.signal(node, 1)
    same = a.value is b.value and np.array_equal(a.factor, b.factor) and a.perm == b.perm and a.zero is b.zero is None
    if not same or bool(a.chain) == bool(b.chain):
        return None
    inputs = (None, ORIGIN) if a.chain else (ORIGIN, None)
    source = a if a.chain else b
    step = Step(tr.label(node), node.op_type, {}, inputs)
    return replace(source.through(source.chain.then(step, tr.source.opset)), fused=False)


MAX_PAIRS = 1 << 20
GRID_BITS = (24, 22, 20, 18, 16, 14, 12)
"""Fractional bits, beside the quantiser's, of the grids a real sum is tried on."""


def quantise_join(tr: Translator, node: ir.Node, join: Joined, quantiser: Quantiser) -> Signal:
    """The quantiser behind a real sum: ``(m_a * a + m_b * b + k) >> s``, compared with the file on every pair of codes.

    Raises:
        LoweringError: where there are more than `MAX_PAIRS` pairs, or what follows the sum is not monotone.
    """
    name = tr.label(node)
    if quantiser.bipolar:
        raise tr.refuse(node, "the sign of a sum of tensors with real scales", "quantise the sum to 2 bits or more")
    grid = Pairs.of(tr, node, join, quantiser)
    expected = grid.expected
    # A ReLU or a Clip in the chain may keep the codes within less than the quantiser's rails.
    low, high = int(expected.min()), int(expected.max())
    best: tuple[int, int, int, list[int], Rounding] | None = None
    furthest = 0
    for bits in GRID_BITS:
        m = [int(np.rint(np.ldexp(w, bits))) for w in grid.weights]
        z = grid.sums(m)
        if np.abs(z).max() >= 1 << 31:
            continue
        separated = solve_offset(Gaps.between(z, expected, low, max(high, low + 1)), bits)
        if separated is not None:
            best = 0, bits, separated[1], m, separated[0]
            break
        offset, wrong, far = _fitted(z, expected, bits, (low, high))
        if best is None or wrong < best[0]:
            best, furthest = (wrong, bits, offset, m, Rounding("RND")), far
    if best is None:
        raise tr.refuse(node, "a real sum far larger than what its quantiser keeps", "calibrate the model again")
    wrong, bits, offset, m, rounding = best
    value = _summed(tr, join, quantiser, m, bits, offset, name)
    target = replace(quantiser.format, rounding=rounding.mode)
    stated = f"{bits}"
    if rounding.grid is not None:
        value = rounded_first(tr.bench, value, np.array([rounding.grid + target.fracs[0]]), name)
        stated += f", rounded at {rounding.grid} bits first"
    made = clipped(tr.bench, tr.bench.requantised(value, target, name), quantiser, name)
    reached = tr.bench.type(made)
    if reached.lo < low or reached.hi > high:
        made = tr.bench.add("Clip", [made], {"low": low, "high": high}, f"{name}_limits")
        made = tr.bench.requantised(made, reached.format, f"{name}_format")
    total = expected.size
    fidelity = "exact" if not wrong else f"differs for {wrong} of {total} pairs of codes, by at most {furthest}"
    tr.note(node, f"{join.node.op_type} with multipliers {m[0]} and {m[1]}, shift {stated}, on {total} pairs", fidelity)
    return Signal(made, quantiser.factor)


@dataclass(frozen=True)
class Pairs:
    """Every pair of codes two tensors can have.

    Attributes:
        a: Codes of the first, [A].
        b: Codes of the second, [B].
        weights: Levels of the quantiser that a code of each is worth, signed.
        expected: The file's own codes, int64 [A, B].
    """

    a: np.ndarray
    b: np.ndarray
    weights: tuple[float, float]
    expected: np.ndarray

    def sums(self, m: list[int]) -> np.ndarray:
        """The integer sums, [A, B]."""
        return m[0] * self.a[:, None] + m[1] * self.b[None, :]

    @classmethod
    def of(cls, tr: Translator, node: ir.Node, join: Joined, quantiser: Quantiser) -> Pairs:
        """Runs the file's nodes on every pair.

        Raises:
            LoweringError: for too many pairs, scales by channel, or steps that are not monotone.
        """
        codes, values, units = [], [], []
        for signal in (join.a, join.b):
            tensor = tr.type(signal)
            if tensor.format.per_channel or signal.factor.size > 1 or quantiser.scale.size > 1:
                raise tr.refuse(node, "a sum of tensors with scales by channel", "quantise activations by tensor")
            found = np.arange(tensor.lo, tensor.hi + 1, dtype=np.int64)
            if tensor.format.bipolar:
                found = np.array([-1, 1])
            codes.append(found)
            unit = np.ldexp(float(signal.factor), -tensor.format.fracs[0])
            units.append(unit)
            values.append(
                np.ldexp(found.astype(np.float64), -tensor.format.fracs[0]).astype(np.float32) * signal.factor
            )
        if codes[0].size * codes[1].size > MAX_PAIRS:
            raise tr.refuse(
                node,
                f"a real sum of {codes[0].size} times {codes[1].size} codes, too many to compare one by one",
                "quantise both operands to at most 10 bits, or to powers of two",
            )
        sign = -1.0 if join.node.op_type == "Sub" else 1.0
        total = values[0][:, None] + np.float32(sign) * values[1][None, :]
        chain = chain_of(tr, join)
        if (chain.sign(1) != 1).any() or chain.channels > 1:
            raise tr.refuse(node, "operators behind a real sum that are not monotone", "quantise the sum first")
        flat = chain.evaluate(total.reshape(-1, 1)).reshape(total.shape)
        slope = chain_slope(chain)
        weights = (units[0] * slope / float(quantiser.scale), sign * units[1] * slope / float(quantiser.scale))
        if quantiser.style == "stored" and not chain and join.node.op_type == "Add":
            pair = ((tr.type(join.a), join.a), (tr.type(join.b), join.b))
            return cls(codes[0], codes[1], weights, qlinear_add(*pair, quantiser))
        return cls(codes[0], codes[1], weights, quantiser(flat))


def chain_of(tr: Translator, join: Joined) -> Chain:
    """The nodes behind a join as a chain; their constants are scalars.

    Raises:
        LoweringError: for constants that are none.
    """
    chain = Chain()
    for node in join.path:
        inputs: list[np.ndarray | str | None] = []
        for value in node.inputs:
            known = None if value is None else tr.values[value]
            if value is None:
                inputs.append("")
            elif isinstance(known, Known):
                flat = known.array.reshape(-1)
                if flat.size == 0 or (flat != flat[0]).any():
                    raise tr.refuse(node, "constants by channel behind a real sum", "quantise the sum first")
                inputs.append(flat[:1].reshape(()))
            else:
                inputs.append(None)
        attributes = {key: attr.value for key, attr in node.attributes.items()}
        chain = chain.then(Step(tr.label(node), node.op_type, attributes, tuple(inputs)), tr.source.opset)
    return chain


def chain_slope(chain: Chain) -> float:
    """What a chain of scalars multiplies by where it does not clip."""
    slope = 1.0
    for step in chain.steps:
        if step.op_type == "Mul":
            slope *= float(step.constant(1 - step.position))
        elif step.op_type == "Div":
            slope /= float(step.constant(1))
    return slope


def _fitted(z: np.ndarray, expected: np.ndarray, bits: int, rails: tuple[int, int]) -> tuple[int, int, int]:
    """The offset with which ``(z + offset + half) >> bits`` is right most often, how many pairs differ, and how far."""
    half = 1 << (bits - 1)
    order = np.argsort(z, axis=None, kind="stable")
    sums, codes = z.reshape(-1)[order], expected.reshape(-1)[order]
    inside = (codes > rails[0]) & (codes < rails[1])
    # Each code inside the rails bounds the offset: code * 2**bits <= z + half + offset < (code + 1) * 2**bits.
    least = (codes << bits) - sums - half
    most = least + (1 << bits) - 1
    low = np.where(inside | (codes == rails[1]), least, np.iinfo(np.int64).min).max(initial=-(1 << 40))
    high = np.where(inside | (codes == rails[0]), most, np.iinfo(np.int64).max).min(initial=1 << 40)
    tried = {0, int(low), int(high), int((low + high) // 2)}
    scored = [(*_wrong(sums, codes, bits, offset, rails), abs(offset), offset) for offset in tried]
    wrong, far, _, offset = min(scored)
    return offset, wrong, far


def _wrong(sums: np.ndarray, codes: np.ndarray, bits: int, offset: int, rails: tuple[int, int]) -> tuple[int, int]:
    """For how many sums the codes differ, and by how much at most."""
    found = np.clip((sums + offset + (1 << (bits - 1))) >> bits, *rails)
    return int((found != codes).sum()), int(np.abs(found - codes).max(initial=0))


def _summed(
    tr: Translator, join: Joined, quantiser: Quantiser, m: list[int], bits: int, offset: int, name: str
) -> ir.Value:
    """``m_a * a + m_b * b + offset`` with `bits` fractional bits beside the quantiser's."""
    bench, scaled = tr.bench, []
    frac = bits + quantiser.format.fracs[0]
    for index, (signal, factor) in enumerate(zip((join.a, join.b), m, strict=True)):
        tensor = bench.type(signal.value)
        channels = int(tensor.shape[1] or 1)
        width = max(abs(factor).bit_length() + 1, 2)
        w_format = Fixed(width, width).with_frac(frac - tensor.format.fracs[0])
        b = np.full(channels, offset if index == 0 else 0, np.int64)
        label = f"{name}_{'ab'[index]}"
        inputs = [
            signal.value,
            bench.codes(np.full(channels, factor, np.int64), w_format, f"{label}_multiplier"),
            bench.initializer(b, np.dtype(np.int32), f"{label}_offset"),
        ]
        attrs = {"w_format": str(w_format), "b_format": str(Fixed(32, 32).with_frac(frac))}
        scaled.append(bench.add("Affine", inputs, attrs, f"{label}_scale"))
    return bench.add("Add", scaled, {}, f"{name}_sum")
