"""onnxruntime sessions over a lowered model: as it is, from codes, or with every tensor as an output."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime

from edgemat.lower.graph import Graph


def copy(model: ir.Model) -> ir.Model:
    """An independent copy of a model, weights included; those of a data file stay there."""
    made = ir.serde.deserialize_model(ir.serde.serialize_model(model))
    for name, value in made.graph.initializers.items():
        old = model.graph.initializers[name].const_value
        if isinstance(old, ir.ExternalTensor):
            value.const_value = old
    return made


def code_model(graph: Graph, outputs: list[str], from_codes: bool) -> ir.Model:
    """The model with code tensors as outputs and, with `from_codes`, as inputs.

    Args:
        graph: A lowered graph.
        outputs: Names of code tensors to return.
        from_codes: Take input codes instead of float values, and the states as their readers see them (`State.read`).
    """
    model = copy(graph.model)
    values = {value.name: value for node in model.graph for value in node.outputs}
    chosen = [values[name] for name in outputs]
    if from_codes:
        model.graph.inputs.clear()
        for node in list(model.graph):
            if node.op_type in ("Quantize", "State"):
                old = node.outputs[0]
                fresh = ir.Value(name=old.name, type=old.type, shape=old.shape)
                chosen = [fresh if value is old else value for value in chosen]
                for user, index in list(old.uses()):
                    user.replace_input_with(index, fresh)
                old.name = f"{old.name}_unused"
                model.graph.inputs.append(fresh)
    model.graph.outputs.clear()
    # A graph may not return an input: the copy keeps such a tensor alive under its own name.
    model.graph.outputs.extend(chosen)
    needed: set[ir.Value] = set(chosen)
    for node in reversed(list(model.graph)):
        if any(value in needed for value in node.outputs):
            needed.update(value for value in node.inputs if value is not None)
        else:
            model.graph.remove(node, safe=False)
    return model


def thread_count() -> int:
    """Threads to use: `OMP_NUM_THREADS`, else the processors this process may run on."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Serialized:
    """A model as onnxruntime takes it.

    Attributes:
        data: The ONNX file.
        folder: Where the data file lies that it names, or None where it carries all weights itself.
    """

    data: bytes
    folder: str | None

    @classmethod
    def of(cls, model: ir.Model) -> Serialized:
        """The bytes of a model."""
        return cls(ir.serde.serialize_model(model).SerializeToString(), data_folder(model))


def open_session(model: ir.Model | Serialized, threads: int | None = None) -> onnxruntime.InferenceSession:
    """A CPU session; looks at nothing outside the model but the data file it was read with."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = thread_count() if threads is None else threads
    made = Serialized.of(model) if isinstance(model, ir.Model) else model
    if made.folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", made.folder)
    return onnxruntime.InferenceSession(made.data, options, providers=["CPUExecutionProvider"])


def data_folder(model: ir.Model) -> str | None:
    """The folder in which a model's data file lies, or None where the model carries all weights itself."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            return os.path.abspath(value.const_value.base_dir)
    return None


def feed_codes(graph: Graph, codes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Input codes in the file's code types."""
    return {name: array.astype(graph.tensors[name].dtype, copy=False) for name, array in codes.items()}
