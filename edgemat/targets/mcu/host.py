"""The generated C on this machine: compiled once, fed binary codes, read back as binary codes."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edgemat.errors import ToolchainError
from edgemat.targets import toolchain
from edgemat.targets.destination import write_files
from edgemat.targets.layout import NativeTensor
from edgemat.targets.mcu.generator import project
from edgemat.targets.mcu.library import Project
from edgemat.targets.mcu.storage import size_of, storage
from edgemat.targets.sequences import by_step, in_order, resets_of

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
STRICT = ("-Wall", "-Wextra", "-Werror", "-Wconversion", "-Wshadow", "-pedantic", "-fno-strict-aliasing")
_SOURCES = ("model.c", "kernels.c", "weights.c", "harness.c")
_RUN_TIMEOUT_S = 3600.0


def element_dtype(tensor: NativeTensor) -> np.dtype:
    """The numpy type of a tensor's storage, little endian."""
    element = storage(tensor.format)
    return np.dtype(f"<{'i' if element[0] == 's' else 'u'}{size_of(element)}")


def pack_samples(made: Project, codes: dict[str, np.ndarray], resets: np.ndarray | None = None) -> bytes:
    """Input codes ``[N, *shape]`` by tensor name as the bytes the harness reads, sample by sample.

    Models with states get a byte first: whether the sample begins a sequence (`resets`; by default each does).
    """
    parts = [resets_of(codes, resets).astype(np.uint8)[:, None]] if made.states else []
    for port in made.inputs:
        given = np.asarray(codes[port.tensor.source])
        packed = port.tensor.pack(given).astype(element_dtype(port.tensor))
        parts.append(np.ascontiguousarray(packed).view(np.uint8).reshape(len(given), -1))
    return np.concatenate(parts, axis=1).tobytes()


def unpack_samples(tensors: list[NativeTensor], data: bytes) -> dict[str, np.ndarray]:
    """The bytes the harness wrote as int64 codes ``[N, *shape]`` by graph tensor name."""
    widths = [tensor.size * element_dtype(tensor).itemsize for tensor in tensors]
    table = np.frombuffer(data, dtype=np.uint8).reshape(-1, sum(widths))
    found: dict[str, np.ndarray] = {}
    at = 0
    for tensor, width in zip(tensors, widths, strict=True):
        raw = np.ascontiguousarray(table[:, at : at + width])
        flat = raw.view(element_dtype(tensor)).astype(np.int64)
        found[tensor.source] = tensor.unpack(flat)
        at += width
    return found


def no_room(error: OSError) -> ToolchainError:
    """The error for a temporary folder that cannot be written."""
    return ToolchainError(
        f"the temporary folder {tempfile.gettempdir()} cannot be written ({error.strerror}); make room, or set TMPDIR "
        "to another folder"
    )


class HostProgram:
    """A compiled model; use it as a context manager, or call `close`.

    Args:
        graph: A `Graph` of `edgemat.lower.reader`, or a `Project`.
        trace: Return every tensor, not only the outputs.
        compiler: The C compiler to use; found if not given.
        flags: Further compiler flags (`SANITIZE`, `STRICT`).
        optimize: What follows ``-O``.

    Raises:
        ToolchainError: no compiler, or it failed.
    """

    def __init__(
        self,
        graph: Any,
        *,
        trace: bool = False,
        compiler: toolchain.Compiler | None = None,
        flags: tuple[str, ...] = (),
        optimize: str = "2",
    ) -> None:
        self.project = graph if isinstance(graph, Project) else project(graph)
        self.trace = trace
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="edgemat-mcu-")
        except OSError as error:
            raise no_room(error) from error
        self.folder = Path(self._folder.name)
        try:
            write_files(self.project.files(trace=trace, example=False), self.folder)
            (self.folder / "harness.c").write_text(self.project.harness(trace=trace), encoding="utf-8")
            self.program = toolchain.compile(
                compiler or toolchain.find_c(),
                [self.folder / name for name in _SOURCES],
                self.folder / "harness",
                standard="c99",
                optimize=optimize,
                include=[self.folder],
                flags=["-fno-strict-aliasing", *flags],
            )
        except OSError as error:
            self.close()
            raise no_room(error) from error
        except BaseException:
            self.close()
            raise

    def run_sequence(self, codes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`run` for sequences: codes ``[T, N, *shape]`` in and out, N sequences of T steps."""
        flat, resets = in_order(codes)
        return by_step(self.run(flat, resets), next(iter(codes.values())).shape[0])

    def run(self, codes: dict[str, np.ndarray], resets: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Run samples.

        Args:
            codes: int64 codes ``[N, *shape]`` of every input, by code-tensor name.
            resets: bool ``[N]``, for models with states: which samples begin a sequence; by default each does.

        Returns:
            int64 codes of the outputs (with ``trace``: of every tensor) by graph tensor name, and what the states hold
            then by `State.output`.

        Raises:
            ToolchainError: the program ended with an error.
        """
        try:
            (self.folder / "samples.bin").write_bytes(pack_samples(self.project, codes, resets))
        except OSError as error:
            raise no_room(error) from error
        try:
            arguments = [str(self.program), str(self.folder / "samples.bin"), str(self.folder / "results.bin")]
            done = toolchain.finish(arguments, timeout_s=_RUN_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ToolchainError(f"the compiled model could not be run ({error}); check the compiler") from error
        if done.returncode != 0:
            words = done.stderr.decode("utf-8", "replace").strip().splitlines()[:12]
            raise ToolchainError(
                f"the compiled model ended with status {done.returncode}, expected 0: {' | '.join(words)}"
            )
        tensors = [*(self.project.traced if self.trace else ()), *(port.tensor for port in self.project.outputs)]
        tensors += [state.tensor for state in self.project.states]
        return unpack_samples(tensors, (self.folder / "results.bin").read_bytes())

    def close(self) -> None:
        """Remove the program."""
        self._folder.cleanup()

    def __enter__(self) -> HostProgram:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run_host(graph: Any, codes: dict[str, np.ndarray], *, trace: bool = False) -> dict[str, np.ndarray]:
    """Compile a graph with the host's compiler and run samples through it.

    Args:
        graph: A `Graph` of `edgemat.lower.reader`.
        codes: int64 codes ``[N, *shape]`` of every input, by code-tensor name.
        trace: Return every tensor, not only the outputs.

    Returns:
        int64 codes by graph tensor name.

    Raises:
        ToolchainError: no compiler, or it or the program failed.
    """
    with HostProgram(graph, trace=trace) as program:
        return program.run(codes)
