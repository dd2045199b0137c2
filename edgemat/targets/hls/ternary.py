"""Ternary weights in an HLS design: where they are, how they are cut into steps, and what their adders cost.

A dot product whose whole sum is formed in one step holds its weights in the structure: lists of the inputs that are
added and subtracted, in which a weight 0 does not occur. Any other reads packed trits (`edgemat.trits`), a *step* of
`pe` rows of `simd` trits at a time: each row is padded with zeros to whole bytes, and the rows of a step follow each
other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgemat.targets.hls.config import ConfigBuilder, ConstantArray
from edgemat.targets.hls.plan import NodePlan, Plan, PlanError, divisors
from edgemat.targets.layout import Step
from edgemat.trits import PER_BYTE, pack_trits, packed_size

SMALLEST_PORT_BITS = 32
DECODER_LUTS = 40
"""Modelled: ten functions of eight bits, four LUTs of six inputs each, turn a byte into five trits."""


@dataclass(frozen=True)
class Memory:
    """An external memory of packed weights that the top function reads through a port of its own.

    Attributes:
        name: C++ argument, and stem of the file.
        node: name of the node whose weights it holds.
        word_bits: bits of a word.
        contents: uint8, the words one after the other, each with its lowest byte first.
    """

    name: str
    node: str
    word_bits: int
    contents: np.ndarray

    @property
    def words(self) -> int:
        """Number of words."""
        return int(self.contents.size) * 8 // self.word_bits


@dataclass(frozen=True)
class Steps:
    """How a packed matrix is read.

    Attributes:
        pe: rows of a step.
        simd: trits of a row of a step.
        chunks: steps of one row; ``simd * chunks`` may exceed the row.
        row_bytes: bytes of `simd` trits.
        word_bits: bits of a word of the memory.
        step_words: words of a step.
    """

    pe: int
    simd: int
    chunks: int
    row_bytes: int
    word_bits: int
    step_words: int


class TernaryUnit:
    """The unit that carries out the dot product of one step with ternary weights.

    Args:
        plan: choices of the project.
        step: a linear or conv step whose parameter `ternary` is 1.
    """

    def __init__(self, plan: Plan, step: Step) -> None:
        weight = step.arrays["weight"]
        self.step = step
        self.weight = weight.reshape(weight.shape[0], -1)
        self.storage, self.packing = plan.storage(step.name)
        outputs, depth = self.weight.shape
        choice = plan.node(step.name)
        free = choice.pe is None and choice.simd is None and choice.reuse == 1
        if free and self.storage in ("uram", "axi"):
            self.pe, self.simd = one_word(outputs, depth, self.packing, plan.axi_bits)
        else:
            self.pe, self.simd = packed_folding(outputs, depth, choice, self.packing, step.name)
        if self.storage == "auto":
            self.storage = "constants" if self.pe == outputs and self.simd >= depth else "rom"
        self.steps = self._steps(plan.axi_bits)
        self.memory: Memory | None = None

    @property
    def name(self) -> str:
        """The unit of the template library."""
        return f"ternary_{self.storage}"

    def _steps(self, axi_bits: int) -> Steps:
        row_bytes = packed_size(self.simd, self.packing)
        size = self.pe * row_bytes
        word_bits = 8
        if self.storage in ("uram", "axi"):
            word_bits = port_bits(size, axi_bits)
        chunks = -(-self.weight.shape[1] // self.simd)
        return Steps(self.pe, self.simd, chunks, row_bytes, word_bits, -(-8 * size // word_bits))

    @property
    def cycles(self) -> int:
        """Cycles of one dot product."""
        if self.storage == "constants":
            return 1
        return self.weight.shape[0] // self.pe * self.steps.chunks * self.step_cycles

    @property
    def step_cycles(self) -> int:
        """Cycles of one step: a ROM gives all bytes at once, other memories a word per cycle."""
        return 1 if self.storage == "rom" else self.steps.step_words

    def fill(self, builder: ConfigBuilder) -> None:
        """Adds the unit's members to the config struct."""
        builder.constant("pe", self.pe)
        builder.constant("simd", self.simd)
        if self.storage == "constants":
            self._lists(builder)
            return
        steps = self.steps
        kind = "unsigned char" if self.storage == "rom" else f"ap_uint<{steps.word_bits}>"
        builder.typedef("weight_t", kind)
        for key in ("chunks", "row_bytes", "step_words"):
            builder.constant(key, getattr(steps, key))
        builder.constant("packing", PER_BYTE[self.packing])
        builder.constant("step_cycles", self.step_cycles)
        if self.storage == "rom":
            packed = self.packed().reshape(-1)
            name = f"{builder.name}_weight"
            builder.arrays["weight"] = ConstantArray(name, kind, f"[{packed.size}]", packed.astype(np.int64), 8)

    def _lists(self, builder: ConfigBuilder) -> None:
        first, split, taps = term_lists(self.weight, *self.grouping())
        for key, accessor, values in (("firsts", "first", first), ("splits", "split", split), ("taps", "tap", taps)):
            name = f"{builder.name}_{key}"
            values = values if values.size else np.zeros(1, np.int64)
            # No memory: every entry is a constant of the structure.
            builder.arrays[key] = ConstantArray(name, "int", f"[{values.size}]", values, 0, "constexpr")
            builder.accessor("constexpr int", f"{accessor}(int i)", f"return {name}[i];")

    def external(self, name: Callable[[], str]) -> None:
        """Puts the weights into a memory behind a port, whose name it asks for, where the plan has them outside."""
        if self.storage in ("uram", "axi"):
            packed = self.packed()
            size = self.steps.step_words * self.steps.word_bits // 8
            padded = np.zeros((len(packed), size), np.uint8)
            padded[:, : packed.shape[1]] = packed
            self.memory = Memory(name(), self.step.name, self.steps.word_bits, padded.reshape(-1))

    def packed(self) -> np.ndarray:
        """uint8 ``[steps, pe * row_bytes]``."""
        return pack_steps(self.weight, self.pe, self.simd, self.packing)

    def grouping(self) -> tuple[int, int]:
        """Channels of a position of the taps, and groups among them."""
        p = self.step.params
        return (p["in_c"], p["groups"]) if "groups" in p else (p["in_features"], 1)

    # -- cost ----------------------------------------------------------------------------------------------------
    def adders(self, acc_width: int) -> tuple[int, int]:
        """Modelled adders and subtracters, and LUTs of six inputs: one per bit of each.

        Args:
            acc_width: bits of the accumulator.
        """
        x_format = self.step.inputs[0].format
        width = x_format.storage_width + (0 if x_format.signed else 1)
        if self.storage == "constants":
            count = bits = 0
            biases = self.step.arrays.get("bias", np.zeros(len(self.weight), np.int64)).reshape(-1)
            for row, bias in zip(self.weight, biases.tolist(), strict=True):
                sides = [int((row > 0).sum()), int((row < 0).sum())]
                # The trees, then one operation that joins each side to what is there; the first side needs none.
                joins = sum(n > 0 for n in sides) - (bias == 0 and sides[0] > 0)
                count += sum(max(n - 1, 0) for n in sides) + joins
                bits += sum(tree_bits(n, width, acc_width) for n in sides) + joins * acc_width
            return count, bits
        # Per row: choosing the input, its negative or nothing; the tree; the accumulator.
        term = x_format.storage_width + 1
        row = self.simd * term + tree_bits(self.simd, term, acc_width) + acc_width
        decode = DECODER_LUTS * self.steps.row_bytes if self.packing == "1.6" else 0
        return self.pe * self.simd, self.pe * (row + decode)


