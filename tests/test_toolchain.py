"""The search for compilers, what is said when there is none, and the vendor's headers."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from edgemat.errors import ToolchainError
from edgemat.targets import apheaders, toolchain
from edgemat.targets.toolchain import Compiler, compile, compilers, find_c, find_cxx

ADD = "int add(int a, int b) { return a + b; }\n"
MAIN = '#include <stdio.h>\nint add(int, int);\nint main(void) { printf("%d\\n", add(2, 3)); return 0; }\n'


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with nothing on PATH, no ziglang, and no environment variable of ours."""
    for name in (
        "EDGEMAT_CC",
        "EDGEMAT_CXX",
        "EDGEMAT_AP_INCLUDE",
        "XILINX_HLS",
        "XILINX_VITIS",
        "XILINX_VIVADO",
    ):
        monkeypatch.delenv(name, raising=False)
    empty = tmp_path / "bin"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.setattr(toolchain, "zig_command", lambda: None)
    monkeypatch.setenv("EDGEMAT_CACHE", str(tmp_path / "cache"))
    return empty


def every_c_compiler() -> list:
    return [pytest.param(each, id=each.name) for each in compilers("c")]


def script(folder: Path, name: str, body: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize("compiler", every_c_compiler())
def test_every_compiler_builds_a_program(compiler: Compiler, tmp_path: Path) -> None:
    (tmp_path / "add.c").write_text(ADD)
    (tmp_path / "main.c").write_text(MAIN)
    sources = [tmp_path / "add.c", tmp_path / "main.c"]
    program = compile(compiler, sources, tmp_path / "program", standard="c99", flags=["-Wall", "-Wextra", "-Werror"])
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout == "5\n"


def test_a_shared_library_can_be_loaded(cc: Compiler, tmp_path: Path) -> None:
    import ctypes

    (tmp_path / "add.c").write_text("int add(int a, int b) { return a + b + EXTRA; }\n")
    library = compile(cc, [tmp_path / "add.c"], tmp_path / "add.so", shared=True, defines={"EXTRA": 10})
    assert ctypes.CDLL(str(library)).add(2, 3) == 15


def test_names_with_spaces_and_quotes_are_only_names(cc: Compiler, tmp_path: Path) -> None:
    folder = tmp_path / "a 'b' $(touch hit); \"c\""
    folder.mkdir()
    (folder / "add.c").write_text(ADD)
    assert compile(cc, [folder / "add.c"], folder / "add.o", flags=["-c"]).is_file()
    assert not list(tmp_path.rglob("hit"))


def test_no_compiler_says_what_to_install(bare: Path) -> None:
    for find, language in ((find_c, "C"), (find_cxx, r"C\+\+")):
        with pytest.raises(ToolchainError, match=rf"No {language} compiler was found; .*edgemat\[mcu\]"):
            find()
    assert compilers("c") == []
    assert toolchain.find_arm_gcc() is None
    assert toolchain.find_qemu("system-arm") is None


def test_zig_stands_in_where_there_is_no_compiler(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ziglang", reason='pip install "edgemat[mcu]"')
    monkeypatch.setattr(toolchain, "zig_command", lambda: (sys.executable, "-m", "ziglang"))
    compiler = find_cxx()
    assert compiler.name == "zig"
    assert compiler.command[:4] == (sys.executable, "-m", "ziglang", "c++")
    assert "-D__AP_FIXED_SPECIAL_H__" in compiler.ap_flags
    assert find_c().ap_flags == ()


def test_the_environment_overrides(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = script(bare, "my-clang", 'echo "someone\'s clang version 99.1 [$1]"')
    monkeypatch.setenv("EDGEMAT_CC", f"{path} --target=thing")
    compiler = find_c()
    assert compiler == Compiler(
        "c", (str(path), "--target=thing"), "clang", "someone's clang version 99.1 [--target=thing]"
    )
    assert compilers("c") == [compiler]


def test_an_override_that_does_not_run_is_an_error(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEMAT_CXX", "/nowhere/g++")
    with pytest.raises(ToolchainError, match=r"EDGEMAT_CXX names '/nowhere/g\+\+', which does not run"):
        find_cxx()


def test_a_failed_compilation_quotes_the_first_error(cc: Compiler, tmp_path: Path) -> None:
    (tmp_path / "broken.c").write_text("int main(void) { return undeclared_name; }\n")
    with pytest.raises(
        ToolchainError, match=r"Compiling broken\.c with \w+ failed with exit status 1: .*undeclared_name"
    ):
        compile(cc, [tmp_path / "broken.c"], tmp_path / "broken")


def test_a_compiler_that_hangs_is_stopped(bare: Path, tmp_path: Path) -> None:
    sleeper = Compiler("c", (sys.executable, "-c", "import time; time.sleep(60)"), "sleeper", "1")
    with pytest.raises(ToolchainError, match=r"Compiling a\.c with sleeper took longer than 0\.2 s"):
        compile(sleeper, ["a.c"], tmp_path / "a", timeout_s=0.2)


def test_a_tool_that_vanished_and_one_that_crashed(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="could not be started"):
        toolchain.run(["/nowhere/tool"], what="measuring")
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    with pytest.raises(ToolchainError, match="Measuring failed with signal 11: it printed nothing"):
        toolchain.run([sys.executable, "-c", crash], what="measuring")


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEMAT_CACHE", str(tmp_path / "mine"))
    assert toolchain.user_cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("EDGEMAT_CACHE")
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert toolchain.user_cache_dir() == tmp_path / "xdg" / "edgemat"


# ---- the vendor's headers

APACHE = "/*\n * Copyright 2011-2019 Xilinx, Inc.\n * Licensed under the Apache License, Version 2.0 (the\n */\n"
SECRET = "/* This file contains confidential and proprietary information */\n"
MEMBERS = {
    "ap_int.h": APACHE,
    "ap_fixed.h": APACHE,
    "ap_common.h": APACHE,
    "ap_float.h": "#ifndef NO_LICENCE\n#endif\n",
    "ap_shift_reg.h": APACHE,
    "ap_secret.h": APACHE + SECRET,
    "hls_stream.h": SECRET,
    "etc/ap_private.h": APACHE,
    "../escape.h": APACHE,
}


def make_wheel(path: Path, members: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(f"hls4ml/templates/vivado/ap_types/{name}", text)
        archive.writestr("hls4ml/ap_other.h", APACHE)
    return path


def test_only_the_apache_headers_are_kept(bare: Path, tmp_path: Path) -> None:
    assert apheaders.find_ap_headers() is None
    folder = apheaders.fetch_ap_headers(make_wheel(tmp_path / "w.whl", MEMBERS))
    kept = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert kept == {"NOTICE", "ap_int.h", "ap_fixed.h", "ap_common.h", "etc/ap_private.h"}
    assert apheaders.find_ap_headers() == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert apheaders.fetch_ap_headers(tmp_path / "not looked at") == folder


def test_a_wheel_without_the_licence_gives_nothing(bare: Path, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "w.whl", {**MEMBERS, "ap_int.h": "// all rights reserved\n"})
    with pytest.raises(ToolchainError, match=r"w\.whl holds no Apache-licensed ap_int\.h"):
        apheaders.fetch_ap_headers(wheel)
    assert apheaders.find_ap_headers() is None
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_wheel_and_an_incomplete_cache(bare: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.whl").write_bytes(b"not a zip file")
    with pytest.raises(ToolchainError, match="is not a wheel that can be read"):
        apheaders.fetch_ap_headers(tmp_path / "bad.whl")
    cached = apheaders.cache_folder()
    cached.mkdir(parents=True)
    (cached / "ap_int.h").write_text(APACHE)
    assert apheaders.find_ap_headers() is None
    assert apheaders.fetch_ap_headers(make_wheel(tmp_path / "w.whl", MEMBERS)) == cached
    assert (cached / "etc" / "ap_private.h").is_file()


def test_a_named_folder_comes_first(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vitis = tmp_path / "vitis" / "include"
    mine = tmp_path / "mine"
    for folder in (vitis, mine):
        folder.mkdir(parents=True)
        (folder / "ap_int.h").write_text(APACHE)
        (folder / "ap_fixed.h").write_text(APACHE)
    monkeypatch.setenv("XILINX_HLS", str(vitis.parent))
    assert apheaders.find_ap_headers() == vitis.resolve()
    monkeypatch.setenv("EDGEMAT_AP_INCLUDE", str(mine))
    assert apheaders.find_ap_headers() == mine.resolve()
    monkeypatch.setenv("EDGEMAT_AP_INCLUDE", str(tmp_path))
    with pytest.raises(ToolchainError, match=r"EDGEMAT_AP_INCLUDE names .* holds no ap_int\.h"):
        apheaders.find_ap_headers()


def test_a_downloaded_wheel_with_another_content_is_refused(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(command: list[str], **options: object) -> None:
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True)
        make_wheel(folder / "w.whl", MEMBERS)

    monkeypatch.setattr(apheaders, "run", download)
    with pytest.raises(ToolchainError, match="it is not the file edgemat was tested with"):
        apheaders.fetch_ap_headers()
    assert apheaders.find_ap_headers() is None


@pytest.mark.parametrize("compiler", [pytest.param(each, id=each.name) for each in compilers("c++")])
def test_the_headers_compile_with_every_compiler(compiler: Compiler, ap_headers: Path, tmp_path: Path) -> None:
    """Half a step rounds up under AP_RND and down under AP_TRN: 1.0625 = 17/16 lies between 1 and 1.125."""
    (tmp_path / "main.cpp").write_text(
        "#include <cstdio>\n#include <ap_fixed.h>\n"
        "int main() {\n"
        "    ap_fixed<8, 5, AP_RND, AP_SAT> up = 1.0625;\n"
        "    ap_fixed<8, 5, AP_TRN, AP_SAT> down = 1.0625;\n"
        '    std::printf("%d %d\\n", int(up.range(7, 0)), int(down.range(7, 0)));\n'
        "}\n"
    )
    program = compile(
        compiler,
        [tmp_path / "main.cpp"],
        tmp_path / "main",
        standard="c++20",
        system_include=[ap_headers],
        flags=compiler.ap_flags,
    )
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout == "9 8\n"


def test_zig_gets_a_cache_folder_where_home_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ZIG_GLOBAL_CACHE_DIR", raising=False)
    monkeypatch.setenv("EDGEMAT_CACHE", str(tmp_path))
    zig = Compiler("c", ("zig", "cc"), "zig", "1")
    monkeypatch.setattr(toolchain, "_can_cache_at_home", lambda: False)
    assert zig.environment()["ZIG_GLOBAL_CACHE_DIR"] == str(tmp_path / "zig")
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", os.fspath(tmp_path / "mine"))
    assert zig.environment()["ZIG_GLOBAL_CACHE_DIR"] == str(tmp_path / "mine")


_FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(600)
"""


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_no_child_outlives_a_tool_that_ran_out_of_time(tmp_path: Path) -> None:
    place = tmp_path / "pid"
    with pytest.raises(subprocess.TimeoutExpired):
        toolchain.finish([sys.executable, "-c", _FAMILY, str(place)], timeout_s=3)
    pid = int(place.read_text())
    for _ in range(100):
        if not _lives(pid):
            return
        time.sleep(0.05)
    raise AssertionError("the child is still there")
