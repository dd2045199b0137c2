"""One trained network, the same bits on FPGA and microcontroller.

The public names below are imported when they are first used, so that ``import edgemat`` costs milliseconds
and reading, exporting or simulating a file never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from edgemat import brevitas, nn
    from edgemat.errors import (
        EdgematError,
        FormatError,
        LoweringError,
        ParityError,
        ToolchainError,
        UnsupportedOpError,
    )
    from edgemat.exporting import export
    from edgemat.float_onnx import float_model
    from edgemat.foreign.importing import ImportRefused, import_onnx
    from edgemat.foreign.qonnx_writer import to_qonnx
    from edgemat.formats import Fixed
    from edgemat.lower import to_onnx
    from edgemat.nn import calibrate, quantize
    from edgemat.nn.accumulator_limit import accumulator_penalty
    from edgemat.nn.cost import CostRamp, CostTarget, Front, cost, cost_table
    from edgemat.nn.history import FormatHistory
    from edgemat.nn.summary import summary
    from edgemat.nn.training import (
        DistillationLoss,
        OscillationTracker,
        QuantizationDelay,
        ScaleDeployment,
        freeze_batch_norm,
        load_float,
        ompq,
        parameter_groups,
        ptq,
    )
    from edgemat.recipe import Recipe
    from edgemat.sim import Simulator
    from edgemat.verification.against import compare
    from edgemat.verification.verify import verify

_HOMES = {
    "CostRamp": "edgemat.nn.cost",
    "CostTarget": "edgemat.nn.cost",
    "DistillationLoss": "edgemat.nn.training",
    "EdgematError": "edgemat.errors",
    "Fixed": "edgemat.formats",
    "FormatError": "edgemat.errors",
    "FormatHistory": "edgemat.nn.history",
    "Front": "edgemat.nn.cost",
    "ImportRefused": "edgemat.foreign.importing",
    "LoweringError": "edgemat.errors",
    "OscillationTracker": "edgemat.nn.training",
    "ParityError": "edgemat.errors",
    "QuantizationDelay": "edgemat.nn.training",
    "Recipe": "edgemat.recipe",
    "ScaleDeployment": "edgemat.nn.training",
    "Simulator": "edgemat.sim",
    "ToolchainError": "edgemat.errors",
    "UnsupportedOpError": "edgemat.errors",
    "accumulator_penalty": "edgemat.nn.accumulator_limit",
    "calibrate": "edgemat.nn",
    "compare": "edgemat.verification.against",
    "cost": "edgemat.nn.cost",
    "cost_table": "edgemat.nn.cost",
    "export": "edgemat.exporting",
    "float_model": "edgemat.float_onnx",
    "freeze_batch_norm": "edgemat.nn.training",
    "import_onnx": "edgemat.foreign.importing",
    "load_float": "edgemat.nn.training",
    "ompq": "edgemat.nn.training",
    "parameter_groups": "edgemat.nn.training",
    "ptq": "edgemat.nn.training",
    "quantize": "edgemat.nn",
    "summary": "edgemat.nn.summary",
    "to_onnx": "edgemat.lower",
    "to_qonnx": "edgemat.foreign.qonnx_writer",
    "verify": "edgemat.verification",
}

__all__ = [
    "CostRamp",
    "CostTarget",
    "DistillationLoss",
    "EdgematError",
    "Fixed",
    "FormatError",
    "FormatHistory",
    "Front",
    "ImportRefused",
    "LoweringError",
    "OscillationTracker",
    "ParityError",
    "QuantizationDelay",
    "Recipe",
    "ScaleDeployment",
    "Simulator",
    "ToolchainError",
    "UnsupportedOpError",
    "accumulator_penalty",
    "brevitas",
    "calibrate",
    "compare",
    "cost",
    "cost_table",
    "export",
    "float_model",
    "freeze_batch_norm",
    "import_onnx",
    "load_float",
    "nn",
    "ompq",
    "parameter_groups",
    "ptq",
    "quantize",
    "summary",
    "to_onnx",
    "to_qonnx",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in ("brevitas", "nn"):
        return importlib.import_module(f"edgemat.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'edgemat' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
