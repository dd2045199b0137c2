"""From the lowered graph to native steps: channels last, one step per kernel call.

A graph tensor ``(N, C, *spatial)`` is held natively as ``(*spatial, C)`` without its batch; tensors of rank 2
keep their order. With ``A`` the logical array without its batch, the memory of a native tensor is
``transpose(reshape(A, view), perm)`` in row-major order; `NativeTensor.pack` and `.unpack` say just that.

A Reshape is a plain alias of memory when both sides spell the same order. Otherwise there are two cases:

1. the reshaped tensor is read by Linear nodes only: it stays an alias, its ``view`` and ``perm`` are those of
   the tensor it aliases, and the columns of those weights are permuted instead;
2. a ``transpose`` step brings the input to logical order, the reshape aliases that, and a second
   ``transpose`` step brings the result to channels last (each only where it moves something).

Calls for which ``op.row_major(call)`` holds (Linear and MatMul on rank 3 and more, which contract the last
*logical* axis) read and write logical order, with ``transpose`` steps around them where that moves something.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from edgemat.errors import UnsupportedOpError

_MAX_RANK = 4


@dataclass(frozen=True)
class NativeTensor:
    """A tensor as a target stores it.

    Attributes:
        name: unique in its network.
        view: logical shape without batch, before the permutation.
        perm: native axis ``i`` is axis ``perm[i]`` of ``view``.
        logical: the graph tensor's shape without batch (``unpack`` returns this shape).
        format: the tensor's `Fixed`.
        lo: smallest code that can occur.
        hi: largest code that can occur.
        source: the graph tensor whose codes it holds.
        values: int64 codes in native order, shape ``[size]``, for a constant operand; else None.
    """

    name: str
    view: tuple[int, ...]
    perm: tuple[int, ...]
    logical: tuple[int, ...]
    format: Any
    lo: int
    hi: int
    source: str
    values: np.ndarray | None = field(default=None, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Native shape, without batch."""
        return tuple(self.view[axis] for axis in self.perm)

    @property
    def size(self) -> int:
        """Number of elements of one sample."""
        return int(np.prod(self.view, dtype=np.int64))

    def pack(self, codes: np.ndarray) -> np.ndarray:
        """Graph codes ``[N, *logical]`` to native codes ``[N, size]``."""
        codes = np.asarray(codes)
        axes = (0, *(axis + 1 for axis in self.perm))
        return codes.reshape(len(codes), *self.view).transpose(axes).reshape(len(codes), self.size)

    def unpack(self, flat: np.ndarray) -> np.ndarray:
        """Native codes ``[N, size]`` to graph codes ``[N, *logical]``."""
        inverse = np.argsort(self.perm) if self.perm else np.array([], dtype=int)
        axes = (0, *(int(axis) + 1 for axis in inverse))
        return flat.reshape(len(flat), *self.shape).transpose(axes).reshape(len(flat), *self.logical)

    def order(self) -> np.ndarray:
        """Logical flat index held at each native flat position, int64 ``[size]``."""
        return np.arange(self.size, dtype=np.int64).reshape(self.view).transpose(self.perm).reshape(-1)


@dataclass(frozen=True)
class Step:
    """One kernel call (``stem == "reshape"``: an alias of memory, no call).

    Attributes:
        stem: the kernel's stem, ``conv`` for ``conv.c`` / ``conv.hpp``.
        name: unique in its network: the graph node's name, with a suffix for inserted transposes.
        inputs: operands; a constant operand carries ``values``.
        outputs: results.
        params: compile-time integers (section 4 of docs/internals.md).
        arrays: constant arrays in native layout, int64.
        epilogue: what the kernel's sums go through (the graph call's, or the dossier's own) or None.
        bounds: the kernel's accumulator's intervals or None.
        node: name of the graph node this step comes from.
    """

    stem: str
    name: str
    inputs: tuple[NativeTensor, ...]
    outputs: tuple[NativeTensor, ...]
    params: dict[str, Any]
    arrays: dict[str, np.ndarray]
    epilogue: Any
    bounds: Any
    node: str


@dataclass(frozen=True)
class NativeState:
    """A recurrent state: ``read`` is what a step's readers see, ``written`` what the next step is to read.

    Both have the same layout and format and share no memory, so that all states may be written when a step is done.
    ``held`` is ``written`` as the state's own memory holds it then; its source is the graph output of the state.
    """

    name: str
    read: NativeTensor
    written: NativeTensor
    held: NativeTensor


@dataclass(frozen=True)
class Network:
    """A whole graph in native layout; ``steps`` are in execution order."""

    name: str
    inputs: tuple[NativeTensor, ...]
    outputs: tuple[NativeTensor, ...]
    steps: tuple[Step, ...]
    graph: Any
    states: tuple[NativeState, ...] = ()

    def tensors(self) -> dict[str, NativeTensor]:
        """Every non-constant tensor by name, in the order in which it is written."""
        found = {tensor.name: tensor for tensor in (*self.inputs, *(state.read for state in self.states))}
        for step in self.steps:
            found.update((tensor.name, tensor) for tensor in step.outputs)
        return found


