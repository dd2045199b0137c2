"""Compilers and emulators: what this machine has, how to call it, and what to install when it has nothing.

Generated C and C++ build with any of GCC, Clang or the Clang inside pip's ``ziglang`` package. They are
looked for in that order, so a machine without a system compiler still builds everything once ``pip install
"edgemat[mcu]"`` has run. ``EDGEMAT_CC`` and ``EDGEMAT_CXX`` name a compiler outright, arguments included
(``EDGEMAT_CXX="clang++-19 -stdlib=libc++"``).

Every subprocess is an argument list; no shell reads any of it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgemat.errors import ToolchainError

COMPILE_TIMEOUT_S = 600.0

# Zig's Clang switches undefined-behaviour traps on where no -O is given, and its libc++ clashes with the
# std::complex part of the ap_* headers; these two macros are the include guards of that part.
_ZIG_FLAGS = ("-fno-sanitize=undefined", "-Wno-unused-command-line-argument")
_ZIG_AP_DEFINES = ("-D__AP_INT_SPECIAL_H__", "-D__AP_FIXED_SPECIAL_H__")

_INSTALL_COMPILER = 'install g++ or clang, or run: pip install "edgemat[mcu]" (a compiler from pip)'


@dataclass(frozen=True)
class Compiler:
    """One C or C++ compiler.

    Attributes:
        kind: ``"c"`` or ``"c++"``.
        command: The argument list that starts it, flags that it always needs included.
        name: ``"gcc"``, ``"clang"``, ``"zig"``, or the file name of a compiler that is none of these.
        version: The first line it prints for ``--version``.
    """

    kind: str
    command: tuple[str, ...]
    name: str
    version: str

    @property
    def ap_flags(self) -> tuple[str, ...]:
        """Flags without which the vendor's ``ap_*`` headers do not compile here."""
        return _ZIG_AP_DEFINES if self.name == "zig" and self.kind == "c++" else ()

    def environment(self) -> dict[str, str]:
        """The environment to start it in: this process's, with a cache folder for Zig where it has none."""
        environment = dict(os.environ)
        if self.name == "zig" and "ZIG_GLOBAL_CACHE_DIR" not in environment and not _can_cache_at_home():
            environment["ZIG_GLOBAL_CACHE_DIR"] = str(user_cache_dir() / "zig")
        return environment


def user_cache_dir() -> Path:
    """The folder edgemat keeps what it fetched or built in: ``EDGEMAT_CACHE``, or the user's cache folder.

    It is not created here. Without a writable home folder it is one below the system's temporary folder.
    """
    named = os.environ.get("EDGEMAT_CACHE")
    if named:
        return Path(named).expanduser()
    if not _can_cache_at_home():
        user = os.getuid() if hasattr(os, "getuid") else 0
        return Path(tempfile.gettempdir()) / f"edgemat-cache-{user}"
    return _home_cache_dir() / "edgemat"


def _home_cache_dir() -> Path:
    if platform.system() == "Windows":
        return Path(os.environ.get("LOCALAPPDATA", "~/AppData/Local")).expanduser()
    if platform.system() == "Darwin":
        return Path("~/Library/Caches").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def _can_cache_at_home() -> bool:
    try:
        folder = _home_cache_dir()
    except RuntimeError:  # no home folder at all
        return False
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK)


@functools.cache
def _version_line(command: tuple[str, ...]) -> str | None:
    """The first line of ``command --version``, or None when it cannot be run."""
    try:
        done = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, timeout=60, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def _named(kind: str, variable: str) -> Compiler | None:
    """The compiler the environment names; an error if it does not run, since the user asked for it."""
    text = os.environ.get(variable, "").strip()
    if not text:
        return None
    command = tuple(shlex.split(text))
    version = _version_line(command)
    if version is None:
        raise ToolchainError(
            f"{variable} names {text!r}, which does not run; name a working {kind} compiler or unset it."
        )
    low = f"{' '.join(command)} {version}".lower()
    if "zig" in low:
        return Compiler(kind, (*command, *_ZIG_FLAGS), "zig", version)
    name = "clang" if "clang" in low else "gcc" if "gcc" in low or "g++" in low else Path(command[0]).name
    return Compiler(kind, command, name, version)


def _on_path(kind: str, program: str, name: str) -> Compiler | None:
    path = shutil.which(program)
    if path is None:
        return None
    version = _version_line((path,))
    return None if version is None else Compiler(kind, (path,), name, version)


