"""Which values flow through a lowered file, against what its formats hold: the data behind the report's histograms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgemat.formats import Fixed, dequantize
from edgemat.lower.graph import Graph
from edgemat.op import Tensor
from edgemat.sim.arrays import Arrays, by_name, to_codes, to_float32
from edgemat.sim.simulator import onnx_trace

BINS = 64
BATCH = 32
GENERATED = 128
_NEAR = 4.0
"""Rails within so many times the seen range are drawn; further ones are said in words."""


@dataclass(frozen=True)
class Distribution:
    """Values of one tensor, or the weights of one layer.

    Attributes:
        name: Tensor or layer.
        kind: What it is, for people.
        format: Its format.
        count: Values looked at.
        low: Smallest value seen.
        high: Largest value seen.
        rails: Smallest and largest value of the format (of its widest channel).
        at_rails: Share of the values at a rail of a saturating format, 0 to 1; None for exact sums.
        zeros: Share of zeros.
        edges: Ends of the bins.
        counts: Elements of each bin.
    """

    name: str
    kind: str
    format: Fixed
    count: int
    low: float
    high: float
    rails: tuple[float, float]
    at_rails: float | None
    zeros: float
    edges: np.ndarray
    counts: np.ndarray

    @property
    def shown_rails(self) -> tuple[float, float] | None:
        """The rails where they are near enough to be drawn."""
        seen = max(self.high - self.low, abs(self.high), abs(self.low))
        return self.rails if self.rails[1] - self.rails[0] <= _NEAR * seen else None

    @property
    def spare_bits(self) -> int:
        """Whole bits of the format's range that no value used."""
        shares = [v / rail for v, rail in ((self.low, self.rails[0]), (self.high, self.rails[1])) if v * rail > 0]
        if not shares:
            return self.format.width
        return max(int(np.floor(-np.log2(max(shares)))), 0)


def distribution(
    name: str,
    kind: str,
    codes: np.ndarray,
    fmt: Fixed,
    axis: int,
    rounded: bool,
    unit: float = 1.0,
    ends: tuple[int, int] | None = None,
) -> Distribution:
    """Describes codes.

    Args:
        name: Tensor or layer.
        kind: What it is.
        codes: int64 codes, at least one.
        fmt: Their format.
        axis: Channel axis.
        rounded: Whether the format rounded them, so that a code at a rail may have saturated.
        unit: The real scale of a tensor of plain integers that has one.
        ends: The codes at which it saturates, where they are not the format's rails.
    """
    values = dequantize(codes, fmt, axis).astype(np.float64) * unit
    lows, highs = (np.asarray([end]) for end in ends) if ends else (np.asarray(r) for r in fmt.channel_rails())
    scale = np.ldexp(unit, -np.asarray(fmt.fracs))
    rails = float((lows * scale).min()), float((highs * scale).max())
    at_rails = None
    if rounded and fmt.overflow != "WRAP" and not fmt.bipolar:
        shape = [1] * codes.ndim
        shape[axis] = -1
        bottom, top = (rail.reshape(shape) if rail.size > 1 else rail for rail in (lows, highs))
        # The lower rail of an unsigned format is 0, where values belong.
        at_rails = float((((codes == top) & (top > 0)) | ((codes == bottom) & (bottom < 0))).mean())
    low, high = float(values.min()), float(values.max())
    step = float(scale.min())
    span = (high - low) / step + 1  # codes of the finest channel, each in the middle of its slot
    bins = int(min(BINS, max(span, 1)))
    width = np.ceil(span / bins) * step
    edges = low - step / 2 + width * np.arange(bins + 1)
    edges = edges[: int(np.searchsorted(edges, high) + 1)] if len(edges) > 2 else edges
    counts = np.histogram(values, edges)[0]
    return Distribution(
        name, kind, fmt, int(values.size), low, high, rails, at_rails, float((codes == 0).mean()), edges, counts
    )


def generated(graph: Graph, samples: int = GENERATED) -> dict[str, np.ndarray]:
    """Input codes for a look without data: uniform over what each input can hold, the same every time."""
    rng = np.random.default_rng(0)
    made = {}
    for name in graph.inputs:
        tensor = graph.tensors[name]
        codes = rng.integers(tensor.lo, tensor.hi + 1, (samples, *tensor.sample_shape))
        made[name] = tensor.legal(codes)
    return made


