"""From torch or foreign ONNX to the lowered file, and back in through a checking reader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgemat.lower.graph import Graph
from edgemat.lower.reader import read

if TYPE_CHECKING:
    from edgemat.lower.from_torch import to_onnx

__all__ = ["Graph", "read", "to_onnx"]


def __getattr__(name: str) -> Any:
    if name == "to_onnx":
        from edgemat.lower.from_torch import to_onnx

        return to_onnx
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
