"""A lowered file as QONNX: real values in float32, Quant wherever values become coarser.

What QONNX's own executor computes of the file equals the Simulator's values at every output. Where float32 cannot hold
a partial sum, or an operator has no exact form, the node is refused; all refusals of a file come together.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import onnx

from edgemat.errors import EdgematError, UnsupportedOpError
from edgemat.foreign.qonnx_graph import EXACT, QonnxGraph
from edgemat.foreign.qonnx_narrowing import lay, quantise_input, refusal, scales
from edgemat.foreign.qonnx_operators import FORMS, weights
from edgemat.formats import Fixed
from edgemat.lower.graph import Graph
from edgemat.lower.reader import read
from edgemat.op import REAL, Call

_EXPONENTS = 100
"""Binary points lie at most so many bits from 2**0, so that no value is a subnormal or an infinite float32."""
_MAX_BYTES = (1 << 31) - 1


def to_qonnx(path: str | os.PathLike[str] | Graph, output: str | os.PathLike[str], batch: int = 1) -> Path:
    """Writes a lowered file as a QONNX file, which hls4ml, FINN and the ``qonnx`` package read.

    Every tensor of it is a float32 value, every weight and bias a float initializer behind a Quant, every narrowing a
    Quant (or BipolarQuant) of the domain ``qonnx.custom_op.general``; standard operators are those of opset 13. The
    values at the outputs equal the Simulator's for every input of normal float32 numbers and infinities.

    Args:
        path: A lowered file, or one that `edgemat.lower.read` has read.
        output: File to write; an earlier one is replaced when the new one is complete.
        batch: Samples of one run; hls4ml and FINN expect 1.

    Returns:
        The file.

    Raises:
        LoweringError: if `path` is not a lowered file.
        UnsupportedOpError: if a node has no exact form: it names each of those, what was found and what would help.
        EdgematError: if the file cannot be written, or would replace the lowered file.
    """
    output = Path(output)
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise EdgematError(f"batch is {batch!r}, expected a number of samples of at least 1")
    if not isinstance(path, Graph) and output.exists() and output.samefile(path):
        raise EdgematError(f"the QONNX file would replace the model {output}; name another file")
    model = qonnx_model(path if isinstance(path, Graph) else read(path), batch)
    if model.ByteSize() > _MAX_BYTES:
        raise EdgematError(
            f"the QONNX file would have {model.ByteSize()} bytes, and an ONNX file holds {_MAX_BYTES}; "
            "export to hls or mcu, which store weights at their width"
        )
    _write(output, model.SerializeToString(deterministic=True))
    return output


def qonnx_model(graph: Graph, batch: int = 1) -> onnx.ModelProto:
    """The QONNX model of a lowered graph.

    Raises:
        UnsupportedOpError: if a node has no exact form.
    """
    if graph.states:
        names = ", ".join(state.name for state in graph.states)
        raise UnsupportedOpError(
            f"the model keeps recurrent states ({names}) from step to step, which QONNX has no form for; "
            "export to hls or mcu"
        )
    made = QonnxGraph(batch, [*graph.input_names, *graph.output_names])
    known: dict[str, str] = {}
    refused: list[str] = []
    inputs: dict[str, tuple[int | None, ...]] = {}
    for name in graph.input_names:
        call = graph.quantizers[name]
        inputs[name] = call.x[0].shape
        try:
            _check_range(call)
            known[call.outputs[0]] = quantise_input(made, name, call)
        except UnsupportedOpError as error:
            refused.append(str(error))
            known[call.outputs[0]] = name
    for call in graph.nodes:
        try:
            form = FORMS.get(call.op.name)
            if form is None:
                raise refusal(call, "QONNX has no exact form for it", "export to hls or mcu, or leave it out")
            _check_range(call)
            operands = _operands(made, call, known)
            known[call.outputs[0]] = form(made, call, operands)
        except UnsupportedOpError as error:
            refused.append(str(error))
            known[call.outputs[0]] = call.outputs[0]
    if refused:
        head = f"{len(refused)} nodes have no exact form in QONNX: " if len(refused) > 1 else ""
        raise UnsupportedOpError(head + "\n".join(refused))
    outputs = {}
    for name, tensor in zip(graph.output_names, graph.outputs, strict=True):
        value, shape, reader = known[tensor], graph.tensors[tensor].shape, graph.dequantizers.get(name)
        if reader is not None and reader.attrs["scale"]:  # codes of another tool's file, times its real scale
            scale = made.initializer(np.array(float.fromhex(reader.attrs["scale"]), np.float32), f"{name}_scale")
            value = made.node("Mul", [value, scale], shape, f"{name}_mul")
        outputs[name] = (value, shape)
    return made.finish(inputs, outputs, graph.name)


def _operands(graph: QonnxGraph, call: Call, known: dict[str, str]) -> list[str]:
    """Names of a call's tensors; a constant operand of an operator without weights gets an initializer."""
    parameters = ("Linear", "Conv", "ConvTranspose", "Affine", "PRelu", "Table", "Thresholds")
    found = []
    for index, name in enumerate(call.inputs):
        codes = None if call.op.name in parameters and index else call.constant(index)
        if codes is not None:
            fmt = call.x[index].format
            found.append(weights(graph, codes, fmt, lay(scales(fmt), codes.ndim), f"{call.name}_operand"))
        elif call.op.name not in parameters or not index:
            found.append(known[name])
    return found


def _check_range(call: Call) -> None:
    """Refuses what float32 cannot hold: integers of 24 bits and more, and values near its ends."""
    reach = max(call.bounds.magnitude, *(t.magnitude for t in (*call.x, *call.y) if t.format is not REAL))
    if reach >= EXACT:
        raise refusal(
            call,
            f"its codes or partial sums reach {reach}, and float32 holds integers below {EXACT}",
            "narrow the input, the weights or the bias, or export to hls or mcu, which have no such bound",
        )
    for tensor in (*call.x, *call.y):
        _check_exponents(call, tensor.format)
    _check_exponents(call, call.exact[0].format)
    if "w_format" in call.attrs:
        _check_exponents(call, call.format_attr("w_format"))


def _check_exponents(call: Call, fmt: Fixed) -> None:
    if fmt is not REAL and np.abs(np.log2(scales(fmt))).max() > _EXPONENTS:
        raise refusal(
            call,
            f"the binary point of {fmt} lies more than {_EXPONENTS} bits from 1",
            "scale the model's values towards 1",
        )


def _write(target: Path, data: bytes) -> None:
    """Under a temporary name first, so that no half-written file carries the name."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise EdgematError(f"{target} cannot be written: {error.strerror or error}") from error
