"""Graphs for the MCU tests: many single nodes side by side, so that one compilation tests them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from edgemat.op import Call, Tensor


@dataclass
class CaseGraph:
    """Has the attributes of `edgemat.lower.graph.Graph` that targets read."""

    name: str
    nodes: list[Call] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    input_names: list[str] = field(default_factory=list)
    output_names: list[str] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    def add_input(self, tensor: Tensor) -> Tensor:
        """Declares a network input."""
        self.inputs.append(tensor.name)
        self.input_names.append(tensor.name)
        self.tensors[tensor.name] = tensor
        return tensor

    def add(
        self, op: Any, name: str, x: Sequence[Tensor], attrs: dict, constants: dict[int, np.ndarray] | None = None
    ) -> Tensor:
        """Appends a node; returns its output."""
        call = Call(op, name, x, attrs, constants or {}, (f"{name}_y",))
        self.nodes.append(call)
        self.tensors[call.y[0].name] = call.y[0]
        return call.y[0]

    def output(self, tensor: Tensor) -> None:
        """Makes a tensor an output."""
        self.outputs.append(tensor.name)
        self.output_names.append(tensor.name)


def side_by_side(name: str, calls: Sequence[Call]) -> CaseGraph:
    """One graph of unconnected nodes, one for each case."""
    graph = CaseGraph(name)
    for number, case in enumerate(calls):
        operands = []
        for position, tensor in enumerate(case.x):
            tensor = replace(tensor, name=f"c{number}_x{position}")
            if case.constant(position) is None:
                graph.add_input(tensor)
            operands.append(tensor)
        attrs = {key: value for key, value in case.attrs.items() if value is not None}
        graph.output(graph.add(case.op, f"c{number}", operands, attrs, case.constants))
    return graph


def feeds(graph: CaseGraph, samples: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    """Codes for every input: both rails, zero, alternating rails, a sweep of neighbouring codes, random."""
    rng = np.random.default_rng(seed)
    found = {}
    for name in graph.inputs:
        tensor = graph.tensors[name]
        shape = tensor.sample_shape
        size = tensor.size
        zero = min(max(0, tensor.lo), tensor.hi)
        rows = [np.full(size, tensor.lo), np.full(size, tensor.hi), np.full(size, zero)]
        rows.append(np.where(np.arange(size) % 2, tensor.lo, tensor.hi))
        rows.append(zero + np.clip(np.arange(size) - size // 2, tensor.lo - zero, tensor.hi - zero))
        while len(rows) < samples:
            rows.append(rng.integers(tensor.lo, tensor.hi, size, np.int64, endpoint=True))
        found[name] = tensor.legal(np.stack(rows).reshape(len(rows), *shape))
    return found
