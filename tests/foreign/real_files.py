"""The third-party files of ``EDGEMAT_DATA``: where they are, how they run as they came, and their golden outputs."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from edgemat.lower.reader import read
from edgemat.sim import reference
from edgemat.sim.arrays import to_codes

from .qonnx_executor import execute

ort.set_default_logger_severity(4)


def unpacked(archive: Path, folder: Path) -> Path:
    """The folder with what an archive holds."""
    with zipfile.ZipFile(archive) as files:
        files.extractall(folder)
    return folder


def inputs_of(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Inputs that are no initializers."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in constants]


def with_batch(model: onnx.ModelProto, samples: int) -> onnx.ModelProto:
    """The model of so many samples; shapes that follow are left to whoever needs them."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for value in (*inputs_of(made), *made.graph.output):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_value = samples
    del made.graph.value_info[:]
    return made


def without_tail(model: onnx.ModelProto, *operators: str) -> onnx.ModelProto:
    """The model up to what its last node takes, where that node is one of these."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    last = made.graph.node[-1]
    if last.op_type in operators:
        made.graph.output[0].name = last.input[0]
        made.graph.node.remove(last)
    return made


def by_onnxruntime(model: onnx.ModelProto, *x: np.ndarray, optimised: bool = True) -> np.ndarray:
    """The first output for float32 (or whatever the file takes) inputs in their order."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    feeds = {value.name: array for value, array in zip(inputs_of(model), x, strict=True)}
    return np.asarray(session.run(None, feeds)[0])


def by_qonnx(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """The output of a QONNX file by qonnx's executor."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.custom_op.channels_last import base_wrapped_op
    from qonnx.transformation.infer_shapes import InferShapes

    shaped = model
    if len(x) > 1 or not ModelWrapper(model).check_all_tensor_shapes_specified():
        shaped = ModelWrapper(with_batch(model, len(x))).transform(InferShapes()).model
    with pytest.MonkeyPatch.context() as patch:
        make = base_wrapped_op.qonnx_make_model

        def readable(*arguments: Any, **options: Any) -> onnx.ModelProto:
            made = make(*arguments, **options)
            made.ir_version = 8  # onnx's newest is ahead of onnxruntime's
            made.opset_import[0].version = 17  # the file's; qonnx takes the version of its own domain for it
            return made

        patch.setattr(base_wrapped_op, "qonnx_make_model", readable)
        (found,) = execute(shaped, {inputs_of(model)[0].name: x}).values()
    return np.asarray(found)


def stored_tensor(path: Path) -> np.ndarray:
    """A tensor that onnx stores in a file."""
    tensor = onnx.TensorProto()
    tensor.ParseFromString(path.read_bytes())
    return np.asarray(numpy_helper.to_array(tensor))


def dory_text(path: Path, channels_last: bool = True) -> np.ndarray:
    """Integers of one of DORY's text files, channels first; the header names the shape they are stored in."""
    header, *lines = path.read_text().splitlines()
    found = re.search(r"\[([\d, ]+)\]", header)
    assert found is not None
    shape = [int(n) for n in found.group(1).split(",")]
    numbers = np.array([float(line.strip().rstrip("\\").rstrip(",")) for line in lines if line.strip()])
    array = numbers.reshape(shape[1:] if len(shape) == 4 else shape)  # some name a batch of one
    return np.moveaxis(array, -1, 0) if channels_last and array.ndim > 1 else array


def traced(path: Path, x: np.ndarray) -> dict[str, np.ndarray]:
    """Codes of every tensor of a lowered file with one input."""
    graph = read(path)
    return reference.trace(graph, to_codes(graph, {graph.input_names[0]: x}, False))


def met(tensors: dict[str, np.ndarray], golden: np.ndarray) -> bool:
    """Whether a tensor of the first sample holds exactly these numbers."""
    flat = golden.reshape(-1)
    return any(codes[0].size == flat.size and np.array_equal(codes[0].reshape(-1), flat) for codes in tensors.values())
