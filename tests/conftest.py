"""What every test can ask for: real data, a compiler, the vendor's headers; each skips with the remedy."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis
import pytest

from edgemat.errors import ToolchainError
from edgemat.targets import inventory
from edgemat.targets.apheaders import find_ap_headers
from edgemat.targets.toolchain import Compiler, find_c, find_cxx

ROOT = Path(__file__).resolve().parent.parent

# Two test processes share two cores with compilers: wall-clock deadlines would fail for that alone. The same
# examples every run, so that a red run can be repeated.
hypothesis.settings.register_profile("edgemat", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("edgemat")


def pytest_report_header() -> list[str]:
    """Name the tools that are missing, once, with the way to get each."""
    lines = [f"EDGEMAT_DATA: {os.environ.get('EDGEMAT_DATA') or 'unset; tests on real data sets skip'}"]
    missing: dict[str, list[str]] = {}
    for tool in inventory.tools():
        if tool.found is None:
            missing.setdefault(tool.install, []).append(tool.name)
    lines += [f"waiting for {', '.join(names)}: {install}" for install, names in missing.items()]
    return lines


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder of the source checkout."""
    return ROOT


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the real data sets."""
    folder = os.environ.get("EDGEMAT_DATA")
    if not folder:
        pytest.skip("EDGEMAT_DATA is unset: it names the folder of the real data sets")
    path = Path(folder)
    if not path.is_dir():
        pytest.skip(f"EDGEMAT_DATA names {folder}, which is no folder")
    return path


@pytest.fixture(scope="session")
def cc() -> Compiler:
    """The C compiler of this machine."""
    try:
        return find_c()
    except ToolchainError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def cxx() -> Compiler:
    """The C++ compiler of this machine."""
    try:
        return find_cxx()
    except ToolchainError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def ap_headers() -> Path:
    """The folder with the vendor's ap_int.h and ap_fixed.h."""
    folder = find_ap_headers()
    if folder is None:
        pytest.skip("the ap_* headers are not on this machine: edgemat headers")
    return folder


@pytest.fixture
def edgemat_command() -> list[str]:
    """The argument list that starts the command line in a process of its own."""
    return [sys.executable, "-m", "edgemat"]
