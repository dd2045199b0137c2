"""A float ONNX file as a module of torch layers: what `edgemat.ptq` and `edgemat.quantize` start from."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import fx, nn

from edgemat.errors import EdgematError, LoweringError, UnsupportedOpError
from edgemat.foreign.constants import run
from edgemat.foreign.padding import same_pads
from edgemat.foreign.source import Source, load, source_of
from edgemat.foreign.translator import MALFORMED, malformed

REMEDY = "build that part from torch layers by hand"


def float_model(path: str | os.PathLike[str]) -> fx.GraphModule:
    """Reads a float ONNX file into a module of torch layers with the file's weights.

    Convolutions, dense layers, batch norms, pools, activations and what moves elements become torch's layers, which
    `edgemat.quantize` knows; a constant added to a layer without a bias becomes its bias. A Softmax that ends the
    network is left out: `edgemat.ptq` quantises what it takes, and the classes keep their order.

    Args:
        path: A file with one float32 input [N, ...] and one output.

    Returns:
        A module in eval mode. Its batch is free, whatever the file states.

    Raises:
        LoweringError: if the file cannot be read, or nodes have forms that torch layers lack; all of them are named.
    """
    source = load(path)
    try:
        proto = onnx.shape_inference.infer_shapes(source.proto)
    except Exception:  # the shapes are asked for where they are needed
        proto = source.proto
    return _Reader(source_of(proto, source.label)).module()


@dataclass(frozen=True)
class _Node:
    """A value of the network under construction: its fx node, and the layer that made it without a bias, if any."""

    made: fx.Node
    unbiased: nn.Module | None = None


_Quantity = _Node | np.ndarray


class _Reader:
    """Walks the file once.

    Attributes:
        source: The file.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._graph, self._root = fx.Graph(), nn.Module()
        self._values: dict[ir.Value, _Quantity] = {}
        self._refused: set[ir.Value] = set()
        self._layers = 0

    def module(self) -> fx.GraphModule:
        graph = self.source.graph
        for value in graph.initializers.values():
            if value.const_value is not None:
                self._values[value] = np.asarray(value.const_value.numpy())
        inputs = [value for value in graph.inputs if value not in self._values]
        if len(inputs) != 1 or len(graph.outputs) != 1:
            raise LoweringError(
                f"{self.source.label} has {len(inputs)} inputs and {len(graph.outputs)} outputs, expected one of each"
            )
        self._values[inputs[0]] = _Node(self._graph.placeholder("x"))
        refusals = []
        for node in graph:
            if any(value in self._refused for value in node.inputs if value is not None):
                self._refused |= set(node.outputs)
                continue
            try:
                self._visit(node)
            except EdgematError as error:
                refusals.append(str(error))
                self._refused |= set(node.outputs)
            except MALFORMED as error:
                refusals.append(str(self.refuse(node, malformed(error), "check the node with onnx.checker")))
                self._refused |= set(node.outputs)
        if refusals:
            listed = "".join(f"\n  - {text}" for text in refusals)
            raise LoweringError(f"{self.source.label} has nodes that torch layers cannot stand for:{listed}")
        result = self._values.get(graph.outputs[0])
        if not isinstance(result, _Node):
            raise LoweringError(f"the output of {self.source.label} does not depend on its input")
        self._graph.output(result.made)
        self._graph.lint()
        return fx.GraphModule(self._root, self._graph, "FloatModel").eval()

    def _visit(self, node: ir.Node) -> None:
        given = [None if value is None else self._values.get(value) for value in node.inputs]
        if node.domain not in ("", "ai.onnx"):
            raise UnsupportedOpError(f"node {self.label(node)!r} is {node.domain}::{node.op_type}; {REMEDY}")
        if all(value is None or isinstance(value, np.ndarray) for value in given):
            arrays = run(self, node, given)  # type: ignore[arg-type]
            self._values.update(zip(node.outputs, arrays, strict=True))
            return
        handler = _HANDLERS.get(node.op_type)
        if handler is None:
            raise UnsupportedOpError(f"node {self.label(node)!r} is {node.op_type}; {REMEDY}")
        handler(self, node)

    # -- what handlers ask and do ---------------------------------------------------------------------------------
    def label(self, node: ir.Node) -> str:
        """The node's name, or its first output's."""
        return node.name or node.outputs[0].name or node.op_type

    def refuse(self, node: ir.Node, found: str, remedy: str = REMEDY) -> LoweringError:
        """A LoweringError that names a node of the file."""
        return LoweringError(f"node {self.label(node)!r} ({node.op_type}): {found}; {remedy}")

    def attribute(self, node: ir.Node, key: str, default: Any) -> Any:
        """An attribute, or the default."""
        attr = node.attributes.get(key)
        value = default if attr is None else attr.value
        return value.decode() if isinstance(value, bytes) else tuple(value) if isinstance(value, list) else value

    def data(self, node: ir.Node, index: int = 0) -> fx.Node:
        """An input that is computed."""
        value = node.inputs[index] if index < len(node.inputs) else None
        found = None if value is None else self._values.get(value)
        if not isinstance(found, _Node):
            raise self.refuse(node, f"input {index} is a constant")
        return found.made

    def constant(self, node: ir.Node, index: int) -> np.ndarray | None:
        """A constant input; None where it is left out."""
        value = node.inputs[index] if index < len(node.inputs) else None
        found = None if value is None else self._values.get(value)
        if isinstance(found, _Node):
            raise self.refuse(node, f"input {index} is computed at run time")
        return found

    def known(self, node: ir.Node, index: int) -> np.ndarray | None:
        """An input where it is a constant, else None."""
        value = node.inputs[index] if index < len(node.inputs) else None
        found = None if value is None else self._values.get(value)
        return found if isinstance(found, np.ndarray) else None

    def rank(self, node: ir.Node) -> int:
        """Rank of the first input."""
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        if shape is None:
            raise self.refuse(node, "an input of unknown shape", "run onnx.shape_inference on the file")
        return len(shape)

    def size(self, node: ir.Node, axis: int) -> int:
        """Size of an axis of the first input."""
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        found = None if shape is None else shape[axis]
        if not isinstance(found, int):
            raise self.refuse(node, f"an unknown size of axis {axis}", "run onnx.shape_inference on the file")
        return found

    def set(self, node: ir.Node, made: fx.Node, unbiased: nn.Module | None = None) -> None:
        """What the node's output is."""
        self._values[node.outputs[0]] = _Node(made, unbiased)

    def layer(self, module: nn.Module, x: fx.Node) -> fx.Node:
        """A call of a new layer."""
        name = f"{type(module).__name__.lower()}_{self._layers}"
        self._layers += 1
        self._root.add_module(name, module)
        return self._graph.call_module(name, (x,))

    def call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """A call of a function of torch."""
        return self._graph.call_function(function, args)

    def ends(self, node: ir.Node) -> bool:
        """Whether the node's output is the network's, and nothing else reads it."""
        return node.outputs[0].is_graph_output() and not node.outputs[0].uses()

    def unbiased(self, node: ir.Node, index: int) -> nn.Module | None:
        """The layer without a bias whose result nobody but this node reads."""
        value = node.inputs[index]
        found = None if value is None else self._values.get(value)
        if value is None or not isinstance(found, _Node) or len(value.uses()) != 1 or value.is_graph_output():
            return None
        return found.unbiased


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.float32))


