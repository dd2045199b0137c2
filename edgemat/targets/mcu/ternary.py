"""Weights -1, 0 and +1 in C: the kernel by tables of sums, its packed bytes, its variant and its working memory.

`kernels/edgemat_trits.h` states the layout. A byte holds four weights (2 bits each) or five (1.6 bits) of neighbouring
inputs; it is an index into a table of the sums of those inputs. Bytes lie in the order in which the kernel reads them:
passes of some groups of inputs, in a pass output by output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from edgemat.errors import UnsupportedOpError
from edgemat.targets.layout import Network, Step
from edgemat.targets.mcu.epilogue import EpilogueChoice
from edgemat.targets.mcu.storage import ConstantArray, array_storage, size_of, storage
from edgemat.trits import PER_BYTE, pack_trits

PACKINGS = ("auto", *PER_BYTE)
SHORT_ROW = 16
FEW_OUTPUTS = 4
MANY_OUTPUTS = 96
"""Outputs of a row from which five weights to a byte need fewer instructions than four: tables three times as large
are shared by enough of them. (Below, flash may still be the reason to ask for them.)"""
TABLES = 8
ENTRIES = {4: 84, 5: 252}
_LANE_LIMIT = 1 << 15
_SHORT_ENTRY = 1 << 16
_OFFSET_STEP = 256  # two such offsets in a word are a constant that Thumb instructions hold


@dataclass(frozen=True)
class TritsChoice:
    """How one step with ternary weights computes.

    Attributes:
        trits: weights in a byte, 4 or 5.
        lanes: rows of inputs at a time; 2 where there are two and every sum without bias fits 16 bits.
        entry_bits: width of a table's entry.
        offset: what 16-bit entries are raised by, so that none is negative; else 0.
        scratch_bytes: working memory.
    """

    trits: int
    lanes: int
    entry_bits: int
    offset: int
    scratch_bytes: int

    @property
    def macros(self) -> list[tuple[str, str]]:
        """What the variant defines."""
        found = {"EM_TRITS": self.trits, "EM_LANES": self.lanes, "EM_ENTRY_BITS": self.entry_bits}
        return [(key, str(value)) for key, value in {**found, "EM_OFFSET": self.offset, "EM_TABLES": TABLES}.items()]

    @property
    def name(self) -> str:
        """What tells the variant from others."""
        return f"t{self.trits}l{self.lanes}e{self.entry_bits}" + (f"r{self.offset}" if self.offset else "")


def state_packing(network: Network, packing: str) -> Network:
    """The network with the packing written into its ternary steps (``auto``: nothing is written).

    Raises:
        UnsupportedOpError: unknown packing, or one for a network without ternary weights.
    """
    if packing not in PACKINGS:
        raise UnsupportedOpError(f"ternary_packing is {packing!r}, expected one of {', '.join(PACKINGS)}")
    if packing == "auto":
        return network
    if not any(step.params.get("ternary") for step in network.steps):
        raise UnsupportedOpError(
            f"ternary_packing is {packing!r}, and no layer of {network.name or 'the model'!r} has ternary weights, "
            "which it could pack; leave it out, or train with weights='ternary'"
        )
    trits = PER_BYTE[packing]
    steps = tuple(
        replace(step, params={**step.params, "trits": trits}) if step.params.get("ternary") else step
        for step in network.steps
    )
    return replace(network, steps=steps)


def choose_trits(step: Step) -> TritsChoice | None:
    """The choice for a step of ternary weights; None where the plain kernel adds and subtracts by a byte each.

    Tables want some inputs to look up and some outputs to share them; depthwise layers have neither.
    """
    if not step.params.get("ternary"):
        return None
    weight = step.arrays["weight"]
    groups = int(step.params.get("groups", 1))
    length, outputs = weight[0].size, len(weight) // groups
    if length < SHORT_ROW or outputs < FEW_OUTPUTS:
        return None
    x = step.inputs[0]
    trits = int(step.params.get("trits", 5 if outputs >= MANY_OUTPUTS else 4))
    positions = int(step.params.get("rows", 0) or step.params["out_h"] * step.params["out_w"])
    lanes = 2 if positions > 1 and _largest_sum(weight.reshape(len(weight), -1), x.lo, x.hi) < _LANE_LIMIT else 1
    offset = -(-trits * max(abs(x.lo), abs(x.hi)) // _OFFSET_STEP) * _OFFSET_STEP
    bits = _accumulator_bits(step)
    if lanes == 2:
        entry_bits, sum_bytes, offset = 32, 4, 0
    elif 2 * offset < _SHORT_ENTRY:
        entry_bits, sum_bytes = 16, bits // 8
    else:
        entry_bits, sum_bytes, offset = bits, bits // 8, 0
    row = 0 if lanes == 1 and step.stem == "linear" else length * (4 if lanes == 2 else size_of(storage(x.format)))
    scratch = TABLES * ENTRIES[trits] * entry_bits // 8 + outputs * sum_bytes + row
    return TritsChoice(trits, lanes, entry_bits, offset, scratch)


def _accumulator_bits(step: Step) -> int:
    bias = step.arrays.get("bias")
    arrays = None if bias is None else ConstantArray("bias", array_storage(bias), bias)
    return int(dict(EpilogueChoice(step, [None, arrays]).macros).get("EM_ACC_BITS", "32"))


def _largest_sum(rows: np.ndarray, lo: int, hi: int) -> int:
    """Largest magnitude of a row's sum without bias; any input may be 0 as well (padding)."""
    plus = np.count_nonzero(rows > 0, axis=1)
    minus = np.count_nonzero(rows < 0, axis=1)
    up = plus * max(hi, 0) + minus * max(-lo, 0)
    down = plus * max(-lo, 0) + minus * max(hi, 0)
    return int(max(up.max(), down.max()))


def packed_rows(rows: np.ndarray, groups: int, trits: int) -> np.ndarray:
    """Rows ``[out, length]`` of -1, 0 and +1 as bytes in the order in which the kernel reads them, flat."""
    rows = np.asarray(rows)
    outputs, length = rows.shape
    groups_of_inputs = -(-length // trits)
    five = np.zeros((outputs, groups_of_inputs, 5), np.int8)
    padded = np.zeros((outputs, groups_of_inputs * trits), np.int8)
    padded[:, :length] = rows
    five[:, :, :trits] = padded.reshape(outputs, groups_of_inputs, trits)
    codes = _places(trits)[pack_trits(five.reshape(outputs, -1), "1.6")]
    parts = []
    for group in np.split(codes, groups):
        at, left = 0, group.shape[1]
        while left:
            taken = next(count for count in (TABLES, 4, 2, 1) if count <= left)
            parts.append(group[:, at : at + taken].reshape(-1))
            at, left = at + taken, left - taken
    return np.concatenate(parts)


def _places(trits: int) -> np.ndarray:
    """The table entry of each byte of five weights; of four, the fifth is 0."""
    byte = np.arange(243)
    blocks = 9 if trits == 5 else 3
    block = byte // 27 if trits == 5 else byte // 27 % 3
    low = byte % 27
    return np.where(low < 14, 14 * block + low, 14 * (blocks + block) + low - 14).astype(np.uint8)
