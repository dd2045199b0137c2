"""The lowered graph as targets and simulators see it (docs/internals.md, section 3)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgemat.codes import Codes, Constants
from edgemat.lower.states import State, pair_states
from edgemat.op import Call, Tensor
from edgemat.ops.boundary import real_scale


@dataclass(frozen=True)
class Graph:
    """A lowered file, typed and checked.

    Attributes:
        name: Model name from the file (not an identifier: sanitise before use in code).
        inputs: Names of the code tensors behind the input quantisers.
        outputs: Names of the code tensors before the output dequantisers.
        input_names: Float inputs of the file, in order, matching `inputs`.
        output_names: Float outputs of the file, in order, matching `outputs`.
        nodes: Operators in topological order, without Quantize, Dequantize, Constant, State and NextState.
        tensors: Type of every code tensor by name (constants excluded).
        constants: int64 codes of every constant by value name.
        quantizers: The Quantize calls by float input name.
        model: The onnx_ir model the view was made of.
        dequantizers: The Dequantize calls by float output name.
        states: Recurrent states, in the order of the file's inputs: neither `inputs` nor `outputs` hold them.
    """

    name: str
    inputs: list[str]
    outputs: list[str]
    input_names: list[str]
    output_names: list[str]
    nodes: list[Call]
    tensors: dict[str, Tensor]
    constants: Constants[str]
    quantizers: dict[str, Call]
    model: ir.Model = field(repr=False)
    states: list[State] = field(default_factory=list)
    dequantizers: dict[str, Call] = field(default_factory=dict)

    def input_type(self, index: int) -> Tensor:
        """Type of the codes of input `index`."""
        return self.tensors[self.inputs[index]]

    def output_type(self, index: int) -> Tensor:
        """Type of the codes of output `index`."""
        return self.tensors[self.outputs[index]]

    def scale(self, name: str) -> np.float32 | None:
        """The real scale of a float input or output, or None where its format says what a code is worth."""
        call = self.quantizers.get(name) or self.dequantizers.get(name)
        return None if call is None else real_scale(call)


def view(model: ir.Model, calls: list[Call]) -> Graph:
    """Builds the Graph of a typed model."""
    quantizers: dict[str, Call] = {}
    nodes: list[Call] = []
    tensors: dict[str, Tensor] = {}
    constants: dict[str, np.ndarray | Codes] = {}
    dequantizers: dict[str, Call] = {}
    for call in calls:
        for index, codes in call.constants.held.items():
            constants[call.inputs[index]] = codes
        if call.op.name == "Dequantize":
            dequantizers[call.outputs[0]] = call
            continue
        if call.op.name == "NextState":
            continue
        for tensor in call.y:
            tensors[tensor.name] = tensor
        if call.op.name == "Quantize":
            quantizers[call.inputs[0]] = call
        elif call.op.name == "Literal":
            constants[call.outputs[0]] = call.constants.held[0]
        elif call.op.name != "State":
            nodes.append(call)
    graph = model.graph
    input_names = [v.name or "" for v in graph.inputs]
    states = pair_states(graph, calls)
    handed_on = {state.output for state in states}
    output_names = [v.name or "" for v in graph.outputs if v.name not in handed_on]
    return Graph(
        graph.name or "model",
        [quantizers[name].outputs[0] for name in input_names if name in quantizers],
        [dequantizers[name].inputs[0] for name in output_names],
        [name for name in input_names if name in quantizers],
        output_names,
        nodes,
        tensors,
        Constants(constants),
        quantizers,
        model,
        states,
        {name: dequantizers[name] for name in output_names},
    )
