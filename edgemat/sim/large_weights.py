"""Weights of the simulator's own graph that are too large to travel through it: packed into a temporary file.

onnxruntime maps the file when the session opens; a table is then read where it is touched, a matrix is copied once
into the kernel's own order. The file is gone as soon as the session stands: its name, not what is mapped.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgemat.errors import LoweringError

NAME = "weights.data"
ALIGNMENT = 4096


class LargeWeights:
    """A temporary file of weights.

    Raises:
        LoweringError: if the temporary folder cannot be written.
    """

    def __init__(self) -> None:
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="edgemat-"))
            self._file = (self.folder / NAME).open("wb")
        except OSError as error:
            raise _full(error) from error

    def initializer(self, blocks: Iterable[np.ndarray], shape: tuple[int, ...], dtype: np.dtype, name: str) -> ir.Value:
        """Appends blocks of rows; the value is an initializer for the graph.

        Args:
            blocks: Arrays of `dtype`, one after the other.
            shape: Of all blocks together.
            dtype: Of every block.
            name: Of the value.
        """
        try:
            begin = self._file.tell()
            for block in blocks:
                self._file.write(np.ascontiguousarray(block, dtype).tobytes())
            length = self._file.tell() - begin
            self._file.write(bytes(-length % ALIGNMENT))
            self._file.flush()
        except OSError as error:
            raise _full(error) from error
        kind = ir.DataType.from_numpy(dtype)
        tensor = ir.ExternalTensor(
            NAME, begin, length, kind, shape=ir.Shape(shape), name=name, base_dir=str(self.folder)
        )
        value = ir.Value(name=name, const_value=tensor)
        value.dtype, value.shape = kind, ir.Shape(shape)
        return value

    def remove(self) -> None:
        """Removes the file."""
        self._file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _full(error: OSError) -> LoweringError:
    return LoweringError(
        f"the temporary folder {tempfile.gettempdir()} cannot be written ({error.strerror or error}); make room there, "
        "or name another one in TMPDIR"
    )
