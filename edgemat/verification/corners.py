"""Corner vectors: inputs random data would hardly ever produce.

* every rail, zero, alternating rails and single steps beside them;
* for every sum that reads a network input directly (through reshapes and transposes at most), the input that drives it
  to either end of its proved interval (the other sums: `isolated`);
* samples, picked from random ones, whose accumulators lie on a tie of their requantisation or one LSB beside it.
"""

from __future__ import annotations

import numpy as np

from edgemat.lower.graph import Graph
from edgemat.op import Call
from edgemat.ops.conv import Conv, by_weight
from edgemat.ops.linear import Linear
from edgemat.sim.reference import operands, trace

MAX_EXTREMES = 64
TIE_CANDIDATES = 64


def rails(graph: Graph) -> list[dict[str, np.ndarray]]:
    """Samples at and beside the rails, by code tensor name (no batch axis)."""
    patterns = ("low", "high", "zero", "one", "minus", "alternate", "alternate_back", "low_step", "high_step", "ramp")
    made = []
    for pattern in patterns:
        sample = {}
        for name in graph.inputs:
            tensor = graph.tensors[name]
            shape, lo, hi = tensor.sample_shape, tensor.lo, tensor.hi
            index = np.arange(tensor.size, dtype=np.int64).reshape(shape)
            near = {"zero": 0, "one": 1, "minus": -1, "low": lo, "high": hi, "low_step": lo + 1, "high_step": hi - 1}
            if pattern in near:
                codes = np.full(shape, min(max(near[pattern], lo), hi))
            elif pattern == "alternate":
                codes = np.where(index % 2 == 0, lo, hi)
            elif pattern == "alternate_back":
                codes = np.where(index % 2 == 0, hi, lo)
            else:
                codes = lo + (index * max(1, (hi - lo + 1) // max(1, tensor.size))) % (hi - lo + 1)
            sample[name] = tensor.legal(codes)
        made.append(sample)
    return made


def _input_behind(graph: Graph, call: Call) -> tuple[str, list[Call]] | None:
    """The network input a call reads through pure moves of codes, and those moves."""
    writers = {node.outputs[0]: node for node in graph.nodes}
    name, moves = call.inputs[0], []
    while name not in graph.inputs:
        writer = writers.get(name)
        if writer is None or writer.op.name not in ("Reshape", "Transpose"):
            return None  # a state, or what an operator computed
        moves.append(writer)
        name = writer.inputs[0]
    return name, moves


def _driving(call: Call, weights: np.ndarray, first: int, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """Codes of the call's input that maximise one output (for Conv: of the window in the middle; its group begins at
    the input channel `first`). `lo` and `hi` belong to the channels, one entry or one for each."""
    shape = call.x[0].sample_shape
    if call.op.name == "Linear":
        return np.broadcast_to(np.where(weights > 0, hi, lo), shape)
    rank = weights.ndim - 1
    lay = (-1,) + (1,) * rank
    codes = np.broadcast_to(np.clip(0, np.minimum(lo, hi), np.maximum(lo, hi)).reshape(lay), shape).copy()
    if lo.size > 1:
        lo, hi = (end[first : first + weights.shape[0]] for end in (lo, hi))
    lo, hi = lo.reshape(lay), hi.reshape(lay)
    out = call.y[0].sample_shape[1:]
    index = [np.arange(weights.shape[0]) + first]
    keep = [np.ones(weights.shape[0], bool)]
    for axis in range(rank):
        begin = (out[axis] // 2) * call.attrs["strides"][axis] - call.attrs["pads"][axis]
        at = begin + np.arange(weights.shape[1 + axis]) * call.attrs["dilations"][axis]
        keep.append((at >= 0) & (at < shape[1 + axis]))
        index.append(at)
    chosen = np.ix_(*(i[k] for i, k in zip(index, keep, strict=True)))
    codes[chosen] = np.where(weights > 0, hi, lo)[np.ix_(*keep)]
    return codes


def reads_input(graph: Graph, call: Call) -> bool:
    """Whether a call reads a network input through pure moves of codes at most."""
    return _input_behind(graph, call) is not None


def driving_codes(call: Call, rows: int) -> list[np.ndarray]:
    """Operands of a Linear or Conv that drive its widest `rows` channels to the largest and the smallest sum.

    The channel whose sum spans the proved interval's upper end and the one that spans its lower end come first.
    """
    assert isinstance(call.op, Linear | Conv)
    weights, bias = call.op.aligned(call)
    lows, highs = call.x[0].channel_intervals()
    lo, hi = lows, highs
    if isinstance(call.op, Conv):
        if any(call.attrs["pads"]):
            lo, hi = np.minimum(lo, 0), np.maximum(hi, 0)
        lo, hi = by_weight(call, lo), by_weight(call, hi)
    shape = (weights.shape[0], -1)
    offset = 0 if bias is None else bias
    top = np.where(weights > 0, weights * hi, weights * lo).reshape(shape).sum(axis=1) + offset
    bottom = np.where(weights > 0, weights * lo, weights * hi).reshape(shape).sum(axis=1) + offset
    order = [int(top.argmax()), int(bottom.argmin()), *np.argsort(-(top - bottom), kind="stable").tolist()]
    per = weights.shape[0] // call.attrs.get("groups", 1)
    made = []
    for row in list(dict.fromkeys(order))[:rows]:
        first = (row // per) * weights.shape[1] if call.op.name == "Conv" else 0
        for low, high in ((lows, highs), (highs, lows)):
            made.append(call.x[0].legal(_driving(call, weights[row], first, low, high)))
    return made


def extremes(graph: Graph) -> list[dict[str, np.ndarray]]:
    """Samples that drive the sums next to the inputs to both ends of their proved intervals."""
    made: list[dict[str, np.ndarray]] = []
    middle = {}
    for name in graph.inputs:
        t = graph.tensors[name]
        middle[name] = t.legal(np.full(t.sample_shape, min(max(0, t.lo), t.hi)))
    for call in graph.nodes:
        found = _input_behind(graph, call) if call.op.name in ("Linear", "Conv") else None
        if found is None:
            continue
        name, moves = found
        for codes in driving_codes(call, MAX_EXTREMES // 2):
            codes = codes[None]
            for move in moves:
                if move.op.name == "Reshape":
                    codes = codes.reshape(1, *move.x[0].sample_shape)
                else:
                    codes = codes.transpose(0, *(1 + np.argsort(move.attrs["perm"])))
            made.append({**middle, name: codes[0]})
    return made


def ties(graph: Graph, seed: int) -> tuple[list[dict[str, np.ndarray]], tuple[int, int]]:
    """Random samples chosen so that the requantisations meet their ties; and how many of them did.

    A requantisation counts as met when accumulators lay on the tie and on both codes beside it.
    """
    rng = np.random.default_rng(seed)
    largest = max(t.size for t in graph.tensors.values())
    count = max(4, min(TIE_CANDIDATES, (1 << 22) // largest))
    batch = {}
    for n in graph.inputs:
        t = graph.tensors[n]
        batch[n] = t.legal(rng.integers(t.lo, t.hi, (count, *t.sample_shape), np.int64, endpoint=True))
    hits = tie_hits(graph, trace(graph, batch))
    if hits is None:
        return [], (0, 0)
    reachable = hits.any(axis=0)
    chosen: list[int] = []
    covered = np.zeros_like(reachable)
    while not covered[reachable].all():
        gain = (hits & ~covered).sum(axis=1)
        best = int(gain.argmax())
        chosen.append(best)
        covered |= hits[best]
    return [{n: batch[n][i] for n in graph.inputs} for i in chosen], ties_met(hits)


def tie_hits(graph: Graph, tensors: dict[str, np.ndarray]) -> np.ndarray | None:
    """Which samples bring each requantisation to one code below a tie, to a tie, and to one code above.

    Args:
        graph: A lowered graph.
        tensors: int64 codes [N, ...] of every tensor by name.

    Returns:
        bool [N, 3 * requantisations], or None where no requantisation has ties.
    """
    wanted: list[np.ndarray] = []
    for call in graph.nodes:
        if call.epilogue is None or max(call.epilogue.shift) < 2 or call.op.name == "AveragePool":
            continue
        exact = call.op.compute(call, *operands(call, tensors))
        shifts = np.asarray(call.epilogue.shift)
        if shifts.size > 1:
            shifts = shifts.reshape((-1,) + (1,) * (exact.ndim - 2))
        safe = np.maximum(shifts, 1)
        offset = (exact & ((np.int64(1) << safe) - 1)) - (np.int64(1) << (safe - 1))
        axes = tuple(range(1, exact.ndim))
        wanted.append(np.stack([((offset == d) & (shifts > 1)).any(axis=axes) for d in (-1, 0, 1)], axis=1))
    return np.concatenate(wanted, axis=1) if wanted else None


def ties_met(hits: np.ndarray) -> tuple[int, int]:
    """How many requantisations met a tie and both codes beside it, and how many there are."""
    reached = hits.any(axis=0).reshape(-1, 3).all(axis=1)
    return int(reached.sum()), reached.size


def corner_codes(graph: Graph, seed: int = 0) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
    """All corner vectors as one batch of codes by code tensor name, and the ties met."""
    tied, met = ties(graph, seed)
    samples = [*rails(graph), *extremes(graph), *tied]
    return {name: np.stack([sample[name] for sample in samples]) for name in graph.inputs}, met