def zig_command() -> tuple[str, ...] | None:
    """How to start pip's ``ziglang``, or None where it is not installed."""
    if importlib.util.find_spec("ziglang") is None:
        return None
    return (sys.executable, "-m", "ziglang")


def _zig(kind: str) -> Compiler | None:
    zig = zig_command()
    if zig is None:
        return None
    command = (*zig, "cc" if kind == "c" else "c++")
    version = _version_line(command)
    return None if version is None else Compiler(kind, (*command, *_ZIG_FLAGS), "zig", version)


_PROGRAMS = {"c": (("gcc", "gcc"), ("clang", "clang")), "c++": (("g++", "gcc"), ("clang++", "clang"))}
_VARIABLES = {"c": "EDGEMAT_CC", "c++": "EDGEMAT_CXX"}


def compilers(kind: str) -> list[Compiler]:
    """Every compiler of a kind on this machine, the one to use by default first.

    Args:
        kind: ``"c"`` or ``"c++"``.

    Raises:
        ToolchainError: ``EDGEMAT_CC`` or ``EDGEMAT_CXX`` names something that does not run.
    """
    found = [_named(kind, _VARIABLES[kind])]
    found += [_on_path(kind, program, name) for program, name in _PROGRAMS[kind]]
    if not (platform.system() == "Darwin" and any(found)):  # Apple's gcc is Clang under another name
        found.append(_zig(kind))
    return list(dict.fromkeys(compiler for compiler in found if compiler is not None))


def _find(kind: str) -> Compiler:
    chosen = _named(kind, _VARIABLES[kind])
    for program, name in _PROGRAMS[kind] if chosen is None else ():
        chosen = _on_path(kind, program, name)
        if chosen is not None:
            break
    chosen = chosen or _zig(kind)
    if chosen is None:
        language = "C" if kind == "c" else "C++"
        raise ToolchainError(f"No {language} compiler was found; {_INSTALL_COMPILER}.")
    return chosen


def find_c() -> Compiler:
    """The C compiler to use: ``EDGEMAT_CC``, gcc, clang, or pip's ziglang.

    Raises:
        ToolchainError: There is none; the message says what to install.
    """
    return _find("c")


def find_cxx() -> Compiler:
    """The C++ compiler to use: ``EDGEMAT_CXX``, g++, clang++, or pip's ziglang.

    Raises:
        ToolchainError: There is none; the message says what to install.
    """
    return _find("c++")


def find_arm_gcc() -> Compiler | None:
    """The bare-metal Arm compiler ``arm-none-eabi-gcc``, or None (Debian: gcc-arm-none-eabi)."""
    return _on_path("c", "arm-none-eabi-gcc", "gcc")


def find_riscv_gcc() -> Compiler | None:
    """The bare-metal RISC-V compiler ``riscv64-unknown-elf-gcc``, or None (Debian has it)."""
    return _on_path("c", "riscv64-unknown-elf-gcc", "gcc")


def find_qemu(machine: str) -> Path | None:
    """The QEMU program for a machine, or None.

    Args:
        machine: What follows ``qemu-``: ``"system-arm"``, ``"system-riscv32"``, ``"x86_64"`` (user mode), ...
    """
    path = shutil.which(f"qemu-{machine}")
    return None if path is None else Path(path)


def find_program(name: str) -> Path | None:
    """Any other tool (``yosys``, ``cmake``, ``make``, ``vitis_hls``) on PATH, or None."""
    path = shutil.which(name)
    return None if path is None else Path(path)


