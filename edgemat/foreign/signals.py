"""What a tensor of a foreign graph is known as while the graph is walked.

`Known`
    a constant, maybe with the integers and scales a quantiser made of it;
`Signal`
    integer codes of the graph under construction, the real scale of a code, and the element-wise float operators the
    file applied since (`edgemat.foreign.chains`);
`Raw`
    a float graph input that no quantiser has met yet, and the nodes it went through;
`Joined`
    a sum of two tensors with real scales, until a quantiser says on which grid it is wanted;
`Gathered`
    a concatenation of tensors with different real scales, likewise;
`Refused`
    what a refused node should have computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgemat.foreign.chains import Chain

if TYPE_CHECKING:
    from edgemat.foreign.witness import Witness


@dataclass(frozen=True)
class Known:
    """A constant.

    Attributes:
        array: Its values, in the type the file has.
        codes: int64 integers ``q - zero_point`` where a quantiser made it, else None.
        scale: float32 scales of the shape of `codes`: ``array = codes * scale``.
        rails: Smallest and largest code the quantiser can give.
    """

    array: np.ndarray
    codes: np.ndarray | None = None
    scale: np.ndarray | None = None
    rails: tuple[int, int] = (0, 0)

    def reshaped(self, change: object) -> Known:
        """The constant behind a change of shape, a function of one array."""
        assert callable(change)
        if self.codes is None or self.scale is None:
            return Known(np.asarray(change(self.array)))
        scale = np.broadcast_to(self.scale, self.codes.shape)
        return Known(np.asarray(change(self.array)), change(self.codes), change(scale), self.rails)


@dataclass(frozen=True)
class Signal:
    """Codes and their meaning: ``real = chain(code * 2**-frac_bits * factor)``.

    Attributes:
        value: Code tensor of the built graph, batch on axis 0, in the built order of axes.
        factor: float32 real value of 1.0 in the built format: () or (C,) by axis 1 of `value`. 1 where the built
            format says it all.
        chain: Element-wise operators applied since; empty where the codes are the tensor.
        perm: The file's order of axes: axis i of the file's tensor is axis ``perm[i]`` of `value`; None: the same.
        fused: Whether `value` is the accumulator of an integer kernel whose requantisation is one multiplication.
        zero: Zero point where the file's tensor is the stored integer ``code + zero``; None: the real number.
        point: Zero point the file's stored integers were read with, for kernels that compute on those.
        witness: What the file's operator makes of the inputs of this one, where float32 may part from integers.
    """

    value: ir.Value
    factor: np.ndarray
    chain: Chain = field(default_factory=Chain)
    perm: tuple[int, ...] | None = None
    fused: bool = False
    zero: int | None = None
    point: int = 0
    witness: Witness | None = field(default=None, compare=False)

    @property
    def exact(self) -> bool:
        """Whether the built format says all: no scale beside it, nothing pending."""
        return not self.chain and bool((self.factor == 1).all())

    def order(self, rank: int) -> tuple[int, ...]:
        """`perm`, spelled out."""
        return tuple(range(rank)) if self.perm is None else self.perm

    def through(self, chain: Chain) -> Signal:
        """The same codes behind another chain."""
        return replace(self, chain=chain)


@dataclass(frozen=True)
class Raw:
    """A float input, and the nodes between it and here (each with one variable input)."""

    source: ir.Value
    path: tuple[ir.Node, ...] = ()


@dataclass(frozen=True)
class Joined:
    """A sum of two tensors of codes with real scales, and what follows it.

    Attributes:
        node: The node that joins them.
        a: First operand, nothing pending.
        b: Second operand.
        path: Element-wise nodes since.
    """

    node: ir.Node
    a: Signal
    b: Signal
    path: tuple[ir.Node, ...] = ()

    def then(self, node: ir.Node) -> Joined:
        """The join behind one node more."""
        return replace(self, path=(*self.path, node))


@dataclass(frozen=True)
class Gathered:
    """Tensors with different real scales, concatenated, and what follows.

    Attributes:
        node: The Concat.
        parts: Its inputs.
        path: Nodes since: element-wise ones, and such that move elements.
    """

    node: ir.Node
    parts: tuple[Signal | Joined, ...]
    path: tuple[ir.Node, ...] = ()

    def then(self, node: ir.Node) -> Gathered:
        """The concatenation behind one node more."""
        return replace(self, path=(*self.path, node))


@dataclass(frozen=True)
class Refused:
    """The result of a refused node; whatever reads it is not looked at."""

    node: str


Quantity = Known | Signal | Raw | Joined | Gathered | Refused
