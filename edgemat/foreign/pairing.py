"""Which code tensor of a lowered file is which tensor of the foreign file it was made of.

An import is deterministic, so the foreign file is walked again; the names it builds are those of the lowered file, as
far as no pass merged their nodes with others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgemat.errors import EdgematError
from edgemat.foreign.outputs import close
from edgemat.foreign.signals import Signal
from edgemat.foreign.source import Source
from edgemat.foreign.translator import MALFORMED, Translator
from edgemat.formats import Fixed

QUANTISERS = ("Quant", "IntQuant", "BipolarQuant", "Trunc", "MultiThreshold", "QuantizeLinear")
LEFT_TO_THE_READER = ("Softmax", "LogSoftmax", "Sigmoid")


@dataclass(frozen=True)
class Pair:
    """A tensor of the foreign file and the codes it became.

    Attributes:
        tensor: Its name in the foreign file.
        node: The node that makes it there.
        op: That node's operator.
        built: Name of the code tensor in the lowered file.
        factor: float32 real value of 1.0 in the built format, () or [C] by axis 1 of the built tensor.
        zero: Zero point, where the foreign tensor is a stored integer.
        order: Axis i of the foreign tensor is axis ``order[i]`` of the built one; None: the same.
        fidelity: What the import says of the node: "exact", or how far it is off.
    """

    tensor: str
    node: str
    op: str
    built: str
    factor: np.ndarray
    zero: int | None
    order: tuple[int, ...] | None
    fidelity: str

    @property
    def binary(self) -> bool:
        """Whether every scale is a power of two: nothing is left to float32's rounding."""
        return bool((np.frexp(self.factor)[0] == 0.5).all())

    def codes(self, array: np.ndarray, fracs: tuple[int, ...]) -> np.ndarray:
        """float64 codes, in the foreign order of axes, of the foreign tensor's numbers.

        Args:
            array: What the foreign file computes.
            fracs: Fractional bits of the built format, one or by channel.
        """
        if self.zero is not None:
            return array.astype(np.float64) - self.zero
        unit = np.ldexp(self.factor.astype(np.float64).reshape(-1), -np.asarray(fracs, np.int64))
        axis = 1 if self.order is None else self.order.index(1)
        shape = [1] * array.ndim
        if unit.size > 1:
            shape[axis] = unit.size
        return np.rint(array.astype(np.float64) / unit.reshape(shape))


@dataclass(frozen=True)
class Pairing:
    """What a foreign file's tensors became.

    Attributes:
        pairs: In the foreign file's order.
        entering: For outputs whose last operator is left to the reader, by name: the tensor that enters it, and the
            operator.
        inexact: Names of the nodes that the import says are not exact.
    """

    pairs: tuple[Pair, ...]
    entering: dict[str, tuple[str, str]]
    inexact: frozenset[str]


def pair(source: Source, formats: Mapping[str, Fixed]) -> Pairing:
    """Walks a foreign file again.

    Args:
        source: The file.
        formats: Formats of float inputs that no quantiser states.

    Raises:
        EdgematError: if a node is refused.
    """
    from edgemat.foreign.handlers import HANDLERS

    tr = Translator(source, "model", formats, HANDLERS)
    report = tr.run()
    for value in source.graph.outputs:
        try:
            close(tr, value)
        except MALFORMED as error:
            raise EdgematError(f"{source.label} is not taken: {error}") from error
    if report.refused:
        raise EdgematError(report.refused[0].note)
    fidelity = {row.node: row.fidelity for row in report.rows}
    pairs, seen = [], set()
    for node in source.graph:
        for value in node.outputs:
            signal = tr.values.get(value)
            if not isinstance(signal, Signal) or signal.chain or not value.name:
                continue
            built = signal.value.name or ""
            if built in seen or (signal.zero is None and node.op_type not in QUANTISERS):
                continue
            seen.add(built)
            label = tr.label(node)
            said = fidelity.get(label) or "exact"
            pairs.append(Pair(value.name, label, node.op_type, built, signal.factor, signal.zero, signal.perm, said))
    entering = {}
    for value in source.graph.outputs:
        found = _entering(tr, value)
        if found is not None:
            entering[value.name or ""] = found
    return Pairing(tuple(pairs), entering, frozenset(row.node for row in report.inexact))


def _entering(tr: Translator, value: ir.Value) -> tuple[str, str] | None:
    """What enters the operator behind which the import looked no further, if it ends in one."""
    node = value.producer()
    if node is None or node.op_type not in LEFT_TO_THE_READER or node.inputs[0] is None:
        return None
    before, after = tr.values.get(node.inputs[0]), tr.values.get(value)
    if not (isinstance(before, Signal) and isinstance(after, Signal)) or len(after.chain.steps) > len(
        before.chain.steps
    ):
        return None
    return node.inputs[0].name or "", node.op_type
