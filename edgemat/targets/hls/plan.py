"""The plan: everything an HLS project chooses that the model does not say.

A plan is written in TOML:

.. code-block:: toml

    io = "stream"            # or "parallel"
    part = "xcku5p-ffvb676-2-e"
    clock_ns = 5.0
    reuse = 4                # multiplications that share one multiplier
    products = "shift_add"   # or "compiler": 2-hot constants are multiplied, and the compiler is to find the shifts
    ports = "axis"           # stream: axis, axis_last or memory; parallel: registers or memory
    weights = "auto"         # ternary weights: rom, uram or axi; auto: in the structure if unrolled, else rom
    packing = "2"            # or "1.6": five packed trits to a byte
    axi_bits = 128           # widest port of an external memory of weights
    [node.conv1]             # one table per node, by its name in the model
    pe = 4                   # outputs per clock cycle
    simd = 9                 # terms of each sum per clock cycle
    lanes = 4                # elements per beat of its output stream
    weights = "axi"          # as above, for this node
    packing = "1.6"
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from edgemat.errors import EdgematError
from edgemat.trits import PER_BYTE

IO = ("parallel", "stream")
PRODUCTS = ("shift_add", "compiler")
WEIGHTS = ("auto", "rom", "uram", "axi")
PACKINGS = tuple(PER_BYTE)
AXI_BITS = (32, 64, 128, 256, 512, 1024)
PORTS = {"parallel": ("registers", "memory"), "stream": ("axis", "axis_last", "memory")}
_PART_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


class PlanError(EdgematError, ValueError):
    """A plan names something that does not exist, or gives it a value it cannot have."""


@dataclass(frozen=True)
class NodePlan:
    """Choices for one node.

    Attributes:
        reuse: multiplications that share one multiplier; overrides the plan's.
        pe: outputs computed per clock cycle; divides the number of output channels.
        simd: terms of each sum per clock cycle; divides the length of the sum.
        lanes: elements per beat of the node's output stream (io=stream); divides its channels.
        weights: where ternary weights are; overrides the plan's.
        packing: how ternary weights are packed; overrides the plan's.
    """

    reuse: int | None = None
    pe: int | None = None
    simd: int | None = None
    lanes: int | None = None
    weights: str | None = None
    packing: str | None = None

    def __post_init__(self) -> None:
        for name in ("reuse", "pe", "simd", "lanes"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise PlanError(f"{name} is {value!r}, expected an integer of at least 1")
        for name, known in (("weights", WEIGHTS), ("packing", PACKINGS)):
            _check_word(name, getattr(self, name), (None, *known))


@dataclass(frozen=True)
class Plan:
    """Choices for a project.

    Attributes:
        io: "parallel" (arrays) or "stream" (dataflow over FIFOs).
        reuse: multiplications that share one multiplier, for nodes that do not say otherwise.
        clock_ns: clock period in nanoseconds.
        part: device.
        ports: kind of the top's ports; None takes the first of `PORTS` for `io`.
        beat_bits: widest beat of a stream that is chosen without being asked for.
        products: how K-hot weights multiply. "shift_add" spells shifts and additions. "compiler" writes ``x * w`` where
            the weights are constants of an unrolled loop and sums of at most two signed powers of two: for such
            constants Vitis HLS 2025.1 infers no multiplier (published observation, not confirmed here).
        weights: where packed ternary weights are: "rom", "uram" (UltraRAM that the first call fills from an AXI
            memory) or "axi" (an AXI memory, read for every dot product). "auto" packs nothing where a dot product is
            unrolled whole (weights are then in the structure), and takes a ROM elsewhere.
        packing: bits of a packed trit, "2" or "1.6" (`edgemat.trits`); None is "2".
        axi_bits: widest port of an external memory, a power of two from 32 to 1024.
        nodes: `NodePlan` by node name.
    """

    io: str = "parallel"
    reuse: int = 1
    clock_ns: float = 5.0
    part: str = "xcku5p-ffvb676-2-e"
    ports: str | None = None
    beat_bits: int = 4096
    products: str = "shift_add"
    weights: str = "auto"
    packing: str | None = None
    axi_bits: int = 128
    nodes: Mapping[str, NodePlan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        words = ("io", IO), ("products", PRODUCTS), ("weights", WEIGHTS), ("packing", (None, *PACKINGS))
        for name, known in words:
            _check_word(name, getattr(self, name), known)
        if not isinstance(self.axi_bits, int) or self.axi_bits not in AXI_BITS:
            raise PlanError(f"axi_bits is {self.axi_bits!r}, expected one of {', '.join(map(str, AXI_BITS))}")
        for name in ("reuse", "beat_bits"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PlanError(f"{name} is {value!r}, expected an integer of at least 1")
        if isinstance(self.clock_ns, bool) or not isinstance(self.clock_ns, int | float) or not 0 < self.clock_ns < 1e6:
            raise PlanError(f"clock_ns is {self.clock_ns!r}, expected a period in nanoseconds above 0")
        if not isinstance(self.part, str) or not self.part or not set(self.part) <= _PART_CHARACTERS:
            raise PlanError(f"part is {self.part!r}, expected a device name such as 'xcku5p-ffvb676-2-e'")
        allowed = PORTS[self.io]
        if self.ports is not None and self.ports not in allowed:
            raise PlanError(f"ports is {self.ports!r}, expected one of {', '.join(allowed)} for io={self.io!r}")

    @property
    def port_kind(self) -> str:
        """The kind of the top's ports."""
        return self.ports or PORTS[self.io][0]

    def node(self, name: str) -> NodePlan:
        """The choices for a node, the plan's reuse filled in."""
        found = self.nodes.get(name, NodePlan())
        return found if found.reuse is not None else replace(found, reuse=self.reuse)

    def storage(self, name: str) -> tuple[str, str]:
        """Where the ternary weights of a node are, and how they are packed."""
        found = self.nodes.get(name, NodePlan())
        return found.weights or self.weights, found.packing or self.packing or PACKINGS[0]

    def check_ternary(self, model: str, any_ternary: bool) -> None:
        """Refuses choices for ternary weights in a model that has none.

        Raises:
            PlanError: names the choice.
        """
        stated = {"weights": None if self.weights == "auto" else self.weights, "packing": self.packing}
        for name, value in stated.items():
            if value is not None and not any_ternary:
                raise PlanError(
                    f"the plan states {name}={value!r}, and no node of {model!r} has ternary weights, which it is "
                    "about; leave it out, or train with weights='ternary'"
                )

    def check_nodes(self, names: Iterable[str]) -> None:
        """Refuses choices for nodes that the model does not have.

        Raises:
            PlanError: names the node and the nearest existing one.
        """
        known = list(names)
        for name in self.nodes:
            if name not in known:
                raise PlanError(f"the plan has a node {name!r}, which the model does not have{_nearest(name, known)}")


