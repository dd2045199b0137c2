"""Typed graphs built by hand: dossier cases side by side, and random small networks with awkward formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from edgemat.formats import Fixed
from edgemat.lower.graph import Graph
from edgemat.op import REAL, Call, Tensor
from edgemat.ops import BY_NAME
from edgemat.ops.cases import constant, random_codes


class Builder:
    """Collects nodes; `graph()` is the finished view a reader would give."""

    def __init__(self) -> None:
        self.made = Graph("built", [], [], [], [], [], {}, {}, {}, None)  # type: ignore[arg-type]

    def input(self, fmt: str, shape: Sequence[int], name: str = "x") -> Tensor:
        """A float input and its quantiser."""
        real = Tensor(f"{name}_real", (None, *shape), REAL, 0, 0)
        call = Call(BY_NAME["Quantize"], f"{name}_quantize", [real], {"y_format": str(Fixed.parse(fmt))}, {}, (name,))
        return self._declare(call.y[0], call)

    def _declare(self, tensor: Tensor, quantizer: Call | None) -> Tensor:
        graph = self.made
        graph.inputs.append(tensor.name)
        graph.input_names.append(f"{tensor.name}_real")
        graph.tensors[tensor.name] = tensor
        if quantizer is not None:
            graph.quantizers[f"{tensor.name}_real"] = quantizer
        return tensor

    def codes_input(self, tensor: Tensor) -> Tensor:
        """An input that takes codes only."""
        return self._declare(tensor, None)

    def add(
        self, op: str, name: str, x: Sequence[Tensor], attrs: dict, constants: dict[int, np.ndarray] | None = None
    ) -> Tensor:
        """Appends a node; returns its output."""
        call = Call(BY_NAME[op], name, x, attrs, constants, (f"{name}_y",))
        self.made.nodes.append(call)
        self.made.tensors[call.y[0].name] = call.y[0]
        return call.y[0]

    def linear(self, x: Tensor, outs: int, w_fmt: str, requantize: str = "", seed: int = 0, name: str = "") -> Tensor:
        """A Linear with random weights over the whole range and a bias."""
        count = len(self.made.nodes)
        w = constant(w_fmt, random_codes(_plain(w_fmt), (outs, x.shape[-1] or 1), seed), f"w{count}")
        b = constant("fixed<16,8>", random_codes("fixed<11,3>", (outs,), seed + 1), f"b{count}")
        attrs = {"w_format": w_fmt, "requantize": requantize}
        return self.add("Linear", name or f"linear{count}", [x, w[0], b[0]], attrs, {1: w[1], 2: b[1]})

    def conv(
        self,
        x: Tensor,
        outs: int,
        w_fmt: str,
        requantize: str = "",
        seed: int = 0,
        kernel: int = 3,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
    ) -> Tensor:
        """A padded Conv with random weights over the whole range and a bias."""
        count = len(self.made.nodes)
        rank = len(x.shape) - 2
        shape = (outs, (x.shape[1] or 1) // groups, *(kernel,) * rank)
        w = constant(w_fmt, random_codes(_plain(w_fmt), shape, seed), f"w{count}")
        b = constant("fixed<16,8>", random_codes("fixed<11,3>", (outs,), seed + 1), f"b{count}")
        attrs = {"w_format": w_fmt, "requantize": requantize, "groups": groups}
        attrs |= {"strides": (stride,) * rank, "dilations": (dilation,) * rank}
        attrs["pads"] = (kernel // 2 * dilation,) * (2 * rank)
        return self.add("Conv", f"conv{count}", [x, w[0], b[0]], attrs, {1: w[1], 2: b[1]})

    def pool(self, x: Tensor) -> Tensor:
        """A 2x2 MaxPool with padding on one side."""
        attrs = {"kernel_shape": (2, 2), "strides": (2, 2), "pads": (0, 0, 1, 1)}
        return self.add("MaxPool", f"pool{len(self.made.nodes)}", [x], attrs)

    def flatten(self, x: Tensor) -> Tensor:
        """A Reshape to one axis."""
        return self.add("Reshape", f"flat{len(self.made.nodes)}", [x], {"shape": (x.size,)})

    def graph(self, *outputs: Tensor) -> Graph:
        """The graph with these outputs."""
        self.made.outputs.extend(t.name for t in outputs)
        self.made.output_names.extend(f"out{i}" for i in range(len(outputs)))
        return self.made


def _plain(w_fmt: str) -> str:
    fmt = Fixed.parse(w_fmt)
    return str(replace(fmt, int_bits=0))


def side_by_side(cases: Sequence[Call]) -> Graph:
    """One graph of unconnected nodes that take codes, one node a case."""
    build = Builder()
    made = []
    for number, case in enumerate(cases):
        operands = []
        for position, tensor in enumerate(case.x):
            tensor = replace(tensor, name=f"c{number}_x{position}")
            operands.append(tensor if case.constant(position) is not None else build.codes_input(tensor))
        attrs = {key: value for key, value in case.attrs.items() if value is not None}
        made.append(build.add(case.op.name, f"c{number}", operands, attrs, case.constants))
    return build.graph(*made)


def code_feeds(graph: Graph, samples: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Codes by code tensor name: rails, zero, alternating rails, a sweep, random."""
    rng = np.random.default_rng(seed)
    found = {}
    for name in graph.inputs:
        tensor = graph.tensors[name]
        size, zero = tensor.size, min(max(0, tensor.lo), tensor.hi)
        rows = [np.full(size, code) for code in (tensor.lo, tensor.hi, zero)]
        rows.append(np.where(np.arange(size) % 2, tensor.lo, tensor.hi))
        rows.append(zero + np.clip(np.arange(size) - size // 2, tensor.lo - zero, tensor.hi - zero))
        while len(rows) < samples:
            rows.append(rng.integers(tensor.lo, tensor.hi, size, np.int64, endpoint=True))
        found[name] = tensor.legal(np.stack(rows).reshape(len(rows), *tensor.sample_shape))
    return found


def awkward_values(fmt: Fixed, count: int, seed: int = 0) -> np.ndarray:
    """float32 values around everything a quantiser can get wrong, shuffled; at least `count`, without NaN.

    Every tie and code of the format (up to 2**10 codes around zero and both rails), their float32 neighbours, values
    beyond the rails up to infinity, subnormals, signed zeros, 0.49999997 of an LSB, random ones.
    """
    rng = np.random.default_rng(seed)
    low, high = fmt.rails
    near = np.unique(np.concatenate([np.arange(c - 300, c + 301) for c in (low, 0, high)]))
    lsb = 2.0 ** -fmt.fracs[0]
    grid = (np.concatenate([near, near + 0.5]) * lsb).astype(np.float32)
    around = np.concatenate([grid, np.nextafter(grid, np.float32(np.inf)), np.nextafter(grid, np.float32(-np.inf))])
    special = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38, np.inf, -np.inf], np.float32)
    pred = np.nextafter(np.float32(0.5), np.float32(0)) * np.float32(lsb)
    rest = rng.normal(0, (high - low) * lsb / 3, max(count, 64)).astype(np.float32)
    made = np.concatenate([around, special, [pred, -pred], rest]).astype(np.float32)
    return rng.permutation(made)


def batch(fmt: Fixed, shape: tuple[int, ...], samples: int, seed: int = 0) -> np.ndarray:
    """[samples, *shape] float32 of `awkward_values`, repeated as needed."""
    size = int(np.prod(shape))
    values = awkward_values(fmt, samples * size, seed)
    return np.resize(values, samples * size).reshape(samples, *shape)
