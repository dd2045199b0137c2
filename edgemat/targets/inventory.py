"""What this machine can build, run and measure, and how to get the rest.

``python -m edgemat.targets.inventory`` prints the table; the tests print the missing rows.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgemat.errors import ToolchainError
from edgemat.targets.apheaders import find_ap_headers
from edgemat.targets.toolchain import (
    compilers,
    find_arm_gcc,
    find_cxx,
    find_program,
    find_riscv_gcc,
    prepare_zig,
)

_DEBIAN = "make toolchains"
_TOOLS = (
    ("g++", "HLS C simulation, C library on the host", _DEBIAN),
    ("clang++", "the same, a second opinion", _DEBIAN),
    ("zig", "the same from pip alone; Cortex-M and RISC-V code", "pip install ziglang"),
    ("unicorn", "emulated Cortex-M4 and RV32IMC", "pip install unicorn"),
    ("ap_* headers", "HLS C simulation", "edgemat headers"),
    ("arm-none-eabi-gcc", "a second Cortex-M compiler", _DEBIAN),
    ("riscv64-unknown-elf-gcc", "a second RISC-V compiler", _DEBIAN),
    ("qemu-system-arm", "instruction counts on Cortex-M", _DEBIAN),
    ("qemu-system-riscv32", "instruction counts on RISC-V", _DEBIAN),
    ("qemu-x86_64", "onnxruntime on an emulated AVX2-only processor", _DEBIAN),
    ("SystemC", "sc_fixed, an independent oracle for rounding", _DEBIAN),
    ("yosys", "logic figures", _DEBIAN),
)


@dataclass(frozen=True)
class Tool:
    """One row of the tool table: what it is for, where it was found, and how to get it."""

    name: str
    purpose: str
    found: str | None
    install: str


def tools() -> list[Tool]:
    """What the native backends and their tests can use on this machine."""
    found: dict[str, str | Path | None] = {
        {"gcc": "g++", "clang": "clang++"}.get(each.name, each.name): each.version for each in compilers("c++")
    }
    found["unicorn"] = "installed" if importlib.util.find_spec("unicorn") else None
    found["ap_* headers"] = find_ap_headers()
    for compiler in (find_arm_gcc(), find_riscv_gcc()):
        if compiler is not None:
            found[Path(compiler.command[0]).name] = compiler.version
    for program in ("qemu-system-arm", "qemu-system-riscv32", "qemu-x86_64", "yosys"):
        found[program] = find_program(program)
    found["SystemC"] = next(Path("/usr/include").glob("systemc.h"), None)
    return [
        Tool(name, purpose, None if found.get(name) is None else str(found[name]), install)
        for name, purpose, install in _TOOLS
    ]


def main(arguments: Sequence[str]) -> int:
    """Print the table; with ``--prepare``, get the compiler from pip ready instead, if it will be used."""
    if "--prepare" in arguments:
        if _would_use_zig():
            print("== building the runtime of the C++ compiler from pip (about a minute, once)", flush=True)
            prepare_zig()
        return 0
    for tool in tools():
        state = tool.found or f"not found ({tool.install})"
        print(f"{tool.name:24} {state:48} {tool.purpose}")
    return 0


def _would_use_zig() -> bool:
    try:
        return find_cxx().name == "zig"
    except ToolchainError:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