def load_plan(path: Path | str, **overrides: Any) -> Plan:
    """Reads a TOML plan.

    Args:
        path: the file.
        **overrides: fields of `Plan` that replace what the file says; None leaves the file's.

    Raises:
        PlanError: the file is not TOML, or a key or value in it is unknown.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"the plan {path} is not TOML: {error}") from None
    except OSError as error:
        raise PlanError(f"the plan {path} cannot be read: {error.strerror}") from None
    return make_plan(table, **overrides)


def make_plan(table: Mapping[str, Any], **overrides: Any) -> Plan:
    """A `Plan` from a parsed table; unknown keys are refused with the nearest known one."""
    values = dict(table)
    node_tables = values.pop("node", {})
    _check_keys(values, [f.name for f in fields(Plan) if f.name != "nodes"] + ["node"], "the plan")
    if not isinstance(node_tables, Mapping):
        raise PlanError(f"node is {node_tables!r}, expected tables such as [node.conv1]")
    nodes = {}
    for name, keys in node_tables.items():
        if not isinstance(keys, Mapping):
            raise PlanError(f"node.{name} is {keys!r}, expected a table such as [node.{name}]")
        _check_keys(keys, [f.name for f in fields(NodePlan)], f"node {name!r} of the plan")
        try:
            nodes[name] = NodePlan(**keys)
        except PlanError as error:
            raise PlanError(f"node {name!r} of the plan: {error}") from None
    values.update({key: value for key, value in overrides.items() if value is not None})
    return Plan(**values, nodes=nodes)


def folding(outputs: int, depth: int, choice: NodePlan, node: str) -> tuple[int, int]:
    """Processing elements and SIMD terms of a folded dot product.

    Without stated `pe` and `simd`, the pair whose fold ``(outputs / pe) * (depth / simd)`` is nearest to the reuse
    factor is taken (the smaller fold of two as near, the larger simd of two alike).

    Args:
        outputs: number of sums.
        depth: terms of each sum.
        choice: the node's plan, reuse filled in.
        node: name for messages.

    Raises:
        PlanError: a stated `pe` or `simd` does not divide what it folds.
    """
    for name, value, whole, what in (
        ("pe", choice.pe, outputs, "output channels"),
        ("simd", choice.simd, depth, "terms of each sum"),
    ):
        if value is not None and whole % value:
            raise PlanError(
                f"node {node!r}: {name} is {value}, expected a divisor of its {whole} {what}: "
                f"{', '.join(map(str, divisors(whole)))}"
            )
    pes = [choice.pe] if choice.pe else divisors(outputs)
    simds = [choice.simd] if choice.simd else divisors(depth)
    reuse = choice.reuse or 1

    def rank(pair: tuple[int, int]) -> tuple[int, int, int]:
        fold = (outputs // pair[0]) * (depth // pair[1])
        return abs(fold - reuse), fold, -pair[1]

    return min(((pe, simd) for pe in pes for simd in simds), key=rank)


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def _check_keys(table: Mapping[str, Any], known: list[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise PlanError(f"{where} has the key {key!r}, expected one of {', '.join(known)}{_nearest(key, known)}")


def _check_word(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        words = [word for word in known if word is not None]
        if str(value) in words:
            raise PlanError(f"{name} is the number {value!r}, expected the text {str(value)!r}; put it in quotes")
        raise PlanError(f"{name} is {value!r}, expected one of {', '.join(words)}{_nearest(str(value), words)}")


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
