"""torch to the lowered file: torch.export, its ONNX exporter, then edgemat's import and passes."""

from __future__ import annotations

import inspect
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from edgemat.errors import EdgematError, LoweringError
from edgemat.lower.data_file import DataWriter
from edgemat.lower.importer import Importer
from edgemat.lower.passes import simplify
from edgemat.lower.standard import import_node
from edgemat.lower.writer import finish, write

LARGE = 1 << 26
"""Parameters from which weights go to a data file by default."""

Example = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor]


def to_onnx(
    module: torch.nn.Module,
    example_input: Example,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    external_data: bool | None = None,
) -> None:
    """Writes a quantised module as a lowered ONNX file that a stock onnxruntime runs.

    Args:
        module: Result of `edgemat.quantize`, or a module of `edgemat.nn` layers. Exported in eval mode; the mode it was
            in is restored and nothing in it changes.
        example_input: A float tensor [N, ...], a tuple of them, or a dict by argument name; only shapes matter.
        path: File to write (atomically).
        name: Name of the model in the file; by default the module's class or graph name.
        external_data: Whether weights of 1 KiB and more go to a data file beside the model, written block by block
            (docs/lowered-format.md); by default where the module has 2**26 parameters or more.

    Raises:
        LoweringError: if something in the model has no exact integer form; the message names the node and the remedy.
        FormatError: if a weight is NaN or a format cannot hold its range.
    """
    if external_data is None and isinstance(module, torch.nn.Module):
        external_data = sum(parameter.numel() for parameter in module.parameters()) >= LARGE
    if not external_data:
        return write(lowered(module, example_input, name=name), path)
    data = DataWriter(Path(path))
    try:
        write(lowered(module, example_input, name=name, data=data), path, data)
    finally:
        data.discard()
    return None


def lowered(
    module: torch.nn.Module, example_input: Example, *, name: str | None = None, data: DataWriter | None = None
) -> ir.Model:
    """The lowered model of `to_onnx`, not yet written; with `data`, its large weights are in the data file."""
    from edgemat.nn import prepare_export
    from edgemat.nn.conversion import network_name
    from edgemat.nn.preparation import deferred_codes

    if not isinstance(module, torch.nn.Module):
        raise LoweringError(f"to_onnx got a {type(module).__name__}, expected a torch.nn.Module")
    example = two_samples(example_input)
    prepared = prepare_export(module, defer=data is not None)
    if isinstance(example, dict):
        # The exporter pairs keyword arguments with inputs by position: those of `forward`.
        places = {name: place for place, name in enumerate(inspect.signature(prepared.forward).parameters)}
        example = dict(sorted(example.items(), key=lambda item: places.get(item[0], len(places))))
    try:
        source, names = traced(prepared, example)
        imp = Importer(_legal(name or network_name(module)), deferred_codes(prepared), data)
        return _lowered(imp, source, names)
    except EdgematError as error:
        shapes = _samples_without_batch(prepared, example_input)
        if shapes is None:
            raise
        raise LoweringError(
            f"the example input has shape {shapes}, which the model takes only with one axis more, expected a batch of "
            "samples on axis 0; add the axis: x.unsqueeze(0)"
        ) from error


def _lowered(imp: Importer, source: ir.Model, names: list[str]) -> ir.Model:
    graph = source.graph
    for value in graph.inputs:
        imp.input(value)
    needed = _needed(graph)
    for node in graph:
        if node in needed and not (node.domain == "" and node.op_type in _SHAPE_ONLY) and not _is_constant(imp, node):
            import_node(imp, node)
    for value, label in zip(graph.outputs, names, strict=False):
        imp.output(value, label)
    for value in graph.outputs[len(names) :]:
        written = value.producer()
        assert written is not None and written.op_type == "NextState"
        imp.next_state(written, str(imp.attr(written, "state")))
    model = ir.Model(imp.graph, ir_version=10)
    simplify(model)
    finish(model)
    return model


_SHAPE_ONLY = ("Constant", "Shape", "Range", "ConstantOfShape", "Size")


def _is_constant(imp: Importer, node: ir.Node) -> bool:
    return all(imp.constant(value) is not None for value in node.outputs)


