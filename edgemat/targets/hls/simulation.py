"""The generated C++ on this machine: compiled once against the real ap_* headers, fed codes, read back as codes."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edgemat.errors import ToolchainError
from edgemat.targets import toolchain
from edgemat.targets.apheaders import require_ap_headers
from edgemat.targets.destination import write_files
from edgemat.targets.hls.plan import Plan
from edgemat.targets.hls.project import Project, project
from edgemat.targets.hls.vectors import decode, encode
from edgemat.targets.sequences import by_step, in_order, resets_of

STRICT = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-uninitialized", "-Wno-maybe-uninitialized")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
DEADLOCK_STATUS = 3
_RUN_TIMEOUT_S = 3600.0


class DeadlockError(ToolchainError):
    """The processes of a dataflow region wait for each other; the message names them and their FIFOs."""


class Simulation:
    """A compiled C simulation; use it as a context manager, or call `close`.

    Args:
        graph: a `Graph` of `edgemat.lower.reader`, or a `Project`.
        plan: choices; the defaults of `Plan` if not given.
        trace: return every tensor, not only the outputs.
        threads: run every process in a thread against the declared FIFO depths (io=stream).
        compiler: the C++ compiler to use; found if not given.
        flags: further compiler flags (`STRICT`, `SANITIZE`).
        defines: further macros.
        standard: what follows ``-std=``.
        optimize: what follows ``-O``.

    Raises:
        ToolchainError: no compiler or headers, or the compiler failed.
    """

    def __init__(
        self,
        graph: Any,
        plan: Plan | None = None,
        *,
        trace: bool = False,
        threads: bool = False,
        compiler: toolchain.Compiler | None = None,
        flags: tuple[str, ...] = (),
        defines: Mapping[str, str | int | None] | None = None,
        standard: str = "c++14",
        optimize: str = "2",
    ) -> None:
        self.project = graph if isinstance(graph, Project) else project(graph, plan)
        self.trace = trace
        compiler = compiler or toolchain.find_cxx()
        headers = require_ap_headers()
        self._folder = tempfile.TemporaryDirectory(prefix="edgemat-hls-")
        self.folder = Path(self._folder.name)
        macros: dict[str, str | int | None] = dict(defines or {})
        if trace:
            macros["EDGEMAT_TRACE"] = None
        if threads:
            macros["EDGEMAT_THREADS"] = None
        try:
            write_files(self.project.files(vectors=False), self.folder)
            # One translation unit: the headers are read once.
            unit = self.folder / "simulation.cpp"
            unit.write_text(f'#include "{self.project.top}.cpp"\n#include "testbench.cpp"\n', encoding="utf-8")
            self.program = toolchain.compile(
                compiler,
                [unit],
                self.folder / "testbench",
                standard=standard,
                optimize=optimize,
                include=[self.folder, self.folder / "include", self.folder / "sim"],
                system_include=[headers],
                defines=macros,
                flags=[*compiler.ap_flags, "-Wno-unknown-pragmas", *(("-pthread",) if threads else ()), *flags],
            )
        except OSError as error:
            self.close()
            raise ToolchainError(
                f"the HLS C simulation could not be written to {self.folder} ({error.strerror}); make room there"
            ) from error
        except BaseException:
            self.close()
            raise

    def run_sequence(self, codes: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`run` for sequences: codes ``[T, N, *shape]`` in and out, N sequences of T steps."""
        flat, resets = in_order(codes)
        return by_step(self.run(flat, resets), next(iter(codes.values())).shape[0])

    def run(self, codes: Mapping[str, np.ndarray], resets: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Run samples back to back.

        Args:
            codes: int64 codes ``[N, *shape]`` of every input, by code-tensor name.
            resets: bool ``[N]``, for models with states: which samples begin a sequence; by default each does.

        Returns:
            int64 codes of the outputs (with ``trace``: of every tensor, and what the states hold then by
            `State.output`) by graph tensor name.

        Raises:
            DeadlockError: with threads, all processes wait.
            ToolchainError: the program ended with an error.
        """
        network = self.project.design.network
        traces = self.folder / "traces"
        files = [self.folder / "inputs.bin", self.folder / "outputs.bin", self.folder / "memory"]
        arguments = [str(self.program), *map(str, files)]
        try:
            (self.folder / "inputs.bin").write_bytes(
                encode(network.inputs, codes, resets_of(codes, resets) if network.states else None)
            )
            traces.mkdir(exist_ok=True)
            environment = {**os.environ, "EDGEMAT_TRACE_FOLDER": str(traces)}
            done = toolchain.finish(arguments, timeout_s=_RUN_TIMEOUT_S, env=environment)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ToolchainError(
                f"the HLS C simulation could not be run ({error}); check the compiler and the room on the disk"
            ) from error
        if done.returncode != 0:
            words = " | ".join(done.stderr.decode("utf-8", "replace").strip().splitlines()[:12])
            if done.returncode == DEADLOCK_STATUS:
                raise DeadlockError(words)
            raise ToolchainError(f"the HLS C simulation ended with status {done.returncode}, expected 0: {words}")
        found: dict[str, np.ndarray] = {}
        if self.trace:
            for channel in self.project.trace_channels:
                data = (traces / f"{channel.name}.bin").read_bytes()
                found |= decode([channel.tensor], data)
            for text, state in zip(self.project.states, network.states, strict=True):
                found |= decode([state.held], (traces / f"{text.name}.bin").read_bytes())
        return found | decode(network.outputs, (self.folder / "outputs.bin").read_bytes())

    def close(self) -> None:
        """Remove the program."""
        self._folder.cleanup()

    def __enter__(self) -> Simulation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run_csim(
    graph: Any, codes: Mapping[str, np.ndarray], *, io: str = "parallel", plan: Plan | None = None, trace: bool = False
) -> dict[str, np.ndarray]:
    """Compile the C simulation of a graph and run samples through it.

    Args:
        graph: a `Graph` of `edgemat.lower.reader`.
        codes: int64 codes ``[N, *shape]`` of every input, by code-tensor name.
        io: "parallel" or "stream", where no plan is given.
        plan: choices.
        trace: return every tensor, not only the outputs.

    Returns:
        int64 codes by graph tensor name.

    Raises:
        ToolchainError: no compiler or headers, or the compiler or the program failed.
    """
    with Simulation(graph, plan or Plan(io=io), trace=trace) as simulation:
        return simulation.run(codes)
