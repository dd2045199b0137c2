"""Processes of a dataflow region and the order in which their loops read and write, beat by beat.

A `Pattern` is the exact sequence of reads and writes of one sample, as the C++ loops perform them; FIFO depths
(depths.py) and modelled cycles (cost.py) derive from it. An event is the number of the input that is read, or
``~output`` for a write.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from edgemat.targets.hls.config import Config, ConstantArray
from edgemat.targets.hls.ternary import Memory
from edgemat.targets.layout import NativeTensor, Step


@dataclass
class Channel:
    """A tensor on its way from one process to the next: a FIFO or an array.

    Attributes:
        name: C++ variable.
        tensor: what it carries.
        element: C++ type of an element.
        lanes: elements per beat (streams).
        port: "input", "output" or "" for a channel inside the region.
        depth: beats the FIFO holds.
    """

    name: str
    tensor: NativeTensor
    element: str
    lanes: int
    port: str = ""
    depth: int = 2

    @property
    def size(self) -> int:
        """Elements of one sample."""
        return self.tensor.size

    @property
    def beats(self) -> int:
        """Beats of one sample."""
        return self.tensor.size // self.lanes

    @property
    def width(self) -> int:
        """Bits of a beat."""
        return self.lanes * self.tensor.format.storage_width


@dataclass(frozen=True)
class Blocks:
    """`repeat` times: all reads of the block input by input, `compute` cycles, then all writes."""

    reads: tuple[int, ...]
    writes: int
    repeat: int = 1
    compute: int = 0

    def events(self) -> Iterator[int]:
        """Reads and writes in order."""
        for _ in range(self.repeat):
            for source, count in enumerate(self.reads):
                for _ in range(count):
                    yield source
            for _ in range(self.writes):
                yield ~0

    @property
    def cycles(self) -> int:
        """Cycles of one sample at II = 1."""
        return self.repeat * (sum(self.reads) + self.compute + self.writes)

    @property
    def fill(self) -> int:
        """Cycles before the first output."""
        return sum(self.reads) + self.compute


@dataclass(frozen=True)
class Lockstep:
    """`beats` times: one read of every input in order, one write of every output in order."""

    beats: int
    inputs: int = 1
    outputs: int = 1

    def events(self) -> Iterator[int]:
        """Reads and writes in order."""
        for _ in range(self.beats):
            yield from range(self.inputs)
            for sink in range(self.outputs):
                yield ~sink

    @property
    def cycles(self) -> int:
        """Cycles of one sample at II = 1."""
        return self.beats

    @property
    def fill(self) -> int:
        """Cycles before the first output."""
        return 1


@dataclass(frozen=True)
class Window:
    """A sliding window over a padded map (window.hpp)."""

    in_h: int
    in_w: int
    out_h: int
    out_w: int
    extent_h: int
    extent_w: int
    stride_h: int
    stride_w: int
    pad_top: int
    pad_left: int
    reads: int
    writes: int
    compute: int

    @property
    def rows(self) -> int:
        """Rows of positions."""
        return max((self.out_h - 1) * self.stride_h + self.extent_h, self.pad_top + self.in_h)

    @property
    def cols(self) -> int:
        """Columns of positions."""
        return max((self.out_w - 1) * self.stride_w + self.extent_w, self.pad_left + self.in_w)

    def positions(self) -> Iterator[tuple[bool, bool]]:
        """Whether each position reads a pixel, and whether it completes a window."""
        for row in range(self.rows):
            top = row - (self.extent_h - 1)
            row_done = top >= 0 and top % self.stride_h == 0 and top // self.stride_h < self.out_h
            row_read = self.pad_top <= row < self.pad_top + self.in_h
            for col in range(self.cols):
                left = col - (self.extent_w - 1)
                done = row_done and left >= 0 and left % self.stride_w == 0 and left // self.stride_w < self.out_w
                yield row_read and self.pad_left <= col < self.pad_left + self.in_w, done

    def events(self) -> Iterator[int]:
        """Reads and writes in order."""
        for read, done in self.positions():
            if read:
                for _ in range(self.reads):
                    yield 0
            if done:
                for _ in range(self.writes):
                    yield ~0

    @property
    def cycles(self) -> int:
        """Cycles of one sample: one per position or its reads, and per output its fold and its beats."""
        outputs = self.out_h * self.out_w
        extra = self.compute + self.writes
        moved = self.in_h * self.in_w * (self.reads - 1)
        return self.rows * self.cols + moved + outputs * (extra - 2 if extra > 2 else 0)

    @property
    def fill(self) -> int:
        """Cycles before the first output."""
        return (self.extent_h - 1) * self.cols + self.extent_w + self.compute


@dataclass(frozen=True)
class BeatConcat:
    """`outer` times: the beats of every input in turn, each passed on at once (concat.hpp)."""

    inner: tuple[int, ...]
    outer: int

    def events(self) -> Iterator[int]:
        """Reads and writes in order."""
        for _ in range(self.outer):
            for source, count in enumerate(self.inner):
                for _ in range(count):
                    yield source
                    yield ~0

    @property
    def cycles(self) -> int:
        """Cycles of one sample at II = 1."""
        return self.outer * sum(self.inner)

    @property
    def fill(self) -> int:
        """Cycles before the first output."""
        return 1


@dataclass(frozen=True)
class Repeat:
    """An upsampling that keeps one row (upsample.hpp)."""

    in_h: int
    in_w: int
    beats: int
    scale_h: int
    scale_w: int

    def events(self) -> Iterator[int]:
        """Reads and writes in order."""
        for row in range(self.in_h * self.scale_h):
            for col in range(self.in_w * self.scale_w):
                for _ in range(self.beats):
                    if row % self.scale_h == 0 and col % self.scale_w == 0:
                        yield 0
                    yield ~0

    @property
    def cycles(self) -> int:
        """Cycles of one sample at II = 1."""
        return self.in_h * self.scale_h * self.in_w * self.scale_w * self.beats

    @property
    def fill(self) -> int:
        """Cycles before the first output."""
        return 1


Pattern = Blocks | Lockstep | Window | BeatConcat | Repeat


@dataclass
class Process:
    """One call in the top function.

    Attributes:
        label: name in reports and in the simulator's messages.
        function: the template with its arguments, "edgemat::conv_stream<conv1_config>".
        arguments: C++ arguments.
        header: stem of the header that declares it.
        inputs: channels it reads, in the order of its events.
        outputs: channels it writes.
        pattern: order of its reads and writes.
        step: the step it carries out; None for loads, stores and clones.
        config: its config struct, if any.
        arrays: constant arrays it reads.
        multipliers: multiplications per cycle.
        macs: multiplications per sample.
        buffer_bits: bits of line buffers and held samples.
        shift_adds: shifted terms that are added per sample in place of multiplications by K-hot constants.
        memory: the external memory it reads its weights from.
        adders: modelled adders and subtracters of ternary sums.
        adder_luts: modelled LUTs of those.
        memory_bytes: bytes it reads from the external memory per sample.
    """

    label: str
    function: str
    arguments: tuple[str, ...]
    header: str
    inputs: tuple[Channel, ...]
    outputs: tuple[Channel, ...]
    pattern: Pattern
    step: Step | None = None
    config: Config | None = None
    arrays: tuple[ConstantArray, ...] = ()
    multipliers: int = 0
    macs: int = 0
    buffer_bits: int = 0
    traced: tuple[Channel, ...] = field(default=())
    shift_adds: int = 0
    memory: Memory | None = None
    adders: int = 0
    adder_luts: int = 0
    memory_bytes: int = 0

    @property
    def call(self) -> str:
        """The C++ call."""
        return f"{self.function}({', '.join(self.arguments)})"
