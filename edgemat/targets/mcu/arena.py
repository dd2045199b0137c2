"""Where every intermediate tensor lives: lifetimes, shared memory, offsets.

1. Tensors that share bytes form one *buffer*: a reshape with what it reshapes, and an element-wise result with an
   operand that nobody reads later (same element size, or results of one byte, whose writes never pass the reads).
2. A buffer lives from the step that writes it first to the step that reads it last. The network's inputs are the
   caller's and never written; a buffer that holds an output is the caller's output array and takes no arena. Recurrent
   states lie in the model itself and are not written before the last step is done; what they will hold lives till then.
3. A kernel's working memory is a buffer of its step alone.
4. Offsets: best fit, in several orders; then, while the arena is larger than the lower bound, a fixed number of
   pseudo-random exchanges in the order. The lower bound is the largest sum of sizes alive at one step: no placement
   of these buffers can be smaller.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from edgemat.targets.layout import NativeTensor, Network, Step
from edgemat.targets.mcu.storage import size_of, storage
from edgemat.targets.mcu.ternary import choose_trits
from edgemat.targets.mcu.variants import KERNELS

ALIGNMENT = 8
_EXCHANGES = 300


@dataclass
class Buffer:
    """Bytes shared by some tensors; ``first`` and ``last`` are step numbers, both inclusive."""

    size_bytes: int
    first: int
    last: int
    members: list[str] = field(default_factory=list)
    offset: int = 0


@dataclass(frozen=True)
class Place:
    """Where a tensor lives: ``kind`` is ``input``, ``output``, ``state`` or ``arena``; ``index`` its number or byte."""

    kind: str
    index: int


@dataclass(frozen=True)
class Arena:
    """The plan.

    Attributes:
        size_bytes: size of the arena.
        lower_bound_bytes: largest sum of buffers alive at one step.
        places: place of every non-constant tensor by name.
        copies: (tensor, output number) of outputs that share memory with an input, another output or a larger
            tensor.
        buffers: the buffers in the arena, by first step.
        scratch: offset of the working memory of those steps that have any, by number.
    """

    size_bytes: int
    lower_bound_bytes: int
    places: dict[str, Place]
    copies: tuple[tuple[str, int], ...]
    buffers: tuple[Buffer, ...]
    scratch: dict[int, int] = field(default_factory=dict)


def plan_arena(network: Network) -> Arena:
    """Assign a place to every tensor of a network."""
    roots = _Roots(network)
    for index, step in enumerate(network.steps):
        if step.stem == "reshape":
            roots.join(step.inputs[0].name, step.outputs[0].name)
        else:
            operand = _overwritten(step, index, roots)
            if operand is not None:
                roots.join(operand, step.outputs[0].name)
    places: dict[str, Place] = {}
    copies: list[tuple[str, int]] = []
    owner = {roots.find(tensor.name): Place("input", i) for i, tensor in enumerate(network.inputs)}
    owner |= {roots.find(state.read.name): Place("state", i) for i, state in enumerate(network.states)}
    for i, tensor in enumerate(network.outputs):
        root = roots.find(tensor.name)
        if root in owner or roots.span(root)[2] > tensor_bytes(tensor):
            copies.append((tensor.name, i))
        else:
            owner[root] = Place("output", i)
    buffers: dict[str, Buffer] = {}
    for name in network.tensors():
        root = roots.find(name)
        if root in owner:
            places[name] = owner[root]
            continue
        if root not in buffers:
            first, last, size = roots.span(root)
            buffers[root] = Buffer(-(-size // ALIGNMENT) * ALIGNMENT, first, last)
        buffers[root].members.append(name)
    working: dict[int, Buffer] = {}
    for index, step in enumerate(network.steps):
        choice = choose_trits(step)
        if choice is not None:
            working[index] = Buffer(-(-choice.scratch_bytes // ALIGNMENT) * ALIGNMENT, index, index)
    live = sorted((*buffers.values(), *working.values()), key=lambda b: (b.first, b.last, b.size_bytes))
    bound = max((_alive_bytes(live, step) for step in range(len(network.steps))), default=0)
    size = place(live, bound)
    for buffer in live:
        places.update((name, Place("arena", buffer.offset)) for name in buffer.members)
    scratch = {index: buffer.offset for index, buffer in working.items()}
    return Arena(size, bound, places, tuple(copies), tuple(live), scratch)


def tensor_bytes(tensor: NativeTensor) -> int:
    """Bytes of one sample of a tensor."""
    return tensor.size * size_of(storage(tensor.format))


class _Roots:
    """Union of tensors that share bytes, with their joint lifetime."""

    def __init__(self, network: Network) -> None:
        tensors = network.tensors()
        self.parent = {name: name for name in tensors}
        self.size = {name: tensor_bytes(tensor) for name, tensor in tensors.items()}
        self.first = dict.fromkeys(tensors, -1)
        self.last = dict.fromkeys(tensors, -1)
        self.fixed = {tensor.name for tensor in (*network.inputs, *(state.read for state in network.states))}
        self.outputs = {tensor.name for tensor in network.outputs}
        for index, step in enumerate(network.steps):
            for tensor in step.inputs:
                if tensor.values is None:
                    self.last[tensor.name] = index
            for tensor in step.outputs:
                self.first[tensor.name] = index
                self.last[tensor.name] = max(self.last[tensor.name], index)
        for name in (*self.outputs, *(state.written.name for state in network.states)):
            self.last[name] = len(network.steps)

    def find(self, name: str) -> str:
        while self.parent[name] != name:
            name = self.parent[name]
        return name

    def join(self, old: str, new: str) -> None:
        root, other = self.find(old), self.find(new)
        if root == other:
            return
        self.parent[other] = root
        self.size[root] = max(self.size[root], self.size[other])
        self.last[root] = max(self.last[root], self.last[other])
        if other in self.outputs:
            self.outputs.add(root)

    def span(self, root: str) -> tuple[int, int, int]:
        return self.first[root], self.last[root], self.size[root]


def _overwritten(step: Step, index: int, roots: _Roots) -> str | None:
    """The operand an element-wise step may overwrite, the largest first; None if there is none."""
    kernel = KERNELS.get(step.stem)
    if kernel is None or not kernel.in_place or step.params.get("broadcast"):
        return None
    result = size_of(storage(step.outputs[0].format))
    candidates = [tensor for tensor in step.inputs if tensor.values is None]
    for tensor in sorted(candidates, key=lambda t: -tensor_bytes(t)):
        root = roots.find(tensor.name)
        element = size_of(storage(tensor.format))
        dies = roots.last[root] == index and root not in roots.fixed and root not in roots.outputs
        others = [other for other in candidates if other is not tensor and roots.find(other.name) == root]
        if dies and not others and (element == result or (result == 1 and element > result)):
            return tensor.name
    return None


def _alive_bytes(buffers: Iterable[Buffer], step: int) -> int:
    return sum(b.size_bytes for b in buffers if b.first <= step <= b.last)


def place(buffers: list[Buffer], bound: int) -> int:
    """Give every buffer an offset; returns the arena's size."""
    orders = [
        sorted(range(len(buffers)), key=key)
        for key in (
            lambda i: (-buffers[i].size_bytes, buffers[i].first),
            lambda i: (-buffers[i].size_bytes * (buffers[i].last - buffers[i].first + 1), buffers[i].first),
            lambda i: (buffers[i].first, -buffers[i].size_bytes),
            lambda i: (buffers[i].first - buffers[i].last, -buffers[i].size_bytes),
        )
    ]
    best_size, best_offsets, best_order = min(
        ((*_best_fit(buffers, order), order) for order in orders), key=lambda found: found[0]
    )
    chance = random.Random(0)
    for _ in range(_EXCHANGES if best_size > bound else 0):
        order = list(best_order)
        i, j = chance.randrange(len(order)), chance.randrange(len(order))
        order[i], order[j] = order[j], order[i]
        size, offsets = _best_fit(buffers, order)
        if size <= best_size:
            best_size, best_offsets, best_order = size, offsets, order
        if best_size == bound:
            break
    for buffer, offset in zip(buffers, best_offsets, strict=True):
        buffer.offset = offset
    return best_size


def _best_fit(buffers: Sequence[Buffer], order: Sequence[int]) -> tuple[int, list[int]]:
    """Place buffers one by one into the smallest gap that holds them, else on top."""
    offsets = [0] * len(buffers)
    placed: list[int] = []
    size = 0
    for index in order:
        buffer = buffers[index]
        taken = sorted(
            (offsets[other], offsets[other] + buffers[other].size_bytes)
            for other in placed
            if buffers[other].first <= buffer.last and buffer.first <= buffers[other].last
        )
        at, best, top = None, None, 0
        for start, end in taken:
            gap = start - top
            if gap >= buffer.size_bytes and (best is None or gap < best):
                at, best = top, gap
            top = max(top, end)
        offsets[index] = top if at is None else at
        placed.append(index)
        size = max(size, offsets[index] + buffer.size_bytes)
    return size, offsets
