"""Trains each network once in a test run, however many workers and tests ask for it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from . import data, recipes


@dataclass(frozen=True)
class Trained:
    """A trained network on disk.

    Attributes:
        name: Key in ``recipes.NETWORKS``.
        onnx: The lowered file.
        module: The quantised module's ``state_dict``.
        score: What the training reached.
    """

    name: str
    onnx: Path
    module: Path
    score: recipes.Score


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """A function that gives a trained network by name, training it where no worker has.

    ``EDGEMAT_NETWORK_CACHE`` names a folder that outlives the run, for people who work on the backends: trained
    weights are taken from there, the lowered file is always written anew.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    kept = os.environ.get("EDGEMAT_NETWORK_CACHE")
    cache = Path(kept or shared / "networks")
    seen: dict[str, Trained] = {}

    def get(name: str) -> Trained:
        if name in seen:
            return seen[name]
        folder = cache / name
        base = recipes.NETWORKS[name].base
        start = get(base).onnx.parent if base else None
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            written = folder / "score.json"
            try:
                if not written.exists():
                    score = recipes.build(name, folder, start)
                else:
                    score = recipes.Score(**json.loads(written.read_text()))
                    if kept:
                        module = recipes.load_module(name, folder / "module.pt")
                        recipes.lower(module, recipes.NETWORKS[name].load(), folder)
            except data.DataMissingError as missing:
                pytest.skip(str(missing))
        seen[name] = Trained(name, folder / "net.onnx", folder / "module.pt", score)
        return seen[name]

    return get
