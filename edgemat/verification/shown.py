"""The codes that float outputs show: exact values give theirs, any other value one that no format holds."""

from __future__ import annotations

import numpy as np
import onnxruntime

from edgemat import formats
from edgemat.lower.graph import Graph
from edgemat.sim import session
from edgemat.sim.arrays import output_scale, output_values

NO_CODE = np.int64(np.iinfo(np.int64).min)
"""Stands for a value that no code has; no format holds it."""


def codes_of(values: np.ndarray, fmt: formats.Fixed) -> np.ndarray:
    """Codes of exact values; a value off the grid becomes a code no format holds, so it can never pass for equal."""
    scaled = np.ldexp(values.astype(np.float64), formats.channel_array(fmt.fracs, values.ndim))
    on_grid = np.isfinite(scaled) & (scaled == np.floor(scaled)) & (np.abs(scaled) < 2.0**62)
    return np.where(on_grid, np.where(on_grid, scaled, 0).astype(np.int64), NO_CODE)


def output_codes(graph: Graph, index: int, values: np.ndarray) -> np.ndarray:
    """Codes of exact values of output `index`, as `codes_of`; with a real scale, the code that has the value."""
    scale = output_scale(graph, index)
    if scale is None:
        return codes_of(values, graph.output_type(index).format)
    ratio = np.rint(values.astype(np.float64) / np.float64(scale))
    held = np.isfinite(ratio) & (np.abs(ratio) < 2.0**62)
    codes = np.where(held, ratio, 0).astype(np.int64)
    return np.where(held & (output_values(graph, index, codes) == values), codes, NO_CODE)


def stock_session(graph: Graph) -> tuple[onnxruntime.InferenceSession, list[str]]:
    """The file under a stock onnxruntime, and what to ask it for: its outputs, and the codes of those that have a real
    scale, since several codes of over 24 bits may have one float32 value."""
    model = session.copy(graph.model)
    values = {value.name: value for node in model.graph for value in node.outputs}
    scaled = [name for index, name in enumerate(graph.outputs) if output_scale(graph, index) is not None]
    model.graph.outputs.extend(values[name] for name in dict.fromkeys(scaled))
    return session.open_session(model), [*graph.output_names, *dict.fromkeys(scaled)]


def shown_codes(graph: Graph, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Output codes of what `stock_session` gives: what the values say, or what it says where they have these values."""
    made: dict[str, np.ndarray] = {}
    for index, (name, tensor) in enumerate(zip(graph.output_names, graph.outputs, strict=True)):
        if output_scale(graph, index) is None:
            codes = codes_of(found[name], graph.tensors[tensor].format)
        else:
            codes = found[tensor].astype(np.int64)
            codes = np.where(found[name] == output_values(graph, index, codes), codes, NO_CODE)
        seen = made.setdefault(tensor, codes)
        made[tensor] = np.where(seen == codes, codes, NO_CODE)
    return made
