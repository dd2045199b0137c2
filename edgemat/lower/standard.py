"""Standard ONNX operators that are exact on codes, and the symbolic nodes of edgemat's torch layers, as edgemat nodes.

Each handler takes an `Importer` and a source node and registers what the node's outputs become. What has no handler
is refused by name; nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from edgemat.body import DOMAIN
from edgemat.codes import Codes
from edgemat.formats import Fixed
from edgemat.lower.importer import Importer
from edgemat.op import REAL, Tensor, code_dtype

Handler = Callable[[Importer, ir.Node], None]
HANDLERS: dict[str, Handler] = {}


def handles(*op_types: str) -> Callable[[Handler], Handler]:
    """Marks a function as the handler of standard operators."""

    def mark(function: Handler) -> Handler:
        for op_type in op_types:
            HANDLERS[op_type] = function
        return function

    return mark


SYMBOLIC_KEYS = {"a_format": "w_format"}
SYMBOLIC_NAMES = {"Constant": "Literal"}


def symbolic(imp: Importer, node: ir.Node) -> None:
    """A node the torch layers emitted: codes are stored in their code type, attributes checked by the dossier."""
    if node.op_type == "State":
        imp.state(node, str(imp.attr(node, "name")), Fixed.parse(str(imp.attr(node, "y_format"))))
        return
    if node.op_type == "NextState":
        return  # it closes a graph output: `Importer.next_state`
    attrs = {SYMBOLIC_KEYS.get(k, k): imp.attr(node, k) for k in node.attributes if k not in ("version",)}
    op_type = SYMBOLIC_NAMES.get(node.op_type, node.op_type)
    if op_type == "Quantize" and imp.type(imp.operand(node, 0)).format is not REAL:
        op_type = "Requantize"  # a layer's own input quantiser behind another layer
    if op_type == "Requantize" and "y_format" in attrs:
        attrs["requantize"] = attrs.pop("y_format")
    for key in [k for k in attrs if k.endswith("format") or k == "requantize"]:
        if attrs[key]:
            attrs[key] = str(Fixed.parse(attrs[key]))
    inputs: list[ir.Value] = []
    for index, value in enumerate(node.inputs):
        if value is None:
            continue
        codes: np.ndarray | Codes | None = imp.deferred(value)
        codes = imp.constant(value) if codes is None else codes
        if codes is None or (index == 0 and node.op_type != "Constant"):
            inputs.append(imp.operand(node, index))
            continue
        inputs.append(imp.initializer(codes, _stored_as(node.op_type, index, attrs), value.name or "codes"))
    imp.emit(node, op_type, inputs, attrs)


def _stored_as(op_type: str, index: int, attrs: dict[str, object]) -> np.dtype:
    """Type codes of a constant operand are stored in: that of their format; biases are int32."""
    if op_type in ("Linear", "Conv", "ConvTranspose", "Affine", "LayerNorm") and index == 2:
        return np.dtype(np.int32)
    if op_type == "Thresholds":
        return np.dtype(np.int64)
    for key in ("w_format", "slope_format", "table_format", "y_format"):
        if attrs.get(key):
            return code_dtype(Fixed.parse(str(attrs[key])))
    return np.dtype(np.int64)


@handles("Identity", "Cast", "Dropout")
def identity(imp: Importer, node: ir.Node) -> None:
    """Codes pass through: casts between float types do not change a value edgemat carries exactly."""
    imp.alias(node.outputs[0], imp.operand(node, 0))


@handles("Relu")
def relu(imp: Importer, node: ir.Node) -> None:
    """max(x, 0)."""
    imp.emit(node, "Relu", [imp.operand(node, 0)], {})


@handles("Clip")
def clip(imp: Importer, node: ir.Node) -> None:
    """Clamping to constants; their grid may be finer than the input's."""
    x = imp.operand(node, 0, per_tensor=True)
    tensor = imp.type(x)
    frac = tensor.format.fracs[0]
    limits = []
    for index in (1, 2):
        value = node.inputs[index] if index < len(node.inputs) else None
        limits.append(None if value is None else float(imp.required(node, index).reshape(())))
    align = 0
    for limit in limits:
        if limit is not None and np.isfinite(limit):
            while limit * 2.0 ** (frac + align) != np.floor(limit * 2.0 ** (frac + align)):
                align += 1
                if align > 32:
                    raise imp.refuse(node, f"the limit {limit} is no short binary fraction", "clamp to a dyadic number")
    low, high = limits
    lo = tensor.lo << align if low is None or np.isinf(low) else int(low * 2.0 ** (frac + align))
    hi = tensor.hi << align if high is None or np.isinf(high) else int(high * 2.0 ** (frac + align))
    imp.emit(node, "Clip", [x], {"low": lo, "high": hi, "align": align})


