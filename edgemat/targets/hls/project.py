"""The HLS project: what each file says, and writing the folder in one go.

`Project` prepares every word the templates print; they only loop. `export` writes to a temporary folder beside the
target and renames it on success. The same graph and plan give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np

import edgemat
from edgemat.errors import EdgematError
from edgemat.targets.destination import write_project
from edgemat.targets.hls.config import Config, ConstantArray, integer
from edgemat.targets.hls.design import COMPLETE_ELEMENTS, REGISTER_PORT_BITS, Design, make_design
from edgemat.targets.hls.plan import Plan, load_plan
from edgemat.targets.hls.process import Channel
from edgemat.targets.hls.vectors import encode, sample_vectors
from edgemat.targets.layout import Network, to_native
from edgemat.targets.scales import scale_literal
from edgemat.targets.templates import render

MARKER = "parameters.hpp"
_PACKAGE = "edgemat.targets.hls"
INLINE_ELEMENTS = 256
_SIM = ("hls_stream.h", "edgemat_trace.h", "ap_axi_sdata.h")


@dataclass(frozen=True)
class PortText:
    """A port of the top function."""

    kind: str
    name: str
    suffix: str
    shape: str
    format: str
    remark: str
    element: str
    type: str
    size: int
    lanes: int
    rounding: str
    overflow: str
    fracs: str
    frac_count: int
    widths: str
    scale: str = ""
    low: str = ""
    high: str = ""

    @property
    def worth(self) -> str:
        """What a code is worth where its format does not say so."""
        return f"; value = code * {self.scale}, codes {self.low} to {self.high}" if self.scale else ""


@dataclass(frozen=True)
class MemoryText:
    """An external memory of the top function."""

    name: str
    type: str
    words: int
    file: str


@dataclass(frozen=True)
class StateText:
    """A recurrent state of the top function: a static array, and the array that a step writes."""

    name: str
    next: str
    element: str
    size: int
    lanes: int
    shape: str
    format: str
    pragmas: tuple[str, ...]
    next_pragmas: tuple[str, ...]


@dataclass(frozen=True)
class ChannelText:
    """A local stream or array of the top function."""

    declaration: str
    pragmas: tuple[str, ...]


@dataclass(frozen=True)
class TraceText:
    """An array that a traced simulation writes out."""

    name: str
    size: int


@dataclass(frozen=True)
class CallText:
    """One call of the top function."""

    label: str
    text: str
    traces: tuple[TraceText, ...]


@dataclass(frozen=True)
class ArrayText:
    """A constant array (`element` with its qualifier) and, where it is large, the file it goes to."""

    name: str
    element: str
    extents: str
    lines: tuple[str, ...]
    file: str


@dataclass(frozen=True)
class NodeText:
    """What parameters.hpp says about one process."""

    arrays: tuple[ArrayText, ...]
    config: Config | None


class Project:
    """Everything the templates print for one design.

    Args:
        design: from `make_design`.
    """

    def __init__(self, design: Design) -> None:
        self.design = design
        self.version = edgemat.__version__
        self.top = design.top
        self.guard = design.top.upper()
        self.stream = design.stream
        self.dataflow = design.dataflow
        self.part = design.plan.part
        self.clock_ns = f"{design.plan.clock_ns:g}"
        self.port_kind = design.plan.port_kind
        self.stream_ports = self.stream and self.port_kind != "memory"
        self.inputs = tuple(self._port(c, i, len(design.inputs)) for i, c in enumerate(design.inputs))
        self.outputs = tuple(self._port(c, i, len(design.outputs)) for i, c in enumerate(design.outputs))
        self.ports = self.inputs + self.outputs
        self.states = tuple(self._state(read, written) for read, written in design.states)
        self.input_size = sum(p.size for p in self.inputs) + bool(self.states)
        self.output_size = sum(p.size for p in self.outputs)
        self.memories = tuple(
            MemoryText(m.name, f"ap_uint<{m.word_bits}>", m.words, f"{m.name}.bin") for m in design.memories
        )
        self.arguments = ", ".join([*(p.name for p in self.ports), *(f"{m.name}.data()" for m in self.memories)])
        parameters = [*map(self._parameter, self.ports), *(f"const {m.type}* {m.name}" for m in self.memories)]
        self.signature = ", ".join(parameters)
        if self.states:
            arrays = [f"const {s.element} {s.name}[{s.size}], {s.element} {s.next}[{s.size}]" for s in self.states]
            self.step_signature = ", ".join([*parameters, *arrays])
            names = [*(p.name for p in self.ports), *(m.name for m in self.memories)]
            self.step_arguments = ", ".join([*names, *(f"{s.name}, {s.next}" for s in self.states)])
            self.signature = f"bool reset, {self.signature}"
            self.arguments = f"reset, {self.arguments}"
        self.pragmas = tuple(self._top_pragmas())
        self.region_pragma = "DATAFLOW" if self.dataflow else "PIPELINE II=1"
        self.channels = tuple(self._channel(c) for c in design.channels)
        traced = [c for p in design.processes for c in p.traced]
        self.calls = tuple(
            CallText(p.label, p.call, tuple(TraceText(c.name, c.size) for c in p.traced)) for p in design.processes
        )
        self.trace_channels = traced
        headers = sorted({p.header for p in design.processes})
        self.includes = ["dataflow", *headers, *(["state"] if self.states else [])]
        with_last = self.port_kind == "axis_last"
        self.top_includes = ["<hls_stream.h>", '"edgemat/types.hpp"'] if self.stream_ports else ['"edgemat/types.hpp"']
        self.top_includes += ['"edgemat/axis.hpp"'] if with_last else []
        self.testbench_header = "testbench_axis" if with_last else "testbench"
        self.nodes = tuple(
            NodeText(tuple(self._array(a) for a in p.arrays), p.config)
            for p in design.processes
            if p.arrays or p.config
        )

    # -- words ---------------------------------------------------------------------------------------------------
    def _port(self, channel: Channel, index: int, count: int) -> PortText:
        tensor, kind = channel.tensor, channel.port
        fmt = tensor.format
        graph = self.design.network.graph
        names = getattr(graph, f"{kind}_names", None) or getattr(graph, f"{kind}s")
        beat = f"edgemat::vec<{channel.element}, {channel.lanes}>"
        if self.port_kind == "axis_last":
            beat = f"edgemat::axis_word<{-(-channel.width // 8) * 8}>::type"
        return PortText(
            kind,
            channel.name,
            kind if count == 1 else channel.name,
            "x".join(map(str, tensor.shape)) or "1",
            str(fmt) if len(fmt.fracs) <= 8 else f"{fmt.width} bits, a binary point per channel",
            f", {channel.lanes} per beat" if self.stream_ports else "",
            channel.element,
            f"hls::stream<{beat} >",
            channel.size,
            channel.lanes,
            fmt.rounding,
            fmt.overflow,
            ", ".join(map(str, fmt.fracs)),
            len(fmt.fracs),
            ", ".join(map(str, fmt.widths or ())),
            scale_literal(graph, names[index]),
            integer(tensor.lo),
            integer(tensor.hi),
        )

    def _parameter(self, port: PortText) -> str:
        if self.stream_ports:
            return f"{port.type}& {port.name}"
        const = "const " if port.kind == "input" else ""
        return f"{const}{port.element} {port.name}[{port.size}]"

    def _top_pragmas(self) -> list[str]:
        lines = []
        for channel in (*self.design.inputs, *self.design.outputs):
            if self.stream_ports:
                lines.append(f"INTERFACE mode=axis port={channel.name}")
            elif (
                self.port_kind == "registers"
                and channel.size * channel.tensor.format.storage_width <= REGISTER_PORT_BITS
            ):
                lines.append(f"ARRAY_RESHAPE variable={channel.name} type=complete dim=0")
                lines.append(f"INTERFACE mode=ap_vld port={channel.name}")
            else:
                lines.append(f"INTERFACE mode=ap_memory port={channel.name}")
        for memory in self.memories:
            lines.append(
                f"INTERFACE mode=m_axi port={memory.name} bundle={memory.name} offset=slave depth={memory.words}"
            )
            lines.append(f"INTERFACE mode=s_axilite port={memory.name} bundle=control")
        if self.memories:
            lines.append("INTERFACE mode=s_axilite port=return bundle=control")
        if self.states:
            lines.append(f"INTERFACE mode={'s_axilite bundle=control' if self.memories else 'ap_none'} port=reset")
        return lines

    def _state(self, read: Channel, written: Channel) -> StateText:
        tensor = read.tensor
        lanes = read.size if not self.dataflow and read.size <= COMPLETE_ELEMENTS else tensor.shape[-1]
        fmt = tensor.format
        return StateText(
            read.name,
            written.name,
            read.element,
            read.size,
            lanes,
            "x".join(map(str, tensor.shape)),
            str(fmt) if len(fmt.fracs) <= 8 else f"{fmt.width} bits, a binary point per channel",
            (self._array_pragma(read),),
            (self._array_pragma(written),),
        )

    @staticmethod
    def _array_pragma(channel: Channel) -> str:
        if channel.size <= COMPLETE_ELEMENTS:
            return f"ARRAY_PARTITION variable={channel.name} type=complete dim=0"
        return f"ARRAY_RESHAPE variable={channel.name} type=cyclic factor={channel.tensor.shape[-1]} dim=1"

    def _channel(self, channel: Channel) -> ChannelText:
        if self.stream:
            kind = f"hls::stream<edgemat::vec<{channel.element}, {channel.lanes}>, {channel.depth}>"
            return ChannelText(f'{kind} {channel.name}("{channel.name}")', ())
        return ChannelText(f"{channel.element} {channel.name}[{channel.size}]", (self._array_pragma(channel),))

    @staticmethod
    def _array(array: ConstantArray) -> ArrayText:
        large = array.values.size > INLINE_ELEMENTS
        return ArrayText(
            array.name,
            f"{array.qualifier} {array.element}",
            array.extents,
            array.lines,
            f"weights/{array.name}.hpp" if large else "",
        )

    # -- files ---------------------------------------------------------------------------------------------------
    def files(self, *, vectors: bool = True) -> dict[str, bytes]:
        """Contents of every file by relative path.

        Args:
            vectors: include samples and their expected codes (the reference computes them).
        """
        made = {
            f"{self.top}.hpp": render(_PACKAGE, "top.hpp", p=self),
            f"{self.top}.cpp": render(_PACKAGE, "top.cpp", p=self),
            f"{self.top}_host.hpp": render(_PACKAGE, "host.hpp", p=self),
            "parameters.hpp": render(_PACKAGE, "parameters.hpp", p=self),
            "testbench.cpp": render(_PACKAGE, "testbench.cpp", p=self),
            "build_hls.tcl": render(_PACKAGE, "build_hls.tcl", p=self),
            "hls_config.cfg": render(_PACKAGE, "hls_config.cfg", p=self),
            "Makefile": render(_PACKAGE, "Makefile", p=self),
        }
        for node in self.nodes:
            for array in node.arrays:
                if array.file:
                    made[array.file] = render(_PACKAGE, "weights.hpp", array=array)
        contents = {name: text.encode() for name, text in made.items()}
        for memory in self.design.memories:
            contents[f"memory/{memory.name}.bin"] = memory.contents.tobytes()
        for name in library_closure([*self.includes, "rounding", "types", self.testbench_header, "boundary"]):
            contents[f"include/edgemat/{name}"] = library().joinpath("include", "edgemat", name).read_bytes()
        for name in _SIM:
            contents[f"sim/{name}"] = library().joinpath("sim", name).read_bytes()
        if vectors:
            codes, expected = sample_vectors(self.design.network)
            resets = np.arange(len(next(iter(codes.values())))) == 0 if self.states else None
            contents["vectors/inputs.bin"] = encode(self.design.network.inputs, codes, resets)
            contents["vectors/expected.bin"] = encode(self.design.network.outputs, expected)
        return contents


def library() -> Traversable:
    """The template library: package data of an installed edgemat, else the sibling folder of a source checkout."""
    installed = resources.files("edgemat").joinpath("_hls_templates")
    if installed.joinpath("include").is_dir():
        return installed
    sibling = Path(__file__).resolve().parents[3] / "hls_templates"
    if not (sibling / "include").is_dir():
        raise EdgematError(f"the HLS template library is missing at {sibling}; install edgemat again")
    return sibling


def library_closure(stems: Sequence[str]) -> list[str]:
    """File names of the headers that `stems` need, themselves included, sorted."""
    found: set[str] = set()
    waiting = [f"{stem}.hpp" for stem in stems]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        text = library().joinpath("include", "edgemat", name).read_text(encoding="utf-8")
        waiting += re.findall(r'#include "edgemat/([a-z_]+\.hpp)"', text)
    return sorted(found)


def plan_from(
    io: str | None = None,
    reuse: int | None = None,
    plan: Path | str | Plan | None = None,
    clock_ns: float | None = None,
    part: str | None = None,
    ports: str | None = None,
    products: str | None = None,
) -> Plan:
    """The plan that options and a plan file give together; options win."""
    given: dict[str, Any] = {"io": io, "reuse": reuse, "clock_ns": clock_ns, "part": part, "ports": ports}
    given["products"] = products
    given = {key: value for key, value in given.items() if value is not None}
    if isinstance(plan, Plan):
        return Plan(**{**{name: getattr(plan, name) for name in plan.__dataclass_fields__}, **given})
    return Plan(**given) if plan is None else load_plan(plan, **given)


def project(graph: Any, plan: Plan | None = None) -> Project:
    """Plan the HLS project of a lowered graph.

    Args:
        graph: a `Graph` of `edgemat.lower.reader`, or a `Network`.
        plan: choices; the defaults of `Plan` if not given.

    Raises:
        UnsupportedOpError: an operator has no template.
        PlanError: the plan does not fit the model.
    """
    network = graph if isinstance(graph, Network) else to_native(graph)
    return Project(make_design(network, plan or Plan()))


def export(graph: Any, output: Path | str, **options: Any) -> Path:
    """Write the HLS project of a lowered graph; an earlier one at that place is replaced.

    Args:
        graph: a `Graph` of `edgemat.lower.reader`.
        output: folder to write.
        **options: those of `plan_from`.

    Returns:
        The folder.

    Raises:
        EdgematError: it cannot be written; nothing is left behind.
    """
    return write_project(project(graph, plan_from(**options)).files(), Path(output), "hls", MARKER)
