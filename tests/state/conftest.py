"""Exported cells, once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from tests.state.cells import CELLS, exported


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, Path]]:
    """Module and lowered file of every cell by class name."""
    folder = tmp_path_factory.mktemp("cells")
    return {cell.__name__: exported(cell, folder) for cell in CELLS}
