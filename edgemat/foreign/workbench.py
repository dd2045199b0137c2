"""The graph under construction, as the import of foreign files uses it: `Importer` with codes and requantisations."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edgemat.formats import Fixed
from edgemat.lower.importer import Importer
from edgemat.op import code_dtype


class Workbench(Importer):
    """Typed edgemat nodes from values that are no nodes of a source graph.

    Attributes:
        constants: Folded constants of the node in hand, for handlers of `edgemat.lower.standard`.
    """

    constants: Mapping[ir.Value, np.ndarray] = {}

    def constant(self, value: ir.Value) -> np.ndarray | None:
        """Numbers of a source value that the import has folded, or that the file stores."""
        known = self.constants.get(value)
        return super().constant(value) if known is None else known

    def has(self, value: ir.Value) -> bool:
        """Whether a source value has become something."""
        return value in self._map

    def codes(self, codes: np.ndarray, fmt: Fixed, name: str) -> ir.Value:
        """An initializer of int64 codes, stored in the code type of their format."""
        return self.initializer(np.asarray(codes, np.int64), code_dtype(fmt), name)

    def plain(self, codes: np.ndarray, name: str) -> ir.Value:
        """An initializer of int64 codes without a format of their own."""
        return self.initializer(np.asarray(codes, np.int64), np.dtype(np.int64), name)

    def literal(self, codes: np.ndarray, fmt: Fixed, name: str) -> ir.Value:
        """A constant operand of Add, Mul, Concat ..."""
        return self.add("Literal", [self.codes(codes, fmt, name)], {"y_format": str(fmt)}, f"{name}_literal")

    def requantised(self, value: ir.Value, fmt: Fixed, name: str) -> ir.Value:
        """The codes in another format; the value itself where it has that format."""
        if str(self.type(value).format) == str(fmt):
            return value
        return self.add("Requantize", [value], {"requantize": str(fmt)}, name)
