"""One trained network, the same bits on FPGA and microcontroller.

The public names below are imported when they are first used, so that ``import edgemat`` costs milliseconds
and reading, exporting or simulating a file never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from edgemat import nn
    from edgemat.errors import (
        EdgematError,
        FormatError,
        LoweringError,
        ParityError,
        ToolchainError,
        UnsupportedOpError,
    )
    from edgemat.exporting import export
    from edgemat.formats import Fixed
    from edgemat.lower import to_onnx
    from edgemat.nn import calibrate, quantize
    from edgemat.recipe import Recipe
    from edgemat.sim import Simulator
    from edgemat.verification.verify import verify

_HOMES = {
    "EdgematError": "edgemat.errors",
    "Fixed": "edgemat.formats",
    "FormatError": "edgemat.errors",
    "LoweringError": "edgemat.errors",
    "ParityError": "edgemat.errors",
    "Recipe": "edgemat.recipe",
    "Simulator": "edgemat.sim",
    "ToolchainError": "edgemat.errors",
    "UnsupportedOpError": "edgemat.errors",
    "calibrate": "edgemat.nn",
    "export": "edgemat.exporting",
    "quantize": "edgemat.nn",
    "to_onnx": "edgemat.lower",
    "verify": "edgemat.verification",
}

__all__ = [
    "EdgematError",
    "Fixed",
    "FormatError",
    "LoweringError",
    "ParityError",
    "Recipe",
    "Simulator",
    "ToolchainError",
    "UnsupportedOpError",
    "calibrate",
    "export",
    "nn",
    "quantize",
    "to_onnx",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "nn":
        return importlib.import_module("edgemat.nn")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'edgemat' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