@handles("Add", "Sub", "Mul")
def elementwise(imp: Importer, node: ir.Node) -> None:
    """Two variables, or one and an edgemat Constant."""
    for index in (0, 1):
        value = node.inputs[index]
        if value is not None and imp.constant(value) is not None:
            raise imp.refuse(
                node,
                f"operand {index} is a float constant without a format",
                "use edgemat.quantize, or give the constant a format with edgemat.nn.QuantConstant",
            )
    imp.emit(node, node.op_type, [imp.operand(node, 0), imp.operand(node, 1)], {})


@handles("MatMul")
def matmul(imp: Importer, node: ir.Node) -> None:
    """Two variables; leading axes broadcast by hand are refused by the dossier."""
    if any(v is not None and imp.constant(v) is not None for v in node.inputs):
        raise imp.refuse(node, "a matrix product with float weights", "use edgemat.nn.QuantLinear")
    imp.emit(node, "MatMul", [imp.operand(node, 0), imp.operand(node, 1)], {})


@handles("MaxPool")
def max_pool(imp: Importer, node: ir.Node) -> None:
    """1-D and 2-D max pooling."""
    kernel = tuple(imp.attr(node, "kernel_shape"))
    rank = len(kernel)
    if imp.attr(node, "auto_pad", "NOTSET") != "NOTSET" or len(node.outputs) > 1:
        raise imp.refuse(node, "auto_pad or an index output", "give explicit pads and use only the first output")
    imp.emit(
        node,
        "MaxPool",
        [imp.operand(node, 0)],
        {
            "kernel_shape": kernel,
            "strides": tuple(imp.attr(node, "strides", (1,) * rank)),
            "pads": tuple(imp.attr(node, "pads", (0,) * 2 * rank)),
            "dilations": tuple(imp.attr(node, "dilations", (1,) * rank)),
            "ceil_mode": imp.attr(node, "ceil_mode", 0),
        },
    )


@handles("GlobalMaxPool")
def global_max_pool(imp: Importer, node: ir.Node) -> None:
    """Max over the whole map."""
    x = imp.operand(node, 0)
    kernel = imp.type(x).sample_shape[1:]
    attrs = {"kernel_shape": kernel, "strides": (1,) * len(kernel), "pads": (0,) * 2 * len(kernel)}
    imp.emit(node, "MaxPool", [x], attrs)


