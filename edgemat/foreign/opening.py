"""A path to a lowered file or to a foreign one: one place that tells them apart, and imports on the way."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from edgemat.errors import LoweringError
from edgemat.lower.writer import VERSION_KEY

if TYPE_CHECKING:
    from edgemat.foreign.report import ImportReport
    from edgemat.lower.graph import Graph

# ModelProto's fields (onnx.proto, message ModelProto) and their wire types: 0 varint, 2 length-delimited.
_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
_GRAPH, _METADATA = 7, 14
_KEY = b"\x0a" + bytes([len(VERSION_KEY)]) + VERSION_KEY.encode()  # StringStringEntryProto.key
_MAX_FIELDS = 1 << 16


@dataclass(frozen=True)
class Opened:
    """What a path stands for.

    Attributes:
        model: The path itself where it is no foreign file, else the lowered graph made of it.
        report: What the import did; None where nothing was imported.
    """

    model: Path | Graph
    report: ImportReport | None = None


def open_model(
    path: str | os.PathLike[str], *, inputs: Mapping[str, str] | None = None, strict: bool = False
) -> Opened:
    """Imports a foreign file in memory; leaves every other path to its reader.

    Args:
        path: A lowered file, a foreign ONNX file, or anything else.
        inputs: Formats of float inputs, as `edgemat.import_onnx` takes them.
        strict: As `edgemat.import_onnx` takes it.

    Raises:
        ImportRefused: if a node of a foreign file has no exact integer form.
        LoweringError: if a foreign file cannot be read, or `inputs` or `strict` are given for a lowered file.
    """
    path = Path(path)
    if not is_foreign(path):
        if inputs or strict:
            raise LoweringError(f"{path} is not a foreign ONNX file, so input formats and strict do not apply to it")
        return Opened(path)
    import onnx_ir as ir

    from edgemat.foreign.importing import imported
    from edgemat.foreign.source import load
    from edgemat.lower.reader import read_bytes

    model, report = imported(load(path), inputs or {}, strict, path.stem)
    return Opened(read_bytes(ir.serde.serialize_model(model).SerializeToString(), str(path)), report)


def is_foreign(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an ONNX model that edgemat did not lower; damaged files and other kinds are not.

    Looks at the outermost fields of the file and skips what they hold, so that large files are not read.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            return _foreign(file, size)
    except OSError:
        return False


def _foreign(file: BinaryIO, size: int) -> bool:
    graph = False
    for _ in range(_MAX_FIELDS):
        if file.tell() == size:
            return graph
        tag = _varint(file)
        if tag is None or _FIELDS.get(tag >> 3) != tag & 7:
            return False
        length = _varint(file)
        if length is None:
            return False
        if tag & 7 == 0:
            continue
        start = file.tell()
        if length > size - start:
            return False
        if tag >> 3 == _METADATA and file.read(len(_KEY)) == _KEY:
            return False
        graph = graph or tag >> 3 == _GRAPH
        file.seek(start + length)
    return False


def _varint(file: BinaryIO) -> int | None:
    """An unsigned LEB128 number of at most 64 bits, or None."""
    number = 0
    for place in range(10):
        byte = file.read(1)
        if not byte:
            return None
        number |= (byte[0] & 0x7F) << (7 * place)
        if byte[0] < 0x80:
            return number
    return None
