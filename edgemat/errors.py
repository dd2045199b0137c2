"""The errors edgemat raises on purpose.

Every message is one sentence that names the node or key, what was found, what was expected, and what to do.
The command line turns an `EdgematError` into that sentence and exit code 1 (`ParityError`: 3).
"""

from __future__ import annotations


class EdgematError(Exception):
    """Base of every error edgemat raises on purpose."""


class FormatError(EdgematError, ValueError):
    """A number format is malformed, or a value does not fit it."""


class UnsupportedOpError(EdgematError):
    """An operator, or one of its variants, has no exact counterpart in edgemat or on a target."""


class LoweringError(EdgematError):
    """A model cannot be lowered, or a lowered file is not what it claims to be."""


class ToolchainError(EdgematError):
    """A compiler, an emulator or a header is missing, or failed."""


class ParityError(EdgematError):
    """Two backends computed different codes."""
