"""The workbench of an import: source values on one side, typed edgemat nodes on the other."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgemat.body import DOMAIN, OPSET
from edgemat.codes import Codes
from edgemat.errors import LoweringError, UnsupportedOpError
from edgemat.formats import Fixed
from edgemat.lower.data_file import SMALLEST, DataWriter
from edgemat.lower.passes.align_operands import common_format
from edgemat.lower.passes.surgery import make_node
from edgemat.lower.typing import META, STORED, input_type, type_node, type_of
from edgemat.op import REAL, Op, Tensor, code_dtype
from edgemat.ops import BY_NAME


class Importer:
    """Builds a graph of typed edgemat nodes from a source graph.

    Attributes:
        graph: The graph under construction.

    Args:
        name: Name of the model.
        deferred: Codes that are made only now, block by block, by the name of the initializer that stands for them.
        data: Where large constants are stored, or None for the model itself.
    """

    def __init__(self, name: str, deferred: Mapping[str, Codes] | None = None, data: DataWriter | None = None) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, DOMAIN: 1}, name=name)
        self._map: dict[ir.Value, ir.Value] = {}
        self._names: set[str] = set()
        self._states: dict[str, str] = {}
        self._shared: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._placed: dict[int, ir.Value] = {}
        self._deferred = deferred or {}
        self._data = data

    # -- the source side --------------------------------------------------------------------------------------
    def refuse(self, node: ir.Node, found: str, remedy: str) -> LoweringError:
        """A LoweringError naming a source node."""
        return LoweringError(f"node {node.name!r} ({node.op_type}): {found}; {remedy}")

    def unsupported(self, node: ir.Node) -> UnsupportedOpError:
        """The refusal of an operator nobody handles."""
        kind = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        return UnsupportedOpError(
            f"node {node.name!r} is {kind}, which has no exact integer form here; quantise the model with "
            "edgemat.quantize, or replace it by an edgemat.nn layer (`edgemat ops` lists the operators)"
        )

    def attr(self, node: ir.Node, key: str, default: Any = None) -> Any:
        """A source attribute as plain Python; lists become tuples."""
        attr = node.attributes.get(key)
        if attr is None:
            if default is None:
                raise self.refuse(node, f"the attribute {key!r} is missing", "write the file again")
            return default
        return tuple(attr.value) if isinstance(attr.value, (list, tuple)) else attr.value

    def constant(self, value: ir.Value) -> np.ndarray | None:
        """Numbers of a source initializer or Constant node, else None."""
        if value.const_value is not None:
            return np.asarray(value.const_value.numpy())
        producer = value.producer()
        if producer is None or producer.domain != "":
            return None
        if producer.op_type == "Constant":
            attr = next(iter(producer.attributes.values()))
            return np.asarray(attr.value.numpy() if attr.type == ir.AttributeType.TENSOR else attr.value)
        if producer.op_type in ("Identity", "Cast") and producer.inputs[0] is not None:
            inner = self.constant(producer.inputs[0])
            if inner is None or producer.op_type == "Identity":
                return inner
            return inner.astype(ir.DataType(producer.attributes["to"].value).numpy())
        if producer.op_type in ("CastLike", "Reshape", "Unsqueeze", "Squeeze", "Concat"):
            return self._folded(producer)
        return None

    def _folded(self, node: ir.Node) -> np.ndarray | None:
        """The unoptimised exporter reshapes and casts slice bounds and limits; they are constants all the same."""
        first = node.inputs[0]
        array = None if first is None else self.constant(first)
        if array is None or node.op_type == "CastLike":
            return array
        if node.op_type == "Concat":
            parts = [None if v is None else self.constant(v) for v in node.inputs]
            known = [part for part in parts if part is not None]
            return np.concatenate(known, self.attr(node, "axis")) if len(known) == len(parts) else None
        second = node.inputs[1] if len(node.inputs) > 1 else None
        axes = None if second is None else self.constant(second)
        if axes is None:
            return None
        if node.op_type == "Reshape":
            return array.reshape([int(n) for n in axes])
        places = tuple(int(n) for n in axes)
        return np.expand_dims(array, places) if node.op_type == "Unsqueeze" else np.squeeze(array, places)

    def deferred(self, value: ir.Value) -> Codes | None:
        """The codes that a source initializer only stands for, or None."""
        return self._deferred.get(value.name or "")

    def required(self, node: ir.Node, index: int) -> np.ndarray:
        """A constant input, refused where it is computed."""
        value = node.inputs[index]
        array = None if value is None else self.constant(value)
        if array is None:
            raise self.refuse(node, f"input {index} is computed at run time", "expected a constant")
        return array

    def sample_axis(self, node: ir.Node, axis: int, tensor: Tensor) -> int:
        """An ONNX axis counted behind the batch."""
        rank = len(tensor.shape)
        axis = axis + rank if axis < 0 else axis
        if not 0 < axis < rank:
            raise self.refuse(node, f"axis {axis} of {tensor.shape}", "the batch axis cannot be joined, cut or reduced")
        return axis - 1

    # -- the built side ---------------------------------------------------------------------------------------
    def _unique(self, name: str) -> str:
        base, count = name or "value", 1
        name = base
        while name in self._names:
            count += 1
            name = f"{base}_{count}"
        self._names.add(name)
        return name

    def input(self, source: ir.Value) -> None:
        """Declares a float input."""
        made = ir.Value(name=self._unique(source.name or "x"), type=source.type, shape=source.shape)
        made.meta[META] = input_type(made)
        self.graph.inputs.append(made)
        self._map[source] = made

    def state(self, source: ir.Node, name: str, fmt: Fixed) -> None:
        """Declares a recurrent state: a graph input of codes of the shape `source` has, read by a State node."""
        if name in self._states:
            raise self.refuse(source, f"state {name!r} is read by two nodes", "expected one State a state")
        made = ir.Value(name=self._unique(name), shape=source.outputs[0].shape)
        self._states[name] = made.name or ""
        made.dtype = ir.DataType.from_numpy(code_dtype(fmt))
        made.meta[META] = input_type(made)
        self.graph.inputs.append(made)
        self._map[source.outputs[0]] = self.add("State", [made], {"y_format": str(fmt)}, f"{name}.read")

    def next_state(self, source: ir.Node, name: str) -> None:
        """Closes a state: what `source` takes becomes the graph output ``<name>.next``."""
        if name not in self._states:
            raise self.refuse(
                source, f"state {name!r} is written but never read", "read it in the step, or leave it out"
            )
        name = self._states[name]
        made = self.add("NextState", [self.operand(source, 0)], {"state": name}, f"{name}.write")
        made.name = self._unique(f"{name}.next")
        node = made.producer()
        assert node is not None
        type_node(node)
        self.graph.outputs.append(made)

    def mapped(self, source: ir.Value) -> ir.Value:
        """What a source value has become."""
        return self._map[source]

    def operand(self, node: ir.Node, index: int, per_tensor: bool = False) -> ir.Value:
        """The built value of a source node's input; with `per_tensor` its channels share one binary point."""
        source = node.inputs[index] if index < len(node.inputs) else None
        if source is None or source not in self._map:
            found = "nothing" if source is None else f"{source.name!r}, a float value that was never quantised"
            raise self.refuse(node, f"input {index} is {found}", "quantise it first (edgemat.nn.FixedQuantizer)")
        value = self._map[source]
        tensor = self.type(value)
        if tensor.format is REAL and node.op_type != "Quantize":
            raise self.refuse(
                node,
                f"input {value.name!r} is a float value",
                "put an edgemat.nn.FixedQuantizer at the network's input",
            )
        if per_tensor and tensor.format.per_channel:
            return self.add("Requantize", [value], {"requantize": common_format([tensor])}, f"{value.name}_aligned")
        return value

    def type(self, value: ir.Value) -> Tensor:
        """Type of a built value."""
        tensor = type_of(value)
        assert tensor is not None
        return tensor

    def initializer(self, codes: np.ndarray | Codes, dtype: np.dtype, name: str) -> ir.Value:
        """Stores constant codes, in the data file where there is one and they are large; equal ones are stored once."""
        if self._data is not None and codes.size * dtype.itemsize >= SMALLEST and codes.dtype.kind in "iu":
            return self._placed_in(self._data, codes, dtype, name)
        codes = codes.array() if isinstance(codes, Codes) else codes
        limits = np.iinfo(dtype)
        if codes.dtype.kind not in "iu" or (codes.size and (codes.min() < limits.min or codes.max() > limits.max)):
            raise LoweringError(f"constant {name!r} holds {codes.dtype} that do not fit {dtype} codes")
        data = np.array(codes, dtype=dtype, order="C")
        key = (dtype.str, data.shape, hashlib.sha256(data.data).digest())
        if key not in self._shared:
            value = ir.Value(name=self._unique(name), const_value=ir.tensor(data, name=name))
            value.const_value.name = value.name  # type: ignore[union-attr]
            value.dtype, value.shape = ir.DataType.from_numpy(dtype), ir.Shape(data.shape)
            self.graph.register_initializer(value)
            self._shared[key] = value
        return self._shared[key]

    def _placed_in(self, data: DataWriter, codes: np.ndarray | Codes, dtype: np.dtype, name: str) -> ir.Value:
        """Stores codes in the data file."""
        if isinstance(codes, np.ndarray):
            array = codes
            codes = Codes(array.shape, array.dtype, lambda first, last: array[first:last])
        tensor, stored = data.tensor(codes, dtype, name)
        assert tensor.offset is not None
        if tensor.offset not in self._placed:
            value = ir.Value(name=self._unique(name), const_value=tensor)
            tensor.name = value.name or name
            value.meta[STORED] = stored
            value.dtype, value.shape = tensor.dtype, ir.Shape(stored.shape)
            self.graph.register_initializer(value)
            self._placed[tensor.offset] = value
        return self._placed[tensor.offset]

    def add(self, op_type: str, inputs: Sequence[ir.Value], attrs: dict[str, Any], name: str) -> ir.Value:
        """Appends a typed node of its own name; returns its output."""
        op = BY_NAME.get(op_type)
        if op is None:
            raise UnsupportedOpError(f"node {name!r} is edgemat::{op_type}, which this edgemat does not know")
        inputs = [self._aligned(op, v) for v in inputs]
        if op.same_format:
            types = [self.type(v) for v in inputs]
            if len({str(t.format) for t in types}) > 1:
                target = common_format(types)
                inputs = [v if str(self.type(v).format) == target else self._to(v, target) for v in inputs]
        name = self._unique(name)
        node = make_node(op_type, inputs, attrs, name, self._unique(f"{name}_out"))
        self.graph.append(node)
        type_node(node)
        return node.outputs[0]

    def _aligned(self, op: Op, value: ir.Value) -> ir.Value:
        tensor = type_of(value)
        if tensor is None or value.is_initializer() or not tensor.format.per_channel or op.takes_channels(tensor):
            return value
        return self._to(value, common_format([tensor]))

    def _to(self, value: ir.Value, target: str) -> ir.Value:
        return self.add("Requantize", [value], {"requantize": target}, f"{value.name}_aligned")

    def emit(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value],
        attrs: dict[str, Any],
        output: ir.Value | None = None,
    ) -> None:
        """Appends the typed node a source node becomes."""
        self.alias(output or node.outputs[0], self.add(op_type, inputs, attrs, source_name(node)))

    def alias(self, source: ir.Value, built: ir.Value) -> None:
        """A source value is this built value."""
        self._map[source] = built

    def output(self, source: ir.Value, name: str, attrs: dict[str, Any] | None = None) -> None:
        """Closes a graph output, called `name`, with a Dequantize (of the attributes `attrs`)."""
        value = self._map.get(source)
        if value is None or self.type(value).format is REAL:
            raise LoweringError(f"output {name!r} is not quantised; end the network in edgemat layers")
        made = self.add("Dequantize", [value], attrs or {}, f"{name}_dequantize")
        made.name = self._unique(name)
        node = made.producer()
        assert node is not None
        type_node(node)
        self.graph.outputs.append(made)


def source_name(node: ir.Node) -> str:
    """The module path torch's exporter noted for a node ("layer1.conv"), or the node's own name."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    except (ValueError, SyntaxError):
        scopes = []
    inner = [str(s) for s in scopes if s and not str(s).startswith("_")]
    if not inner:
        return node.name or node.op_type
    path = inner[-2] if len(inner) > 1 and str(scopes[-1]) == inner[-1] else inner[-1]
    return path.removesuffix(".output_quantizer")