def _needed(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that data reach the outputs through: reshape targets and other integer shape arithmetic stay outside."""
    wanted: set[ir.Node] = set()
    stack = [v.producer() for v in graph.outputs]
    while stack:
        node = stack.pop()
        if node is None or node in wanted:
            continue
        wanted.add(node)
        first_only = node.domain == "" and node.op_type in ("Reshape", "Expand", "Resize", "Slice", "Pad", "Unsqueeze")
        for value in node.inputs[:1] if first_only else node.inputs:
            if value is not None:
                stack.append(value.producer())
    return wanted


def _legal(name: str) -> str:
    kept = "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in name)
    return kept or "model"


def two_samples(example: Example) -> tuple[torch.Tensor, ...] | dict[str, torch.Tensor]:
    """At least two samples, so that tracing cannot take the batch for a constant 1."""

    def widen(tensor: Any, label: str) -> torch.Tensor:
        if not isinstance(tensor, torch.Tensor) or tensor.ndim < 1:
            raise LoweringError(f"{label} is {type(tensor).__name__}, expected a tensor with the batch on axis 0")
        if 0 in tensor.shape:
            raise LoweringError(f"{label} has shape {tuple(tensor.shape)}, expected at least one element on every axis")
        tensor = tensor.detach().to(torch.float32)
        return torch.cat([tensor, tensor]) if tensor.shape[0] == 1 else tensor

    if isinstance(example, torch.Tensor):
        return (widen(example, "the example input"),)
    if isinstance(example, Mapping):
        return {key: widen(value, f"example input {key!r}") for key, value in example.items()}
    return tuple(widen(value, f"example input {index}") for index, value in enumerate(example))


def _samples_without_batch(module: torch.nn.Module, example: Example) -> str | None:
    """The example's shape(s) where the batch axis was forgotten, else None.

    A vector is a sample; more axes are one where the module runs only once a batch axis is put before them.
    """
    if isinstance(example, Mapping):
        given = {str(name): tensor.float() for name, tensor in example.items()}
    else:
        given = {
            str(i): t.float() for i, t in enumerate([example] if isinstance(example, torch.Tensor) else list(example))
        }

    def runs(tensors: dict[str, torch.Tensor]) -> bool:
        try:
            with torch.no_grad():
                module(**tensors) if isinstance(example, Mapping) else module(*tensors.values())
        except Exception:
            return False
        return True

    vectors = all(tensor.ndim == 1 for tensor in given.values())
    if (not vectors and runs(given)) or not runs({name: tensor.unsqueeze(0) for name, tensor in given.items()}):
        return None
    return ", ".join(str(tuple(tensor.shape)) for tensor in given.values())


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def traced(
    module: torch.nn.Module, example: tuple[torch.Tensor, ...] | dict[str, torch.Tensor]
) -> tuple[ir.Model, list[str]]:
    """The exporter's model and the names of its outputs."""
    batch = torch.export.Dim("batch")
    from edgemat.nn.state import states_handed_out, states_of

    if isinstance(module, torch.fx.GraphModule) and states_of(module):
        module = _hooked(module)
    named = isinstance(example, dict)
    shapes: Any = {k: {0: batch} for k in example} if named else tuple({0: batch} for _ in example)
    try:
        with _quiet(), torch.no_grad(), states_handed_out(module) as states:
            program = torch.onnx.export(
                module,
                () if named else tuple(example),
                kwargs=dict(example) if isinstance(example, dict) else None,
                dynamo=True,
                dynamic_shapes=shapes,
                verbose=False,
                optimize=False,
            )
    except EdgematError:
        raise
    except Exception as error:
        root: BaseException = error
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, EdgematError):
                raise type(cause)(_first_line(cause)) from error  # torch.fx adds lines of its own
            root, cause = cause, cause.__cause__ or cause.__context__
        raise LoweringError(
            f"torch.export could not trace the model ({type(root).__name__}: {_first_line(root)}); keep the batch on "
            "axis 0 symbolic and the control flow free of tensor values"
        ) from error
    assert program is not None
    return program.model, _output_names(program, len(program.model.graph.outputs) - states, states)


def _hooked(network: torch.fx.GraphModule) -> torch.nn.Module:
    """The same network as a plain module: torch.export runs no hooks of a traced one, and one hands the states out."""
    kind = type(type(network).__name__, (torch.nn.Module,), {"forward": type(network).forward})
    made: torch.nn.Module = torch.nn.Module.__new__(kind)
    made.__dict__.update(network.__dict__)
    return made


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, without a terminal's colours."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return next((line.strip() for line in plain.splitlines() if line.strip()), "no message")


def _output_names(program: torch.onnx.ONNXProgram, count: int, states: int) -> list[str]:
    """ "output" for one tensor, "output_0", ... for a sequence, the keys for a dict; `states` follow the `count`."""
    exported = program.exported_program
    spec = exported.call_spec.out_spec if exported is not None else None
    if spec is None or spec.num_leaves != count + states:
        return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    results = tree_unflatten(list(range(count + states)), spec)
    paths = tree_flatten_with_path(results[0] if states else results)[0]
    names = []
    for path, index in paths:
        keys = [str(getattr(key, "key", getattr(key, "idx", index))) for key in path]
        keyed = any(hasattr(key, "key") for key in path)
        names.append("_".join(keys) if keyed else "_".join(["output", *keys]))
    return names if len(set(names)) == count else [f"output_{i}" for i in range(count)]