def compile(
    compiler: Compiler,
    sources: Sequence[Path | str],
    output: Path | str,
    *,
    standard: str | None = None,
    optimize: str = "2",
    shared: bool = False,
    include: Iterable[Path | str] = (),
    system_include: Iterable[Path | str] = (),
    defines: Mapping[str, str | int | None] | None = None,
    flags: Sequence[str] = (),
    link_flags: Sequence[str] = (),
    cwd: Path | str | None = None,
    timeout_s: float = COMPILE_TIMEOUT_S,
) -> Path:
    """Compile and link sources in one call.

    Args:
        compiler: From :func:`find_c`, :func:`find_cxx` or :func:`compilers`.
        sources: Files to compile.
        output: The file to write: a program, a shared library, or an object when ``flags`` holds ``-c``.
        standard: What follows ``-std=``.
        optimize: What follows ``-O``.
        shared: Build a shared library.
        include: Folders after ``-I``.
        system_include: Folders after ``-isystem``; warnings inside them stay silent.
        defines: Macros; ``None`` as a value defines the name alone.
        flags: Further flags, before the sources.
        link_flags: Flags that must follow the sources.
        cwd: Working folder of the compiler.
        timeout_s: Seconds before the compiler is stopped.

    Returns:
        ``output`` as a path.

    Raises:
        ToolchainError: The compiler failed, ran out of time, or could not be started. The message holds its
            first error lines.
    """
    output = Path(output)
    arguments = [*compiler.command, f"-O{optimize}"]
    if standard is not None:
        arguments.append(f"-std={standard}")
    if shared:
        arguments += ["-shared", "-fPIC"]
    for name, value in (defines or {}).items():
        arguments.append(f"-D{name}" if value is None else f"-D{name}={value}")
    for folder in include:
        arguments += ["-I", str(folder)]
    for folder in system_include:
        arguments += ["-isystem", str(folder)]
    arguments += [*flags, *(str(source) for source in sources), "-o", str(output), *link_flags]
    what = Path(str(sources[0])).name if sources else output.name
    run(
        arguments,
        what=f"compiling {what} with {compiler.name}",
        cwd=cwd,
        timeout_s=timeout_s,
        env=compiler.environment(),
    )
    return output


def finish(
    command: Sequence[str],
    *,
    timeout_s: float,
    cwd: Path | str | None = None,
    env: Mapping[str, str] | None = None,
    input: bytes | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """`subprocess.run` after which no child lives on: a compiler's driver that is killed alone leaves its compiler.

    Raises:
        OSError: it could not be started.
        subprocess.TimeoutExpired: it ran out of time and was stopped.
    """
    stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
    grouped = hasattr(os, "killpg")
    with subprocess.Popen(
        command, cwd=cwd, env=env, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=grouped,
    ) as process:  # fmt: skip
        try:
            output, errors = process.communicate(input, timeout=timeout_s)
        except BaseException:  # Ctrl-C included: a session of its own gets no signal from the terminal
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL) if grouped else process.kill()
            process.wait()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def run(
    arguments: Sequence[str | Path],
    *,
    what: str,
    cwd: Path | str | None = None,
    timeout_s: float = COMPILE_TIMEOUT_S,
    env: Mapping[str, str] | None = None,
    input: bytes | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a tool to its end and turn every way it can fail into one sentence.

    Args:
        arguments: The argument list.
        what: What it does, for messages: "compiling top.cpp with gcc".
        cwd: Working folder.
        timeout_s: Seconds before it is stopped.
        env: Its whole environment; this process's by default.
        input: Bytes for its standard input.

    Raises:
        ToolchainError: It could not be started, exited with a status other than 0, or ran out of time.
    """
    command = [str(argument) for argument in arguments]
    try:
        done = finish(command, cwd=cwd, env=env, input=input, timeout_s=timeout_s)
    except subprocess.TimeoutExpired:
        raise ToolchainError(
            f"{_sentence(what)} took longer than {timeout_s:g} s and was stopped; "
            "a smaller network or a higher reuse factor compiles faster."
        ) from None
    except OSError as error:
        raise ToolchainError(f"{_sentence(what)} failed: {command[0]} could not be started ({error}).") from error
    if done.returncode != 0:
        ending = f"exit status {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
        lines = first_errors((done.stderr + done.stdout).decode("utf-8", "replace"))
        raise ToolchainError(f"{_sentence(what)} failed with {ending}: {lines or 'it printed nothing'}")
    return done


def _sentence(what: str) -> str:
    return what[:1].upper() + what[1:]


def first_errors(output: str, limit: int = 3) -> str:
    """The first lines of a compiler's output that say what is wrong, on one line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() or "undefined" in line.lower()]
    return " | ".join((telling or lines)[:limit])


def prepare_zig() -> float | None:
    """Let Zig build its C and C++ runtime into its cache, if it is the compiler that would be used.

    The first C++ program costs about a minute, every later one two seconds; installers call this so that the
    minute is theirs.

    Returns:
        Seconds it took, or None where another compiler is used.
    """
    try:
        compiler = find_cxx()
    except ToolchainError:
        return None
    if compiler.name != "zig":
        return None
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "first.cpp")
        source.write_text("#include <iostream>\nint main() { std::cout << 1 << std::endl; return 0; }\n")
        compile(compiler, [source], Path(folder, "first"), standard="c++20")
        compile(compiler, [source], Path(folder, "first.so"), standard="c++20", shared=True)
    return time.monotonic() - started