def _loaded(layer: Any, weight: np.ndarray, bias: np.ndarray | None) -> nn.Module:
    layer.weight.data = _tensor(weight)
    if bias is not None:
        layer.bias = nn.Parameter(_tensor(bias.reshape(-1)))
    return layer  # type: ignore[no-any-return]


def _padded(rd: _Reader, node: ir.Node, x: fx.Node, kernel: tuple[int, ...]) -> tuple[fx.Node, tuple[int, ...]]:
    """The data behind whatever padding is not equal on both sides, and the padding left to the layer."""
    rank = len(kernel)
    pads, auto = rd.attribute(node, "pads", (0,) * 2 * rank), rd.attribute(node, "auto_pad", "NOTSET")
    strides, dilations = (rd.attribute(node, key, (1,) * rank) for key in ("strides", "dilations"))
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        sizes = [1 if strides[axis] == 1 else rd.size(node, axis + 2) for axis in range(rank)]
        pads = same_pads(sizes, kernel, strides, dilations, auto == "SAME_UPPER")
    elif auto == "VALID":
        pads = (0,) * 2 * rank
    elif auto not in ("NOTSET", ""):
        raise rd.refuse(node, f"auto_pad {auto!r}", "give explicit pads")
    if pads[:rank] == pads[rank:]:
        return x, pads[:rank]
    if node.op_type != "Conv":
        raise rd.refuse(node, f"a pool with pads {pads}", "pad equally on both sides")
    sides = tuple(pads[axis + end * rank] for axis in reversed(range(rank)) for end in (0, 1))
    return rd.layer(nn.ZeroPad1d(sides) if rank == 1 else nn.ZeroPad2d(sides), x), (0,) * rank


