"""How deep every FIFO must be.

The region is a network of deterministic processes, so whether it can deadlock does not depend on timing. A lazy
execution, in which a process runs only as far as the beat that somebody asks for, keeps every FIFO as empty as
possible; the largest occupancy a FIFO reaches in it is its minimal depth:

* enough: that execution is one valid schedule within these depths, and in such a network, if one schedule
  completes, every schedule does;
* needed: beats pile up only where a fork had to pass them to feed another branch whose result the join waits for:
  ``max over k (beats the fork has produced when the long branch yields beat k - beats the join has taken)``.

A fork hands each beat to all its readers in one cycle or to none, as its pipelined hardware does; in C it writes the
deepest FIFO first, which comes to the same. Pipelines are built flushable (``pipeline_style frp``), so that a result in
flight never waits for further input.

Every FIFO gets at least two places, so that writer and reader can work in the same cycle. All processes finish a
sample with nothing left over, so one sample decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgemat.targets.hls.process import Channel, Process

MINIMUM_DEPTH = 2


def fifo_depths(processes: Sequence[Process]) -> dict[str, int]:
    """Minimal depth in beats of every channel inside the region, by channel name.

    Args:
        processes: the region's processes, in any order.
    """
    if all(len(process.inputs) < 2 for process in processes):
        # Without a join nothing waits for two branches at once, so nothing piles up.
        return {c.name: MINIMUM_DEPTH for process in processes for c in process.outputs if not c.port}
    occupancy = _Lazy(processes).run()
    return {name: max(MINIMUM_DEPTH, most) for name, most in occupancy.items()}


class _Starved(Exception):
    """An input port has given all that it may give for now."""


class _Lazy:
    def __init__(self, processes: Sequence[Process]) -> None:
        self.producer: dict[str, int] = {}
        self.events: list[Iterator[int]] = []
        self.pending: list[int | None] = []
        self.inputs: list[tuple[Channel, ...]] = []
        self.outputs: list[tuple[Channel, ...]] = []
        self.fill: dict[str, int] = {}
        self.most: dict[str, int] = {}
        self.given: dict[str, int] = {}
        self.allowed: dict[str, int] = {}
        self.ports: list[Channel] = []
        for index, process in enumerate(processes):
            self.events.append(process.pattern.events())
            self.pending.append(None)
            self.inputs.append(process.inputs)
            self.outputs.append(process.outputs)
            for channel in process.outputs:
                self.producer[channel.name] = index
                self.fill[channel.name] = self.most[channel.name] = 0
            for channel in process.inputs:
                if channel.port == "input":
                    self.ports.append(channel)
                    self.given[channel.name] = 0
        sinks = {c.name for p in processes for c in p.inputs}
        self.results = [c for p in processes for c in p.outputs if c.name not in sinks]
        # A process without results (a drain) must run as well: its input is what is asked for.
        self.drains = [i for i, p in enumerate(processes) if not p.outputs]

    def run(self) -> dict[str, int]:
        """Occupancies of the channels inside the region."""
        rounds = max((port.beats for port in self.ports), default=0)
        wanted = {channel.name: channel.beats for channel in self.results}
        for step in range(rounds + 1):
            # The inputs arrive in step with each other; whatever can be finished with what is there, is.
            for port in self.ports:
                self.allowed[port.name] = -(-port.beats * step // max(rounds, 1))
            for channel in self.results:
                while wanted[channel.name] and self.attempt(channel):
                    wanted[channel.name] -= 1
                    self.fill[channel.name] = 0
            for index in self.drains:
                self.exhaust(index)
        assert not any(wanted.values()), "a process needs more beats than its inputs have"
        return {n: most for n, most in self.most.items() if n not in wanted}

    def attempt(self, channel: Channel) -> bool:
        try:
            self.pull(channel.name)
        except _Starved:
            return False
        return True

    def exhaust(self, index: int) -> None:
        """Let a process without outputs take what it can get."""
        try:
            while (needed := self.advance(index)) is not None:
                if needed:
                    self.pull(needed)
        except _Starved:
            return

    def pull(self, name: str) -> None:
        """Run producers until the channel holds a beat."""
        asked = [name]
        while asked:
            if self.fill[asked[-1]]:
                asked.pop()
                continue
            needed = self.advance(self.producer[asked[-1]])
            assert needed is not None, f"the process that writes {asked[-1]} ends too early"
            if needed:
                asked.append(needed)

    def advance(self, index: int) -> str | None:
        """One event of a process: "" when it happened, the channel it waits for, or None at the process's end."""
        if self.pending[index] is None:
            self.pending[index] = next(self.events[index], None)
        event = self.pending[index]
        if event is None:
            return None
        if event < 0:
            self.write(index, event)
            if len(self.outputs[index]) > 1:  # a fork: the other readers get the beat as well
                while (following := next(self.events[index], None)) is not None and following < 0:
                    self.write(index, following)
                self.pending[index] = following
                return ""
        else:
            channel = self.inputs[index][event]
            if channel.port == "input":
                if self.given[channel.name] >= self.allowed[channel.name]:
                    raise _Starved
                self.given[channel.name] += 1
            elif not self.fill[channel.name]:
                return channel.name
            else:
                self.fill[channel.name] -= 1
        self.pending[index] = None
        return ""

    def write(self, index: int, event: int) -> None:
        """One beat into an output of a process."""
        name = self.outputs[index][~event].name
        self.fill[name] += 1
        self.most[name] = max(self.most[name], self.fill[name])
