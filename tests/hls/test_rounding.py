"""The template library's Requantize against the conversions of ap_fixed and of SystemC's sc_fixed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from edgemat.targets import toolchain
from edgemat.targets.apheaders import require_ap_headers
from edgemat.targets.hls.project import library

SOURCE = Path(__file__).with_name("rounding.cpp")


def build(compiler: toolchain.Compiler, folder: Path, **defines: None) -> subprocess.CompletedProcess[bytes]:
    program = toolchain.compile(
        compiler,
        [SOURCE],
        folder / "rounding",
        standard="c++14",
        optimize="0",
        include=[Path(str(library())) / "include"],
        system_include=[require_ap_headers()],
        defines=defines,
        flags=[*compiler.ap_flags, "-Wno-unknown-pragmas"],
    )
    return subprocess.run([str(program)], capture_output=True, check=False, timeout=300)


@pytest.mark.parametrize("defines", [{}, {"EDGEMAT_HARDWARE_TYPES": None}], ids=["native", "hardware types"])
def test_every_code_equals_ap_fixed(compiler, tmp_path, defines):
    done = build(compiler, tmp_path, **defines)
    assert done.returncode == 0, done.stdout.decode()
    assert int(done.stdout.split()[-4]) > 70_000


def test_another_rounding_mode_is_noticed(compiler, tmp_path):
    done = build(compiler, tmp_path, MUTATED=None)
    assert done.returncode == 1
    assert b", 0 wrong" not in done.stdout


@pytest.mark.toolchain
def test_every_code_equals_systemc(compiler, tmp_path):
    if compiler.name == "zig" or not Path("/usr/include/systemc.h").is_file():
        pytest.skip("needs g++ and SystemC: make toolchains")
    program = toolchain.compile(
        compiler,
        [SOURCE.with_name("rounding_systemc.cpp")],
        tmp_path / "rounding",
        standard="c++17",
        optimize="0",
        include=[Path(str(library())) / "include"],
        system_include=[require_ap_headers()],
        flags=["-Wno-unknown-pragmas"],
        link_flags=["-lsystemc"],
    )
    done = subprocess.run([str(program)], capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout.decode()
    assert int(done.stdout.split()[-4]) > 30_000