@handles("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(imp: Importer, node: ir.Node) -> None:
    """The shape the exporter inferred; the batch stays on axis 0."""
    x = imp.operand(node, 0)
    source = imp.type(x)
    shape = node.outputs[0].shape
    if shape is None:
        raise imp.refuse(node, "an output of unknown shape", "reshape to constant sizes behind the batch")
    dims = list(shape)
    tail = [d if isinstance(d, int) else None for d in dims[1:]]
    if not dims or None in tail or int(np.prod([d for d in tail if d is not None], dtype=np.int64)) != source.size:
        raise imp.refuse(node, f"{source.shape} to {dims}", "keep the batch on axis 0 and fixed sizes behind it")
    target = tuple(int(d) for d in tail if d is not None)
    if source.format.per_channel and len(target) != 1 and target[:1] != source.sample_shape[:1]:
        x = imp.operand(node, 0, per_tensor=True)
    imp.emit(node, "Reshape", [x], {"shape": target})


@handles("Transpose")
def transpose(imp: Importer, node: ir.Node) -> None:
    """Permutations that keep the batch first."""
    x = imp.operand(node, 0, per_tensor=True)
    rank = len(imp.type(x).shape)
    perm = tuple(imp.attr(node, "perm", tuple(reversed(range(rank)))))
    if not perm or perm[0] != 0:
        raise imp.refuse(node, f"perm {perm} moves the batch axis", "keep axis 0 in its place")
    imp.emit(node, "Transpose", [x], {"perm": tuple(p - 1 for p in perm[1:])})


@handles("Concat")
def concat(imp: Importer, node: ir.Node) -> None:
    """Joins behind the batch axis; a single input passes through."""
    x = [imp.operand(node, i) for i in range(len(node.inputs))]
    axis = imp.sample_axis(node, int(imp.attr(node, "axis")), imp.type(x[0]))
    if len(x) == 1:
        imp.alias(node.outputs[0], x[0])
    else:
        imp.emit(node, "Concat", x, {"axis": axis})


def _slice_to(
    imp: Importer, node: ir.Node, output: ir.Value, x: ir.Value, parts: dict[int, tuple[int, int, int]]
) -> None:
    shape = imp.type(x).sample_shape
    starts, sizes, steps = [], [], []
    for axis, extent in enumerate(shape):
        start, size, step = parts.get(axis, (0, extent, 1))
        starts.append(start)
        sizes.append(size)
        steps.append(step)
    attrs = {"starts": tuple(starts), "sizes": tuple(sizes), "steps": tuple(steps)}
    imp.emit(node, "Slice", [x], attrs, output=output)


@handles("Split")
def split(imp: Importer, node: ir.Node) -> None:
    """One Slice for each output."""
    x = imp.operand(node, 0, per_tensor=True)
    tensor = imp.type(x)
    axis = imp.sample_axis(node, int(imp.attr(node, "axis", 0)), tensor)
    extent = tensor.sample_shape[axis]
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        sizes = [int(v) for v in imp.required(node, 1).reshape(-1)]
    elif "split" in node.attributes:  # operator sets before 13
        sizes = [int(v) for v in imp.attr(node, "split")]
    else:
        chunk = -(-extent // len(node.outputs))
        sizes = [min(chunk, extent - i * chunk) for i in range(len(node.outputs))]
    if sum(sizes) != extent or min(sizes) < 1 or len(sizes) != len(node.outputs):
        raise imp.refuse(node, f"sizes {sizes} of an axis of {extent}", "every part needs at least one element")
    start = 0
    for output, size in zip(node.outputs, sizes, strict=True):
        if output.uses() or output.is_graph_output():
            _slice_to(imp, node, output, x, {axis: (start, size, 1)})
        start += size


@handles("Slice")
def slice_(imp: Importer, node: ir.Node) -> None:
    """Constant starts, ends, axes and steps."""
    x = imp.operand(node, 0, per_tensor=True)
    tensor = imp.type(x)
    starts, ends = imp.required(node, 1).reshape(-1), imp.required(node, 2).reshape(-1)
    given = [len(node.inputs) > i and node.inputs[i] is not None for i in range(5)]
    axes = imp.required(node, 3).reshape(-1) if given[3] else np.arange(len(starts))
    steps = imp.required(node, 4).reshape(-1) if given[4] else np.ones(len(starts), np.int64)
    parts: dict[int, tuple[int, int, int]] = {}
    for start, end, axis, step in zip(starts.tolist(), ends.tolist(), axes.tolist(), steps.tolist(), strict=True):
        if axis in (0, -len(tensor.shape)):
            if start == 0 and end >= (1 << 31) - 1 and step == 1:
                continue
            raise imp.refuse(node, "a slice of the batch axis", "slice behind the batch only")
        position = imp.sample_axis(node, axis, tensor)
        chosen = range(tensor.sample_shape[position])[slice(start, end if abs(end) < 1 << 62 else None, step)]
        if not len(chosen):
            raise imp.refuse(node, f"an empty slice [{start}:{end}:{step}]", "keep at least one element")
        parts[position] = (chosen[0], len(chosen), step)
    _slice_to(imp, node, node.outputs[0], x, parts)


@handles("Gather")
def gather(imp: Importer, node: ir.Node) -> None:
    """Indexing one position (x[:, i]): a Slice and a Reshape."""
    x = imp.operand(node, 0, per_tensor=True)
    tensor = imp.type(x)
    index = imp.required(node, 1)
    axis = imp.sample_axis(node, int(imp.attr(node, "axis", 0)), tensor)
    if index.size != 1 or index.ndim > 1:
        raise imp.refuse(node, f"{index.size} indices", "index one position, or use slices and cat")
    at = int(index.reshape(-1)[0]) % tensor.sample_shape[axis]
    if index.ndim == 1:
        _slice_to(imp, node, node.outputs[0], x, {axis: (at, 1, 1)})
        return
    middle = ir.Value(name=f"{node.outputs[0].name}_slice")
    _slice_to(imp, node, middle, x, {axis: (at, 1, 1)})
    shape = tensor.sample_shape[:axis] + tensor.sample_shape[axis + 1 :]
    imp.emit(node, "Reshape", [imp.mapped(middle)], {"shape": shape})


@handles("Pad")
def pad(imp: Importer, node: ir.Node) -> None:
    """Constant padding with a value the format holds."""
    x = imp.operand(node, 0, per_tensor=True)
    tensor = imp.type(x)
    if imp.attr(node, "mode", "constant") != "constant":
        raise imp.refuse(node, f"mode {imp.attr(node, 'mode')!r}", "only constant padding is supported")
    pads = [int(v) for v in imp.required(node, 1).reshape(-1)]
    rank = len(tensor.shape)
    axes = list(range(rank))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        axes = [int(a) % rank for a in imp.required(node, 3).reshape(-1)]
    before, after = [0] * rank, [0] * rank
    for position, axis in enumerate(axes):
        before[axis], after[axis] = pads[position], pads[position + len(axes)]
    value = 0.0
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        value = float(imp.required(node, 2).reshape(-1)[0])
    code = value * 2.0 ** tensor.format.fracs[0]
    if before[0] or after[0] or code != np.floor(code):
        raise imp.refuse(
            node, f"padding of the batch or with {value}", f"pad samples with a value {tensor.format} holds"
        )
    attrs = {"before": tuple(before[1:]), "after": tuple(after[1:]), "value": int(code)}
    imp.emit(node, "Pad", [x], attrs)


@handles("ArgMax")
def arg_max(imp: Importer, node: ir.Node) -> None:
    """Index of the largest code."""
    x = imp.operand(node, 0, per_tensor=True)
    axis = imp.sample_axis(node, int(imp.attr(node, "axis", 0)), imp.type(x))
    attrs = {"axis": axis, "keepdims": imp.attr(node, "keepdims", 1), "last": imp.attr(node, "select_last_index", 0)}
    imp.emit(node, "ArgMax", [x], attrs)


@handles("Resize")
def resize(imp: Importer, node: ir.Node) -> None:
    """Nearest-neighbour enlargement by whole factors; the sizes the exporter inferred decide."""
    x = imp.operand(node, 0)
    source: Tensor = imp.type(x)
    shape = node.outputs[0].shape
    if imp.attr(node, "mode", "nearest") != "nearest" or shape is None:
        raise imp.refuse(node, f"mode {imp.attr(node, 'mode', 'nearest')!r}", "only nearest is exact")
    scales = []
    for extent, wanted in zip(source.sample_shape[1:], list(shape)[2:], strict=True):
        if not isinstance(wanted, int) or wanted % extent:
            raise imp.refuse(node, f"{source.shape} to {list(shape)}", "enlarge by a whole factor")
        scales.append(wanted // extent)
    imp.emit(node, "Upsample", [x], {"scales": tuple(scales)})


@handles("Expand", "Tile")
def refuse_expand(imp: Importer, node: ir.Node) -> None:
    """Broadcasting by copy has no native form."""
    raise imp.refuse(node, "an explicit broadcast", "let Add, Sub or Mul broadcast, or use nn.Upsample")


def import_node(imp: Importer, node: ir.Node) -> None:
    """Dispatches one source node."""
    if node.domain == DOMAIN:
        symbolic(imp, node)
        return
    handler = HANDLERS.get(node.op_type) if node.domain == "" else None
    if handler is None:
        raise imp.unsupported(node)
    handler(imp, node)
