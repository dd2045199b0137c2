"""Pairs each State of a graph with its NextState, and refuses a graph in which they do not belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgemat.errors import LoweringError
from edgemat.formats import Fixed
from edgemat.lower.typing import META
from edgemat.op import REAL, Call, Tensor


@dataclass(frozen=True)
class State:
    """A recurrent state of a lowered graph.

    Attributes:
        name: Its name, which is that of its graph input (not an identifier: sanitise before use in code).
        read: Code tensor that holds it during a step, behind the State node.
        written: Code tensor that the next step will read, in front of the NextState node.
        format: What a code means; every code of the format can occur. It begins with code 0.
        shape: Shape of one sample, without the batch.
        output: Name of the graph output that gives it to the next step.
    """

    name: str
    read: str
    written: str
    format: Fixed
    shape: tuple[int, ...]
    output: str

    @property
    def size(self) -> int:
        """Elements of one sample."""
        size = 1
        for extent in self.shape:
            size *= extent
        return size


def pair_states(graph: ir.Graph, calls: Sequence[Call]) -> list[State]:
    """The states of a typed graph in the order of its inputs.

    Raises:
        LoweringError: if a state is only read, only written, or written more than once; if what is written has another
            format or shape or may leave the format; if something else reads the graph input or the graph's outputs do
            not hold what is written.
    """
    reads = {call.inputs[0]: call for call in calls if call.op.name == "State"}
    writes: dict[str, Call] = {}
    for call in calls:
        if call.op.name != "NextState":
            continue
        name = call.attrs["state"]
        if name in writes:
            raise call.refuse(f"state {name!r} is written a second time in one step", "expected one NextState a state")
        if name not in reads:
            raise call.refuse(f"state {name!r} is written but never read", "read it in the step, or leave it out")
        writes[name] = call
    outputs = [value.name or "" for value in graph.outputs]
    found = []
    for value in graph.inputs:
        tensor: Tensor | None = value.meta.get(META)
        if tensor is None or tensor.format is REAL:
            continue
        name = value.name or ""
        users = [user.op_type for user, _ in value.uses()]
        if users != ["State"]:
            raise LoweringError(
                f"graph input {name!r} holds codes and is read by {', '.join(users) or 'nothing'}, expected one State"
            )
        if name not in writes:
            raise LoweringError(
                f"state {name!r} is read but never written, expected a NextState that names it; write it in the step"
            )
        found.append(_paired(reads[name], writes[name]))
    for state in found:
        if outputs.count(state.output) != 1:
            raise LoweringError(
                f"state {state.name!r} leaves as {state.output!r}, which is {outputs.count(state.output)} of the "
                "graph's outputs, expected one"
            )
    unknown = set(reads) - {state.name for state in found}
    if unknown:
        raise LoweringError(f"state {sorted(unknown)[0]!r} is no graph input, expected one that holds its codes")
    return found


def _paired(read: Call, write: Call) -> State:
    held, given, name = read.y[0], write.x[0], read.inputs[0]
    if given.format.layout != held.format.layout:
        raise write.refuse(
            f"state {name!r} of {held.format} is written in {given.format}", "requantise what is written to its format"
        )
    if given.shape != held.shape:
        raise write.refuse(
            f"state {name!r} of shape {held.sample_shape} is written in shape {given.sample_shape}",
            "expected the same shape",
        )
    low, high = held.channel_intervals()
    least, most = given.channel_intervals()
    if (least < low).any() or (most > high).any():
        raise write.refuse(
            f"state {name!r} of {held.format} is written with codes {given.lo} to {given.hi}",
            f"expected {held.lo} to {held.hi}; requantise what is written to its format",
        )
    return State(name, held.name, given.name, held.format, held.sample_shape, write.outputs[0])
