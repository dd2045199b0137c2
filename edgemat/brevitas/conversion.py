"""A Brevitas model to the lowered file: recorded, exported with QONNX nodes for its quantisers, then imported."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from edgemat.errors import LoweringError

if TYPE_CHECKING:
    import onnx

    from edgemat.foreign.report import ImportReport
    from edgemat.lower.from_torch import Example


def to_onnx(
    model: nn.Module,
    example_input: Example,
    path: str | os.PathLike[str],
    inputs: Mapping[str, str] | None = None,
    strict: bool = False,
    *,
    name: str | None = None,
) -> ImportReport:
    """Writes a Brevitas model as a lowered ONNX file that a stock onnxruntime runs.

    The file computes on integers. Where every scale is a power of two its outputs are those of the model in eval mode
    to the last bit; where scales are real, Brevitas' own float32 sums round, and a code may differ next to a tie
    (docs/brevitas.md states how often).

    Args:
        model: Layers of brevitas.nn, and torch layers that have an integer form. Exported in eval mode; nothing in it
            changes, its mode included.
        example_input: A float32 tensor [N, ...], a tuple of them, or a dict by argument name; the scales of biases and
            of truncations are read off a pass over it, otherwise only shapes matter.
        path: File to write (atomically).
        inputs: Formats of inputs that the model does not quantise itself, by argument name: ``{"x": "ufixed<8,0>"}``.
        strict: Refuse nodes whose integers differ from the float32 arithmetic of the exported graph for some codes.
        name: Name of the model in the file; by default the model's class.

    Returns:
        What became of each node of the exported graph.

    Raises:
        ImportRefused: if a node has no exact integer form; the message lists every such node.
        UnsupportedOpError: for quantisers that give no integers, take their scale from the data, or recurrent layers.
        LoweringError: if the model does not run on the example or cannot be traced.
    """
    from edgemat.foreign.importing import imported
    from edgemat.foreign.source import source_of
    from edgemat.lower.writer import write

    proto = exported(model, example_input)
    label = name or type(model).__name__
    lowered, report = imported(source_of(proto, label), inputs or {}, strict, label)
    write(lowered, path)
    return report


def exported(model: nn.Module, example_input: Example) -> onnx.ModelProto:
    """The model as torch's exporter writes it, with a QONNX Quant for each quantiser."""
    try:
        import brevitas  # noqa: F401
    except ImportError as error:
        raise LoweringError("Brevitas is not installed; pip install edgemat[brevitas]") from error
    import onnx_ir as ir

    from edgemat.brevitas.emission import replace_quantisers
    from edgemat.brevitas.recording import quantisers_of, record
    from edgemat.lower.from_torch import traced, two_samples

    if not isinstance(model, nn.Module):
        raise LoweringError(f"to_onnx got a {type(model).__name__}, expected a torch.nn.Module")
    example = two_samples(example_input)
    example = {k: x.cpu() for k, x in example.items()} if isinstance(example, dict) else tuple(x.cpu() for x in example)
    twin = copy.deepcopy(model).cpu().eval()
    quantisers = quantisers_of(twin)
    calls = record(twin, quantisers, example)
    replace_quantisers(twin, quantisers, calls)
    with torch.no_grad():
        made, names = traced(twin, example)
    ends = {value.name for value in made.graph.inputs}
    names = [f"{label}_output" if label in ends else label for label in names]
    taken = set(names)
    for node in made.graph:
        for value in node.outputs:
            if value.name in taken:
                value.name = f"{value.name}_of_{node.name}"
    for value, label in zip(made.graph.outputs, names, strict=False):
        value.name = label
    proto: onnx.ModelProto = ir.serde.serialize_model(made)
    return proto
