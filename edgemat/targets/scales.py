"""Real scales of ports: what generated code says a code is worth where the file states a float32 for it."""

from __future__ import annotations

from typing import Any

import numpy as np


def scale_literal(graph: Any, name: str) -> str:
    """The real scale of a float input or output of a graph as a constant of C, or an empty text.

    Nine digits give the float32 back; hexadecimal constants are no part of C++14.
    """
    scale: np.float32 | None = graph.scale(name) if hasattr(graph, "scale") else None
    if scale is None:
        return ""
    text = f"{float(scale):.9g}"
    return f"{text}F" if "." in text or "e" in text else f"{text}.0F"