def pack_steps(weight: np.ndarray, pe: int, simd: int, packing: str) -> np.ndarray:
    """Packed trits in the order in which steps read them.

    Args:
        weight: codes -1, 0 and +1 ``[outputs, depth]``; `pe` divides the outputs.
        pe: rows of a step.
        simd: trits of a row of a step.
        packing: ``"2"`` or ``"1.6"``.

    Returns:
        uint8 ``[outputs / pe * ceil(depth / simd), pe * packed_size(simd)]``.
    """
    outputs, depth = weight.shape
    chunks = -(-depth // simd)
    padded = np.zeros((outputs, chunks * simd), np.int8)
    padded[:, :depth] = weight
    steps = padded.reshape(outputs // pe, pe, chunks, simd).transpose(0, 2, 1, 3)
    packed = pack_trits(np.ascontiguousarray(steps), packing)
    return packed.reshape(outputs // pe * chunks, -1)


def term_lists(weight: np.ndarray, channels: int, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs that each output adds and subtracts.

    Args:
        weight: codes -1, 0 and +1 ``[outputs, depth]``.
        channels: channels of a position of the taps.
        groups: groups among them.

    Returns:
        ``first [outputs + 1]``, ``split [outputs]`` and ``tap``: output ``o`` adds the inputs ``tap[first[o] :
        split[o]]`` and subtracts ``tap[split[o] : first[o + 1]]``.
    """
    outputs, depth = weight.shape
    own = channels // groups
    k = np.arange(depth)
    first, split, taps = [0], [], []
    for o, row in enumerate(weight):
        index = k // own * channels + k % own + o // (outputs // groups) * own
        taps += [index[row > 0], index[row < 0]]
        split.append(first[-1] + len(taps[-2]))
        first.append(split[-1] + len(taps[-1]))
    return np.array(first, np.int64), np.array(split, np.int64), np.concatenate(taps).astype(np.int64)


def packed_folding(outputs: int, depth: int, choice: NodePlan, packing: str, node: str) -> tuple[int, int]:
    """Rows and trits of a step.

    `simd` need not divide the depth: trits beyond it are zeros. Without stated `pe` and `simd`, the pair whose fold
    is nearest to the reuse factor is taken (the smaller fold of two as near, then the fewest padded trits), among
    whole bytes of trits.

    Raises:
        PlanError: a stated `pe` does not divide the outputs, or a stated `simd` exceeds the depth by a byte or more.
    """
    per = PER_BYTE[packing]
    whole = -(-depth // per) * per
    if choice.pe is not None and outputs % choice.pe:
        raise PlanError(
            f"node {node!r}: pe is {choice.pe}, expected a divisor of its {outputs} output channels: "
            f"{', '.join(map(str, divisors(outputs)))}"
        )
    if choice.simd is not None and choice.simd > whole:
        raise PlanError(
            f"node {node!r}: simd is {choice.simd}, expected at most {whole}, its {depth} terms in whole bytes"
        )
    pes = [choice.pe] if choice.pe else divisors(outputs)
    simds = [choice.simd] if choice.simd else [*range(per, whole, per), depth]
    reuse = choice.reuse or 1

    def rank(pair: tuple[int, int]) -> tuple[int, int, int, int]:
        chunks = -(-depth // pair[1])
        fold = (outputs // pair[0]) * chunks
        return abs(fold - reuse), fold, packed_size(pair[1], packing) * chunks, -pair[1]

    return min(((pe, simd) for pe in pes for simd in simds), key=rank)


def one_word(outputs: int, depth: int, packing: str, word_bits: int) -> tuple[int, int]:
    """Rows and trits of a step that reads one word: the fewest steps, then the narrowest port."""
    room, per = word_bits // 8, PER_BYTE[packing]

    def rank(pair: tuple[int, int]) -> tuple[int, int, int]:
        steps = outputs // pair[0] * -(-depth // pair[1])
        return steps, port_bits(pair[0] * packed_size(pair[1], packing), word_bits), -pair[1]

    simds = [*range(per, min(depth, room * per + 1), per), *([depth] if packed_size(depth, packing) <= room else [])]
    pairs = ((pe, simd) for pe in divisors(outputs) for simd in simds if pe * packed_size(simd, packing) <= room)
    return min(pairs, key=rank)


def port_bits(size_bytes: int, limit: int) -> int:
    """Bits of the narrowest port that reads so many bytes at once, or of the widest one there may be."""
    return min(max(SMALLEST_PORT_BITS, 1 << (8 * size_bytes - 1).bit_length()), limit)


def tree_bits(terms: int, width: int, limit: int) -> int:
    """Bits of all adders of a tree (`adder_tree` in ternary.hpp) over terms of `width` signed bits."""
    if terms < 2:
        return 0
    own = min(width + (terms - 1).bit_length(), limit)
    return own + tree_bits(terms // 2, width, limit) + tree_bits(terms - terms // 2, width, limit)