def _conv(rd: _Reader, node: ir.Node) -> None:
    weight, bias = rd.constant(node, 1), rd.constant(node, 2)
    assert weight is not None
    rank = weight.ndim - 2
    if rank not in (1, 2):
        raise rd.refuse(node, f"a kernel of rank {rank}")
    x, padding = _padded(rd, node, rd.data(node), weight.shape[2:])
    groups = rd.attribute(node, "group", 1)
    make: Any = nn.Conv1d if rank == 1 else nn.Conv2d
    strides, dilations = (rd.attribute(node, key, (1,) * rank) for key in ("strides", "dilations"))
    layer = make(
        weight.shape[1] * groups, weight.shape[0], weight.shape[2:], strides, padding, dilations, groups, False
    )
    _loaded(layer, weight, bias)
    rd.set(node, rd.layer(layer, x), layer if bias is None else None)


def _gemm(rd: _Reader, node: ir.Node) -> None:
    weight, bias = rd.constant(node, 1), rd.constant(node, 2)
    if weight is None or weight.ndim != 2 or rd.attribute(node, "transA", 0):
        raise rd.refuse(node, "a transposed first matrix")
    weight = weight if rd.attribute(node, "transB", 0) else weight.T
    weight = weight * np.float32(rd.attribute(node, "alpha", 1.0))
    bias = (
        None if bias is None else np.broadcast_to(bias * np.float32(rd.attribute(node, "beta", 1.0)), weight.shape[:1])
    )
    layer = _loaded(nn.Linear(weight.shape[1], weight.shape[0], False), weight, bias)
    rd.set(node, rd.layer(layer, rd.data(node)), layer if bias is None else None)


def _matmul(rd: _Reader, node: ir.Node) -> None:
    weight = rd.constant(node, 1)
    if weight is None or weight.ndim != 2:
        raise rd.refuse(node, "a product that is no dense layer")
    layer = _loaded(nn.Linear(weight.shape[0], weight.shape[1], False), weight.T, None)
    rd.set(node, rd.layer(layer, rd.data(node)), layer)


def _add(rd: _Reader, node: ir.Node) -> None:
    """A sum of two tensors, or the bias of the layer before."""
    for index in range(2):
        array = rd.known(node, index)
        if array is None:
            continue
        layer: Any = rd.unbiased(node, 1 - index)
        if layer is None or not _by_channel(layer, array):
            raise rd.refuse(node, f"a constant of shape {array.shape} that is no layer's bias")
        layer.bias = nn.Parameter(_tensor(np.broadcast_to(array.reshape(-1), layer.weight.shape[:1])))
        rd.set(node, rd.data(node, 1 - index))
        return
    rd.set(node, rd.call(torch.add, rd.data(node, 0), rd.data(node, 1)))


def _by_channel(layer: Any, array: np.ndarray) -> bool:
    """Whether a constant, broadcast, is one number for each of the layer's outputs."""
    spatial = layer.weight.dim() - 2
    axis = array.ndim - 1 - spatial
    return array.size == 1 or (array.size == layer.weight.shape[0] and axis >= 0 and array.shape[axis] == array.size)


