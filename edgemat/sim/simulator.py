"""The fast simulator: a lowered file on onnxruntime, bit for bit."""

from __future__ import annotations

import os
from functools import cached_property

import numpy as np
import onnxruntime

from edgemat import formats
from edgemat.lower.graph import Graph
from edgemat.lower.reader import read
from edgemat.sim import session
from edgemat.sim.arrays import Arrays, by_name, check_codes, single, to_float32
from edgemat.sim.reference import chunk_size


class Simulator:
    """Runs a lowered file; outputs are those of the hardware, to the bit.

    Args:
        path: A lowered file, or a `Graph` that was read already.

    Attributes:
        graph: The checked graph.

    Raises:
        LoweringError: if the file is not a lowered file this edgemat reads.
    """

    def __init__(self, path: str | os.PathLike[str] | Graph) -> None:
        self.graph = path if isinstance(path, Graph) else read(path)

    @cached_property
    def _from_values(self) -> onnxruntime.InferenceSession:
        return session.open_session(session.code_model(self.graph, _distinct(self.graph.outputs), from_codes=False))

    @cached_property
    def _from_codes(self) -> onnxruntime.InferenceSession:
        return session.open_session(session.code_model(self.graph, _distinct(self.graph.outputs), from_codes=True))

    def _run(self, x: Arrays, codes: bool) -> dict[str, np.ndarray]:
        """Output codes by code tensor name."""
        graph = self.graph
        feeds: dict[str, np.ndarray] = {}
        for index, (name, array) in enumerate(by_name(graph, x).items()):
            tensor = graph.input_type(index)
            if codes:
                feeds[tensor.name] = check_codes(name, array, tensor).astype(tensor.dtype)
            else:
                feeds[name] = to_float32(name, array)
        active = self._from_codes if codes else self._from_values
        total, step = len(next(iter(feeds.values()))), 4 * chunk_size(graph)
        wanted = [output.name for output in active.get_outputs()]
        parts = []
        for start in range(0, total, step):
            parts.append(active.run(wanted, {k: v[start : start + step] for k, v in feeds.items()}))
        return {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(wanted)}

    def codes(self, x: Arrays, codes: bool = False) -> np.ndarray | dict[str, np.ndarray]:
        """int64 output codes.

        Args:
            x: One array [N, ...], or a dict by input name; real values (cast to float32), or codes with `codes`.
            codes: `x` holds integer codes.

        Returns:
            int64 array, or a dict by output name where there are several.
        """
        found = self._run(x, codes)
        pairs = zip(self.graph.output_names, self.graph.outputs, strict=True)
        return single({name: found[tensor].astype(np.int64) for name, tensor in pairs})

    def __call__(self, x: Arrays, codes: bool = False) -> np.ndarray | dict[str, np.ndarray]:
        """Real output values (float32 up to 24 bits, float64 beyond); with `codes`, codes in and codes out.

        Args:
            x: One array [N, ...], or a dict by input name.
            codes: `x` holds integer codes, and the result shall too.

        Returns:
            One array, or a dict by output name where there are several.
        """
        if codes:
            return self.codes(x, codes=True)
        found = self._run(x, False)
        values = {}
        for name, tensor in zip(self.graph.output_names, self.graph.outputs, strict=True):
            values[name] = formats.dequantize(found[tensor], self.graph.tensors[tensor].format)
        return single(values)

    def trace(self, x: Arrays, codes: bool = False) -> dict[str, np.ndarray]:
        """Codes of every tensor, by ONNX value name."""
        from edgemat.sim.arrays import to_codes

        return onnx_trace(self.graph, to_codes(self.graph, x, codes))


def onnx_trace(graph: Graph, codes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Codes of every tensor as the file's own bodies compute them under onnxruntime."""
    inner = [call.outputs[0] for call in graph.nodes]
    made = dict(codes)
    if inner:
        active = session.open_session(session.code_model(graph, inner, from_codes=True))
        used = {i.name for i in active.get_inputs()}
        feeds = {k: v for k, v in session.feed_codes(graph, codes).items() if k in used}
        for name, array in zip(inner, active.run(inner, feeds), strict=True):
            made[name] = array.astype(np.int64)
    return made


def _distinct(names: list[str]) -> list[str]:
    return list(dict.fromkeys(names))
