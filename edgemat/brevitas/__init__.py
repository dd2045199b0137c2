"""Brevitas models come in (`to_onnx`), and edgemat's learned binary points go into Brevitas layers.

`QFXWeight` and `QFXActivation` are quantisers for ``weight_quant=`` and ``act_quant=``; see
`edgemat.brevitas.quantisers`. Brevitas (``pip install edgemat[brevitas]``) is imported when one of the names is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgemat.brevitas.conversion import to_onnx
    from edgemat.brevitas.quantisers import QFXActivation, QFXWeight

_HOMES = {
    "QFXActivation": "edgemat.brevitas.quantisers",
    "QFXWeight": "edgemat.brevitas.quantisers",
    "to_onnx": "edgemat.brevitas.conversion",
}

__all__ = ["QFXActivation", "QFXWeight", "to_onnx"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'edgemat.brevitas' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value