def _batch_norm(rd: _Reader, node: ir.Node) -> None:
    parts = [rd.constant(node, index) for index in range(1, 5)]
    assert all(part is not None for part in parts)
    channels, rank = parts[0].size, rd.rank(node)  # type: ignore[union-attr]
    if not rd.attribute(node, "spatial", 1) or rd.size(node, 1) != channels:
        raise rd.refuse(node, f"statistics of {channels} channels for data with {rd.size(node, 1)}", "mend the file")
    layer = (nn.BatchNorm2d if rank == 4 else nn.BatchNorm1d)(channels, eps=rd.attribute(node, "epsilon", 1e-5))
    layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var = (_tensor(p) for p in parts)  # type: ignore[arg-type]
    rd.set(node, rd.layer(layer, rd.data(node)))


def _activation(make: Callable[[_Reader, ir.Node], nn.Module]) -> Callable[[_Reader, ir.Node], None]:
    return lambda rd, node: rd.set(node, rd.layer(make(rd, node), rd.data(node)))


def _clip(rd: _Reader, node: ir.Node) -> nn.Module:
    limits = []
    for index, key, default in ((1, "min", -np.inf), (2, "max", np.inf)):
        given = rd.constant(node, index)
        limits.append(float(rd.attribute(node, key, default) if given is None else given.reshape(())))
    if limits == [0.0, 6.0]:
        return nn.ReLU6()
    return nn.ReLU() if limits == [0.0, np.inf] else nn.Hardtanh(limits[0], limits[1])


def _pool(rd: _Reader, node: ir.Node) -> None:
    kernel = tuple(rd.attribute(node, "kernel_shape", ()))
    x, padding = _padded(rd, node, rd.data(node), kernel)
    strides, ceil = rd.attribute(node, "strides", (1,) * len(kernel)), bool(rd.attribute(node, "ceil_mode", 0))
    if len(kernel) not in (1, 2) or rd.attribute(node, "storage_order", 0):
        raise rd.refuse(node, f"a window {kernel}")
    layer: nn.Module
    if node.op_type == "MaxPool":
        dilations = rd.attribute(node, "dilations", (1,) * len(kernel))
        layer = (nn.MaxPool1d if len(kernel) == 1 else nn.MaxPool2d)(
            kernel, strides, padding, dilations, ceil_mode=ceil
        )
    else:
        if any(step != 1 for step in rd.attribute(node, "dilations", ())):
            raise rd.refuse(node, "an average with dilations", "average neighbours")
        counted = bool(rd.attribute(node, "count_include_pad", 0))
        average: Any = nn.AvgPool1d if len(kernel) == 1 else nn.AvgPool2d
        layer = average(kernel, strides, padding, ceil, counted)
    rd.set(node, rd.layer(layer, x))


