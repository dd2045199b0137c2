"""Preparing a trained module for export: a copy in eval mode with integer codes and format texts frozen."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from edgemat.errors import FormatError, LoweringError
from edgemat.nn.activation import QuantConstant
from edgemat.nn.conversion import name_modules
from edgemat.nn.layer import QuantLayer
from edgemat.nn.quantizer import FixedQuantizer


def prepare_export(module: nn.Module) -> nn.Module:
    """A deep copy of `module`, in eval mode, whose forward can be exported to symbolic ``edgemat::*`` nodes.

    Args:
        module: The result of `edgemat.quantize`, or a module built from edgemat.nn layers.

    Raises:
        FormatError: if a quantiser is not calibrated, or a parameter is not finite.
        LoweringError: if the module holds no layer of edgemat.
    """
    made = copy.deepcopy(module).eval()
    name_modules(made)
    parts = [part for part in made.modules() if isinstance(part, QuantLayer | FixedQuantizer)]
    if not parts:
        raise LoweringError(
            f"{type(module).__name__} holds no layer of edgemat.nn, expected a quantised module; call edgemat.quantize "
            "first"
        )
    for name, tensor in made.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise FormatError(
                f"parameter {name!r} holds NaN or infinities, expected finite numbers; the training diverged: "
                "go back to an earlier checkpoint"
            )
    for part in parts:
        if isinstance(part, QuantConstant) and part.target:
            part.freeze_value(_tensor(made, part.target))
        elif not (isinstance(part, FixedQuantizer) and part.role == "weights"):
            part.freeze()
    return made


def _tensor(root: nn.Module, target: str) -> Tensor:
    owner, _, name = target.rpartition(".")
    found = getattr(root.get_submodule(owner), name)
    assert isinstance(found, torch.Tensor)
    return found
