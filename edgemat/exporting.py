"""The verb `export`: a lowered file to a target's project, or to a file for other tools."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from edgemat.errors import UnsupportedOpError
from edgemat.lower.graph import Graph
from edgemat.lower.reader import read

TARGETS = ("hls", "mcu")
"""Targets that are a project, a folder of sources."""
FILES = ("qonnx",)
"""Targets that are one file."""


def export(
    path: str | os.PathLike[str] | Graph,
    target: str,
    output: str | os.PathLike[str],
    **options: Any,
) -> Path:
    """Writes a target's project or file; nothing is left under `output` if anything fails.

    Args:
        path: A lowered file.
        target: ``hls`` (C++ for Vitis HLS), ``mcu`` (a C99 library) or ``qonnx`` (a QONNX file: `edgemat.to_qonnx`).
        output: Folder to write, for ``qonnx`` a file; an earlier export there is replaced.
        **options: For ``hls``: io ("parallel" or "stream"), reuse, plan (a TOML file), clock_ns, part, ports. For both:
            products ("shift_add" or "compiler"), how weights of few signed powers of two multiply. For ``mcu``:
            ternary_packing ("auto", "2" or "1.6"), the bits a ternary weight takes in flash. For ``qonnx``: batch, the
            samples of one run.

    Returns:
        The folder, or the file.

    Raises:
        LoweringError: if the file is not a lowered file.
        UnsupportedOpError: if a node has no form on the target, or the target is unknown.
    """
    if target not in (*TARGETS, *FILES):
        raise UnsupportedOpError(f"target is {target!r}, expected one of {', '.join((*TARGETS, *FILES))}")
    if target == "qonnx":
        unknown = [key for key in options if key != "batch"]
        if unknown:
            raise UnsupportedOpError(f"option {unknown[0]!r} is unknown to the target qonnx, which takes batch")
        from edgemat.foreign.qonnx_writer import to_qonnx

        return to_qonnx(path, output, **options)
    graph = path if isinstance(path, Graph) else read(path)
    if target == "mcu":
        unknown = [key for key in options if key not in ("products", "ternary_packing")]
        if unknown:
            raise UnsupportedOpError(
                f"option {unknown[0]!r} is unknown to the target mcu, which takes products and ternary_packing"
            )
        from edgemat.targets import mcu

        return Path(mcu.export(graph, Path(output), **options))
    from edgemat.targets import hls

    return Path(hls.export(graph, Path(output), **options))