def distributions(
    graph: Graph, inputs: Arrays | None = None, codes: bool = False
) -> tuple[list[Distribution], list[Distribution]]:
    """Values of every tensor and weights of every layer, in the graph's order.

    Args:
        graph: A lowered graph.
        inputs: Samples (real values, or codes), one array or one by input name; None generates some.
        codes: Whether `inputs` are codes.

    Raises:
        EdgematError: if the inputs do not fit the graph, or hold no or different numbers of samples.
    """
    given = generated(graph) if inputs is None else to_codes(graph, inputs, codes)
    samples = len(next(iter(given.values())))
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, samples, BATCH):
        batch = {name: array[start : start + BATCH] for name, array in given.items()}
        for name, found in onnx_trace(graph, batch).items():
            parts.setdefault(name, []).append(_narrow(found))
    rounding = {call.outputs[0] for call in graph.nodes if call.epilogue is not None}
    made = []
    for index, name in enumerate(graph.inputs):
        made.append(_input(graph, index, parts[name]))
    for call in graph.nodes:
        name = call.outputs[0]
        kind = f"{call.op.name}, {'rounded' if name in rounding else 'exact'}"
        rounded = name in rounding or call.op.name in ("Requantize", "Table", "Softmax")
        made.append(_tensor(graph.tensors[name], kind, parts[name], rounded, call.name, _unit(graph, name)))
    return made, _weights(graph)


def infinities(graph: Graph, inputs: Arrays) -> dict[str, str]:
    """A sentence for each input, by its name, that holds infinities; those beyond float32 count as well.

    Args:
        graph: A lowered graph.
        inputs: Samples (real values), one array or one by input name.
    """
    made = {}
    for index, (name, array) in enumerate(by_name(graph, inputs).items()):
        count = int(np.isinf(to_float32(name, array)).sum())
        fmt = graph.input_type(index).format
        becomes = "becomes 0 in" if fmt.overflow == "SAT_ZERO" else "saturates at an end of"
        if count:
            made[name] = (
                f"input {name!r} holds {count:,} infinite of {array.size:,} values; each {becomes} {fmt}: clean the "
                "data if none is meant"
            )
    return made


def _narrow(codes: np.ndarray) -> np.ndarray:
    """Codes in as few bytes as hold them."""
    low, high = int(codes.min()), int(codes.max())
    kind = next(
        k for k in (np.int8, np.int16, np.int32, np.int64) if np.iinfo(k).min <= low and high <= np.iinfo(k).max
    )
    return codes.astype(kind)


def _unit(graph: Graph, tensor: str) -> float:
    """What a code of an output is worth beyond its format."""
    names = [name for name, output in zip(graph.output_names, graph.outputs, strict=True) if output == tensor]
    scale = graph.scale(names[0]) if names else None
    return 1.0 if scale is None else float(scale)


def _input(graph: Graph, index: int, parts: list[np.ndarray]) -> Distribution:
    tensor, name = graph.input_type(index), graph.input_names[index]
    scale = graph.scale(name)
    if scale is None:
        return _tensor(tensor, f"input {name}", parts, True)
    return _tensor(tensor, f"input {name}", parts, True, unit=float(scale), ends=(tensor.lo, tensor.hi))


def _tensor(
    tensor: Tensor,
    kind: str,
    parts: list[np.ndarray],
    rounded: bool,
    name: str = "",
    unit: float = 1.0,
    ends: tuple[int, int] | None = None,
) -> Distribution:
    codes = np.concatenate(parts).astype(np.int64)
    axis = min(1, codes.ndim - 1)
    return distribution(name or tensor.name, kind, codes, tensor.format, axis, rounded, unit, ends)


def _weights(graph: Graph) -> list[Distribution]:
    made = []
    for call in graph.nodes:
        codes = call.constant(1) if call.attrs.get("w_format") or call.attrs.get("slope_format") else None
        if codes is None:
            continue
        fmt = call.format_attr("w_format" if call.attrs.get("w_format") else "slope_format")
        axis = 1 if call.op.name == "ConvTranspose" else 0
        channels = len(fmt.fracs)
        if channels > 1 and codes.shape[axis] != channels:
            codes = np.swapaxes(codes.reshape(call.attrs["groups"], -1, *codes.shape[1:]), 1, 2)
            codes, axis = codes.reshape(channels, -1), 0
        made.append(distribution(call.name, f"weights of {call.op.name}", codes, fmt, axis, True))
    return made