def _global_pool(rd: _Reader, node: ir.Node) -> None:
    flat, largest = rd.rank(node) == 3, node.op_type == "GlobalMaxPool"
    kinds = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d) if largest else (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
    rd.set(node, rd.layer(kinds[0 if flat else 1](1), rd.data(node)))


def _mean(rd: _Reader, node: ir.Node) -> None:
    given = rd.constant(node, 1)
    axes = rd.attribute(node, "axes", ()) if given is None else tuple(int(a) for a in given.reshape(-1))
    chosen = tuple(sorted(axis % rd.rank(node) for axis in axes))
    if not chosen or 0 in chosen:
        raise rd.refuse(node, f"a mean over axes {axes or 'all'}", "average behind the batch, over stated axes")
    rd.set(node, rd.call(torch.mean, rd.data(node), chosen, bool(rd.attribute(node, "keepdims", 1))))


def _flatten(rd: _Reader, node: ir.Node) -> None:
    axis = rd.attribute(node, "axis", 1)
    if axis not in (0, 1) or (axis == 0 and rd.size(node, 0) != 1):
        raise rd.refuse(node, f"flattening from axis {axis}", "flatten behind the batch (axis 1)")
    rd.set(node, rd.layer(nn.Flatten(), rd.data(node)))


def _sample_size(rd: _Reader, node: ir.Node) -> int:
    """Elements of one sample of the node's first input."""
    return math.prod(rd.size(node, axis) for axis in range(1, rd.rank(node)))


def _reshape(rd: _Reader, node: ir.Node) -> None:
    given = rd.constant(node, 1)
    target = [int(d) for d in (rd.attribute(node, "shape", ()) if given is None else given.reshape(-1))]
    shape = node.outputs[0].shape
    if len(target) < 2 or target[0] not in (0, -1, 1) or (target[0] == 1 and rd.size(node, 0) != 1):
        raise rd.refuse(node, f"a reshape to {target}", "keep the batch on axis 0")
    if len(target) == 2 and target[0] == -1 and target[1] != _sample_size(rd, node):
        raise rd.refuse(node, f"a reshape to {target}, which moves elements into the batch", "write [0, -1]")
    if len(target) == 2:
        rd.set(node, rd.layer(nn.Flatten(), rd.data(node)))
        return
    if shape is None or any(not isinstance(d, int) for d in list(shape)[1:]):
        raise rd.refuse(node, f"a reshape to {target} of unknown size", "run onnx.shape_inference on the file")
    rd.set(node, rd.call(torch.reshape, rd.data(node), (-1, *(int(d) for d in list(shape)[1:]))))  # type: ignore[arg-type]


def _transpose(rd: _Reader, node: ir.Node) -> None:
    perm = rd.attribute(node, "perm", tuple(reversed(range(rd.rank(node)))))
    if perm[0] != 0:
        raise rd.refuse(node, f"perm {perm} moves the batch", "keep axis 0 in its place")
    rd.set(node, rd.call(torch.permute, rd.data(node), tuple(perm)))


def _concat(rd: _Reader, node: ir.Node) -> None:
    axis = rd.attribute(node, "axis", 1)
    if axis % rd.rank(node) == 0:
        raise rd.refuse(node, "a concatenation along the batch", "join samples outside of the network")
    rd.set(node, rd.call(torch.cat, tuple(rd.data(node, index) for index in range(len(node.inputs))), axis))


def _resize(rd: _Reader, node: ir.Node) -> None:
    scales = rd.constant(node, 1 if len(node.inputs) == 2 else 2)
    nearest = rd.attribute(node, "mode", "nearest") == "nearest"
    plain = len(node.inputs) == 2 or (
        rd.attribute(node, "coordinate_transformation_mode", "half_pixel") == "asymmetric"
        and rd.attribute(node, "nearest_mode", "round_prefer_floor") == "floor"
    )
    factors = [] if scales is None else [float(s) for s in scales.reshape(-1)]
    if not nearest or not plain or len(factors) < 3 or factors[:2] != [1, 1] or any(f != int(f) for f in factors):
        raise rd.refuse(
            node, f"mode {rd.attribute(node, 'mode', 'nearest')}, scales {factors}", "repeat whole elements"
        )
    factor = tuple(int(f) for f in factors[2:])
    rd.set(node, rd.layer(nn.Upsample(scale_factor=factor, mode="nearest"), rd.data(node)))


def _same(rd: _Reader, node: ir.Node) -> None:
    rd.set(node, rd.data(node))


def _softmax(rd: _Reader, node: ir.Node) -> None:
    if not rd.ends(node):
        raise rd.refuse(node, "a softmax inside the network")
    rd.set(node, rd.data(node))


_HANDLERS: dict[str, Callable[[_Reader, ir.Node], None]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Add": _add,
    "BatchNormalization": _batch_norm,
    "Relu": _activation(lambda rd, node: nn.ReLU()),
    "LeakyRelu": _activation(lambda rd, node: nn.LeakyReLU(rd.attribute(node, "alpha", 0.01))),
    "Sigmoid": _activation(lambda rd, node: nn.Sigmoid()),
    "Tanh": _activation(lambda rd, node: nn.Tanh()),
    "HardSwish": _activation(lambda rd, node: nn.Hardswish()),
    "Clip": _activation(_clip),
    "MaxPool": _pool,
    "AveragePool": _pool,
    "GlobalMaxPool": _global_pool,
    "GlobalAveragePool": _global_pool,
    "ReduceMean": _mean,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Concat": _concat,
    "Resize": _resize,
    "Upsample": _resize,
    "Identity": _same,
    "Dropout": _same,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
}
