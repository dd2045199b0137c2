"""What the tests of the HLS target need: a C++ compiler and the ap_* headers."""

from __future__ import annotations

import pytest

from edgemat.errors import ToolchainError
from edgemat.targets import toolchain
from edgemat.targets.apheaders import require_ap_headers


@pytest.fixture(scope="session")
def compiler() -> toolchain.Compiler:
    """The C++ compiler; skips with the reason where it or the headers are missing."""
    try:
        require_ap_headers()
        return toolchain.find_cxx()
    except ToolchainError as missing:
        pytest.skip(str(missing))
