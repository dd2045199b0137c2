"""The generated C on an emulated microcontroller, with pip packages alone: ziglang compiles, unicorn runs.

unicorn runs in a process of its own (`unicorn_process.py`, started by path). Counts are instructions, not cycles: they
rank kernels and guard against regressions; they say nothing about latency.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from edgemat.errors import ToolchainError
from edgemat.targets import toolchain
from edgemat.targets.destination import write_files
from edgemat.targets.mcu.generator import project
from edgemat.targets.mcu.host import element_dtype, no_room, pack_samples, unpack_samples
from edgemat.targets.mcu.library import Project

_TARGETS = {
    "cortex-m4": ("-target", "thumb-freestanding-eabi", "-mcpu=cortex_m4"),
    "rv32imc": ("-target", "riscv32-freestanding-none", "-mcpu=generic_rv32+m+c"),
    "rv32ic": ("-target", "riscv32-freestanding-none", "-mcpu=generic_rv32+c-m"),
}
MACHINES = ("cortex-m4", "rv32imc")
"""Machines that `verify` and the tests run on."""
WITHOUT_MULTIPLIER = "rv32ic"
"""The same RISC-V code without the M extension: products become calls of a routine."""
_FLAGS = (
    "-nostartfiles", "-fno-strict-aliasing", "-fno-sanitize=undefined", "-fno-unroll-loops", "-fno-vectorize", "-g0"
)  # fmt: skip
_RUN_TIMEOUT_S = 3600.0
_INSTALL = 'run: pip install "edgemat[mcu]"'


@dataclass(frozen=True)
class Emulation:
    """What a run gave.

    Attributes:
        codes: int64 codes ``[N, *shape]`` by graph tensor name: outputs, or every tensor of a traced run.
        instructions: Instructions of the first sample (None if not counted).
        stack_bytes: Deepest stack.
    """

    codes: dict[str, np.ndarray]
    instructions: int | None
    stack_bytes: int


def missing() -> str | None:
    """Why nothing can be emulated here, and what to install; None where it can."""
    absent = [name for name in ("ziglang", "unicorn") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed; {_INSTALL}" if absent else None


def emulate(
    graph: Any,
    codes: dict[str, np.ndarray],
    machine: str = "cortex-m4",
    *,
    trace: bool = False,
    count: bool = False,
    optimize: str = "2",
    resets: np.ndarray | None = None,
) -> Emulation:
    """Compile a graph for a machine, run samples on its emulator.

    Args:
        graph: A `Graph` of `edgemat.lower.reader`, or a `Project`.
        codes: int64 codes ``[N, *shape]`` of every input, by code-tensor name.
        machine: One of `MACHINES`, or `WITHOUT_MULTIPLIER`.
        trace: Return every tensor, not only the outputs.
        count: Count the instructions of the first sample.
        optimize: What follows ``-O``.
        resets: bool ``[N]``, for models with states: which samples begin a sequence; by default each does.

    Raises:
        ToolchainError: ziglang or unicorn is missing, or one of them failed.
    """
    if machine not in _TARGETS:
        raise ToolchainError(f"machine {machine!r} is unknown, expected one of {', '.join(MACHINES)}")
    reason = missing()
    if reason is not None:
        raise ToolchainError(f"machine {machine} cannot be emulated: {reason}")
    made = graph if isinstance(graph, Project) else project(graph)
    try:
        return _emulate(made, codes, machine, trace, count, optimize, resets)
    except OSError as error:
        raise no_room(error) from error


def _emulate(
    made: Project,
    codes: dict[str, np.ndarray],
    machine: str,
    trace: bool,
    count: bool,
    optimize: str,
    resets: np.ndarray | None,
) -> Emulation:
    with tempfile.TemporaryDirectory(prefix="edgemat-emulated-") as name:
        folder = Path(name)
        elf = build(made, folder, machine, trace=trace, optimize=optimize)
        (folder / "samples.bin").write_bytes(pack_samples(made, codes, resets))
        traced = made.traced if trace else []
        tensors = [*traced, *(port.tensor for port in made.outputs), *(state.tensor for state in made.states)]
        outputs = [[f"em_io_{port.argument}", _bytes(port.tensor)] for port in made.outputs]
        outputs += [[f"em_io_{state.field}", state.bytes] for state in made.states]
        if traced:
            outputs.insert(0, ["em_io_trace", sum(map(_bytes, traced))])
        flags = [["em_io_reset", 1]] if made.states else []
        job = {
            "machine": machine, "elf": str(elf), "samples": str(folder / "samples.bin"),
            "results": str(folder / "results.bin"), "outputs": outputs, "count": count,
            "inputs": flags + [[f"em_io_{port.argument}", _bytes(port.tensor)] for port in made.inputs],
        }  # fmt: skip
        answer = _start(job)
        found = unpack_samples(tensors, (folder / "results.bin").read_bytes())
    return Emulation(found, answer["instructions"], answer["stack_bytes"])


def run_emulated(graph: Any, codes: dict[str, np.ndarray], machine: str = "cortex-m4") -> dict[str, np.ndarray]:
    """`emulate`, outputs only: int64 codes ``[N, *shape]`` by code-tensor name."""
    return emulate(graph, codes, machine).codes


def build(made: Project, folder: Path, machine: str, *, trace: bool = False, optimize: str = "2") -> Path:
    """Compile a project with its emulation harness; returns the ELF."""
    write_files(made.files(trace=trace, example=False), folder)
    (folder / "emulated.c").write_text(made.emulated(trace=trace), encoding="utf-8")
    runtime = resources.files("edgemat.targets.mcu").joinpath("runtime")
    write_files({"runtime/string.h": runtime.joinpath("string.h").read_text(encoding="utf-8")}, folder)
    zig = toolchain.zig_command()
    assert zig is not None
    compiler = toolchain.Compiler("c", (*zig, "cc", *_TARGETS[machine]), "zig", "")
    return toolchain.compile(
        compiler,
        [folder / name for name in ("emulated.c", "model.c", "kernels.c", "weights.c")],
        folder / "emulated.elf",
        standard="c99",
        optimize=optimize,
        include=[folder, folder / "runtime"],
        flags=[*_FLAGS, "-Wl,-e,em_emulated"],
    )


def _bytes(tensor: Any) -> int:
    return tensor.size * element_dtype(tensor).itemsize


def _start(job: dict[str, Any]) -> dict[str, Any]:
    script = Path(__file__).with_name("unicorn_process.py")
    try:
        arguments = [sys.executable, "-P", str(script), json.dumps(job)]
        done = toolchain.finish(arguments, timeout_s=_RUN_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"the emulator of {job['machine']} could not be run ({error})") from error
    if done.returncode != 0:
        words = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise ToolchainError(f"the emulator of {job['machine']} failed: {' '.join(words)}")
    answer: dict[str, Any] = json.loads(done.stdout)
    if answer["status"]:
        raise ToolchainError(f"the model on {job['machine']} returned status {answer['status']}, expected 0")
    return answer
