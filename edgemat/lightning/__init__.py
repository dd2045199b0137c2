"""Lightning callbacks: training schedules, a log of every format, and exports that are verified before they are kept.

The callbacks use hooks and `state_dict` only. The user's LightningModule calls `edgemat.quantize` itself; a callback
never converts a module, replaces a method, or changes the trainer.
"""

from __future__ import annotations

from importlib.util import find_spec

from edgemat.errors import EdgematError


class MissingLightningError(EdgematError, ImportError):
    """The package ``lightning`` is not installed."""


if find_spec("lightning") is None:
    raise MissingLightningError(
        "edgemat.lightning needs the package lightning, which is not installed; run pip install 'edgemat[lightning]'"
    )

from edgemat.lightning.export_callback import ExportCallback  # noqa: E402
from edgemat.lightning.format_logger import FormatLogger  # noqa: E402
from edgemat.lightning.qat_callback import QATCallback  # noqa: E402

__all__ = ["ExportCallback", "FormatLogger", "MissingLightningError", "QATCallback"]