def channels_last(rank: int) -> tuple[int, ...]:
    """Permutation of a sample of ``rank`` axes (batch not counted): channels go last where rank is 2 or 3."""
    return (*range(1, rank), 0) if rank in (2, 3) else tuple(range(rank))


def to_native(graph: Any) -> Network:
    """Turn a `Graph` of `edgemat.lower.reader` into native steps.

    Raises:
        UnsupportedOpError: a permutation needs more than four axes, or a reshape mixes the batch.
    """
    return _Builder(graph).build()


class _Builder:
    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.steps: list[Step] = []
        self.tensors: dict[str, NativeTensor] = {}
        self.logical: dict[str, NativeTensor] = {}
        self.readers: dict[str, list[Any]] = {}
        self.states = tuple(getattr(graph, "states", ()))
        self.leaving = {*graph.outputs, *(state.written for state in self.states)}
        for call in graph.nodes:
            for name in call.inputs:
                if name:
                    self.readers.setdefault(name, []).append(call)

    def build(self) -> Network:
        inputs = tuple(self.declare(name) for name in self.graph.inputs)
        reads = [self.declare(state.read) for state in self.states]
        last = None
        for last in self.graph.nodes:
            if last.op.stem == "reshape":
                self.reshape(last)
            else:
                self.call(last)
        outputs = tuple(self.in_channels_last(name, last) for name in self.graph.outputs)
        written = [self.apart(self.in_channels_last(state.written, last), last) for state in self.states]
        states = tuple(
            NativeState(state.name, read, given, replace(given, source=state.output))
            for state, read, given in zip(self.states, reads, written, strict=True)
        )
        return Network(self.graph.name, inputs, outputs, tuple(self.steps), self.graph, states)

    def native(self, name: str) -> NativeTensor:
        tensor = self.graph.tensors[name]
        shape = tensor.sample_shape
        perm = channels_last(len(shape)) if tensor.batched else tuple(range(len(shape)))
        return NativeTensor(name, shape, perm, shape, tensor.format, int(tensor.lo), int(tensor.hi), name)

    def declare(self, name: str) -> NativeTensor:
        self.tensors[name] = self.native(name)
        return self.tensors[name]

    def call(self, call: Any) -> None:
        native = call.op.native(call)
        arrays = {key: np.asarray(value) for key, value in native.arrays.items()}
        wants_logical = call.op.row_major(call)
        inputs = []
        for position, name in enumerate(call.inputs):
            if not name:
                continue
            if call.constant(position) is not None:
                given = arrays.pop(f"x{position}", None)
                if given is not None or not native.arrays:
                    inputs.append(self.constant(call, position, wants_logical, given))
            elif wants_logical:
                inputs.append(self.in_logical_order(name, call))
            else:
                inputs.append(self.in_channels_last(name, call))
        if call.op.stem == "linear":
            order = inputs[0].order()
            if len(inputs[0].logical) == 1 and not np.array_equal(order, np.arange(len(order))):
                arrays["weight"] = arrays["weight"][:, order]
        if wants_logical:
            outputs = [self.logical_twin(self.native(name)) for name in call.outputs]
        else:
            outputs = [self.declare(name) for name in call.outputs]
        self.steps.append(
            Step(
                call.op.stem, call.name, tuple(inputs), tuple(outputs), dict(native.params), arrays,
                native.epilogue or call.epilogue, native.bounds or call.bounds, call.name,
            )
        )  # fmt: skip
        if wants_logical:
            for name, output in zip(call.outputs, outputs, strict=True):
                self.know_logical(name, output)

    def constant(self, call: Any, position: int, wants_logical: bool, given: np.ndarray | None) -> NativeTensor:
        """A constant operand, from the array its dossier gives in native layout or from its codes."""
        name = call.inputs[position]
        tensor = call.x[position]
        codes = np.asarray(call.constant(position), dtype=np.int64)
        lo, hi = int(codes.min()), int(codes.max())
        if given is not None:
            plain = tuple(range(given.ndim))
            return NativeTensor(name, given.shape, plain, given.shape, tensor.format, lo, hi, name, given.reshape(-1))
        rank = max(len(y.shape) for y in call.y)
        shape = (1,) * (rank - codes.ndim) + codes.shape
        if shape[0] != 1:
            raise UnsupportedOpError(
                f"node {call.name!r}: constant operand {name!r} has shape {codes.shape}, expected no batch"
                " axis or one of 1; give the constant the shape of one sample"
            )
        view = shape[1:]
        perm = tuple(range(len(view))) if wants_logical else channels_last(len(view))
        values = codes.reshape(view).transpose(perm).reshape(-1)
        return NativeTensor(name, view, perm, view, tensor.format, lo, hi, name, values)

    def logical_twin(self, tensor: NativeTensor) -> NativeTensor:
        perm = tuple(range(len(tensor.view)))
        if _moves_nothing(tensor.view, tensor.perm):
            return replace(tensor, perm=perm)
        name = f"{tensor.name}/logical"
        while name in self.graph.tensors:
            name += "_"
        return replace(tensor, name=name, perm=perm)

    def in_logical_order(self, name: str, call: Any) -> NativeTensor:
        if name not in self.logical:
            tensor = self.tensors[name]
            twin = self.logical_twin(tensor)
            if twin.name != tensor.name:
                self.transpose(tensor, twin, call)
            self.logical[name] = twin
        return self.logical[name]

    def know_logical(self, name: str, twin: NativeTensor) -> None:
        """A tensor was written in logical order; where that is channels last too, it is available as both."""
        self.logical[name] = twin
        if twin.name == name:
            self.declare(name)

    def in_channels_last(self, name: str, call: Any) -> NativeTensor:
        if name not in self.tensors:
            self.transpose(self.logical[name], self.declare(name), call)
        return self.tensors[name]

    def transpose(self, source: NativeTensor, target: NativeTensor, call: Any) -> None:
        """Append a step that copies ``source`` into the memory order of ``target`` (same view)."""
        axis_stride = np.cumprod([1, *source.shape[:0:-1]])[::-1].tolist() if source.shape else []
        by_view = dict(zip(source.perm, axis_stride, strict=True))
        dims = [(target.view[axis], by_view[axis]) for axis in target.perm if target.view[axis] != 1]
        merged: list[tuple[int, int]] = []
        for size, stride in dims:
            if merged and merged[-1][1] == size * stride:
                merged[-1] = (merged[-1][0] * size, stride)
            else:
                merged.append((size, stride))
        if len(merged) > _MAX_RANK:
            raise UnsupportedOpError(
                f"node {call.name!r}: its change of layout needs {len(merged)} axes, at most {_MAX_RANK} are"
                " supported; reshape in smaller steps"
            )
        merged = [(1, 0)] * (_MAX_RANK - len(merged)) + merged
        params = {
            "dims": tuple(size for size, _ in merged),
            "stride": tuple(stride for _, stride in merged),
            "offset": 0,
        }
        name = self.unused(f"{call.name}/layout")
        self.steps.append(Step("transpose", name, (source,), (target,), params, {}, None, None, call.name))

    def reshape(self, call: Any) -> None:
        name_in, name_out = call.inputs[0], call.outputs[0]
        result = self.native(name_out)
        sources = [known[name_in] for known in (self.tensors, self.logical) if name_in in known]
        if sources[0].size != result.size:
            raise UnsupportedOpError(
                f"node {call.name!r}: reshape turns {sources[0].logical} into {result.logical} and so mixes the"
                " batch with other axes; expected a reshape within one sample"
            )
        readers = self.readers.get(name_out, [])
        only_linear = (
            len(result.logical) == 1
            and name_out not in self.leaving
            and bool(readers)
            and all(reader.op.stem == "linear" and not reader.op.row_major(reader) for reader in readers)
        )
        for source in sources:
            if np.array_equal(source.order(), result.order()):
                self.alias(call, source, result)
                self.tensors[name_out] = result
                return
        if only_linear:  # case 1
            source = sources[0]
            self.tensors[name_out] = replace(result, view=source.view, perm=source.perm)
            self.alias(call, source, self.tensors[name_out])
        else:  # case 2
            plain = self.in_logical_order(name_in, call)
            twin = self.logical_twin(result)
            self.alias(call, plain, twin)
            self.know_logical(name_out, twin)

    def apart(self, tensor: NativeTensor, call: Any) -> NativeTensor:
        """What a state is written with: a copy where that is a state itself, which may change before it is read."""
        memory = {step.outputs[0].name: step.inputs[0].name for step in self.steps if step.stem == "reshape"}
        root = tensor.name
        while root in memory:
            root = memory[root]
        if root not in {state.read for state in self.states}:
            return tensor
        copied = replace(tensor, name=self.unused(f"{tensor.name}/next"))
        params = {"dims": (1, 1, 1, tensor.size), "stride": (0, 0, 0, 1), "offset": 0}
        node = tensor.source if call is None else call.name
        name = self.unused(f"{node}/next")
        self.steps.append(Step("transpose", name, (tensor,), (copied,), params, {}, None, None, node))
        return copied

    def unused(self, name: str) -> str:
        taken = {step.name for step in self.steps} | {y.name for step in self.steps for y in step.outputs}
        while name in taken or name in self.graph.tensors:
            name += "_"
        return name

    def alias(self, call: Any, source: NativeTensor, result: NativeTensor) -> None:
        self.steps.append(Step("reshape", call.name, (source,), (result,), {}, {}, None, None, call.name))


def _moves_nothing(view: tuple[int, ...], perm: tuple[int, ...]) -> bool:
    kept = [axis for axis in perm if view[axis] != 1]
    return kept == sorted(kept)
