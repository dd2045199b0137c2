"""Builds the simulator's own graph from the typed one: carriers kept between operators, epilogues folded.

The file is canonical and stays as it is. Each operator goes through the rewrites listed for it; where none applies, the
dossier writes its own body, exact in whatever carrier its inputs come in.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgemat.body import Coded
from edgemat.lower.graph import Graph
from edgemat.op import Call, Tensor, carrier_for
from edgemat.sim.carriers import SINGLE, Carried, FusedBody
from edgemat.sim.large_weights import LargeWeights
from edgemat.sim.rewrites import REWRITES
from edgemat.sim.rewrites.quantize_input import quantize_input


@dataclass(frozen=True)
class Ports:
    """What goes into a fused model and comes out of it.

    Attributes:
        inputs: For each input of the graph, the model's input name.
        outputs: Names of the code tensors that the model's outputs hold, in order, each once; what states are written
            with is among them.
        states: For each state of the graph, the model's input name; fed with codes in the state's code type.
    """

    inputs: list[str]
    outputs: list[str]
    states: list[str]


@dataclass(frozen=True)
class Fused:
    """A fused model.

    Attributes:
        model: Standard ONNX and onnxruntime's fused kernels.
        ports: Its inputs and outputs.
        weights: The file of large weights that the model names, to be removed once a session is open; or None.
    """

    model: ir.Model
    ports: Ports
    weights: LargeWeights | None = None


def fuse(graph: Graph, from_codes: bool) -> Fused:
    """The fused model of a graph.

    Args:
        graph: A lowered graph.
        from_codes: Inputs are codes in the file's types, not float32 values.
    """
    body = FusedBody()
    try:
        return _fused(body, graph, from_codes)
    except BaseException:
        if body.weights is not None:
            body.weights.remove()
        raise


def _fused(body: FusedBody, graph: Graph, from_codes: bool) -> Fused:
    carried: dict[str, Carried] = {}
    names = []
    for index, (name, tensor_name) in enumerate(zip(graph.input_names, graph.inputs, strict=True)):
        names.append(f"in{index}")
        quantizer = None if from_codes else graph.quantizers[name]
        carried[tensor_name] = _input(body, quantizer, graph.tensors[tensor_name], names[-1])
    states = [f"state{index}" for index in range(len(graph.states))]
    for name, state in zip(states, graph.states, strict=True):
        carried[state.read] = _input(body, None, graph.tensors[state.read], name)
    outputs = list(dict.fromkeys([*graph.outputs, *(state.written for state in graph.states)]))
    readers = _readers(graph)
    for call in graph.nodes:
        made = _rewritten(body, call, [_operand(body, call, i, carried) for i in range(len(call.x))])
        made.readers = readers.get(call.outputs[0], 0)
        carried[call.outputs[0]] = made
    for name in outputs:
        body.result(carried[name].coded())
    return Fused(body.model("fused"), Ports(names, outputs, states), body.weights)


def _readers(graph: Graph) -> dict[str, int]:
    counts: dict[str, int] = {}
    written = [state.written for state in graph.states]
    for name in [name for call in graph.nodes for name in call.inputs] + graph.outputs + written:
        counts[name] = counts.get(name, 0) + 1
    return counts


def _input(body: FusedBody, quantizer: Call | None, tensor: Tensor, name: str) -> Carried:
    dtype = tensor.dtype if quantizer is None else SINGLE
    value = Coded(body.typed_input(tensor, name, dtype), dtype)
    if quantizer is None:
        return Carried(body, tensor, coded=lambda: value)
    made = quantize_input(body, quantizer, value)
    return made or Carried(body, tensor, coded=lambda: quantizer.op.emit(body, quantizer, value))


def _operand(body: FusedBody, call: Call, index: int, carried: dict[str, Carried]) -> Carried:
    if index not in call.constants:
        return carried[call.inputs[index]]
    tensor = call.x[index]

    def coded() -> Coded:
        codes = call.constant(index)  # as int64, which large weights become only for a rewrite that wants them so
        assert codes is not None
        return Coded(body.const(codes, tensor.dtype), tensor.dtype)

    return Carried(body, tensor, coded=coded)


def _rewritten(body: FusedBody, call: Call, x: list[Carried]) -> Carried:
    for rewrite in REWRITES.get(call.op.name, ()):
        made = rewrite(body, call, x)
        if made is not None:
            return made
    return Carried(body, call.y[0], coded=lambda: as_in_the_file(body, call, x))


def as_in_the_file(body: FusedBody, call: Call, x: list[Carried]) -> Coded:
    """The dossier's own body, fed with the carriers at hand."""
    coded = [side.coded() for side in x]
    if call.op.name == "Linear":  # its body hands the file's types to an integer kernel
        coded = [body.cast(c, t.dtype) for c, t in zip(coded, call.x, strict=True)]
    elif call.op.same_format and len({c.dtype for c in coded}) > 1:
        common = carrier_for(max(t.magnitude for t in call.x))
        coded = [body.cast(c, common) for c in coded]
    out = call.op.emit(body, call, *coded)
    if call.epilogue is not None:
        out = call.op.emit_epilogue(body, call, out)
    return out
