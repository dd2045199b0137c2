"""Preparing a trained module for export: a copy in eval mode with integer codes and format texts frozen."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from edgemat.codes import BLOCK_ELEMENTS, Codes
from edgemat.errors import FormatError, LoweringError
from edgemat.nn.activation import QuantConstant
from edgemat.nn.conversion import name_modules
from edgemat.nn.embedding import QuantEmbedding
from edgemat.nn.layer import QuantLayer
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.ternary import TernaryLinear

DEFERRING = (TernaryLinear, QuantEmbedding)
"""Layers whose freezing leaves the weight as it is, so that a prepared copy may share it."""


def prepare_export(module: nn.Module, defer: bool = False) -> nn.Module:
    """A deep copy of `module`, in eval mode, whose forward can be exported to symbolic ``edgemat::*`` nodes.

    Args:
        module: The result of `edgemat.quantize`, or a module built from edgemat.nn layers.
        defer: Whether trits and embeddings stay the float parameters of `module`, which are not copied: layers hold
            small stand-ins for their codes, and `deferred_codes` makes them when they are written.

    Raises:
        FormatError: if a quantiser is not calibrated, or a parameter is not finite.
        LoweringError: if the module holds no layer of edgemat.
    """
    shared = {id(part.weight): part.weight for part in module.modules() if defer and isinstance(part, DEFERRING)}
    made = copy.deepcopy(module, dict(shared)).eval()
    name_modules(made)
    parts = [part for part in made.modules() if isinstance(part, QuantLayer | FixedQuantizer)]
    for part in parts:
        if isinstance(part, QuantLayer):
            part.defers = defer
    if not parts:
        raise LoweringError(
            f"{type(module).__name__} holds no layer of edgemat.nn, expected a quantised module; call edgemat.quantize "
            "first"
        )
    for name, tensor in made.state_dict().items():
        if tensor.is_floating_point() and not all(
            bool(part.isfinite().all()) for part in tensor.flatten().split(BLOCK_ELEMENTS)
        ):
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


def deferred_codes(prepared: nn.Module) -> dict[str, Codes]:
    """The codes that a prepared module left to be made, by the name of the buffer that stands for them."""
    found = {}
    for name, part in prepared.named_modules():
        if isinstance(part, QuantLayer):
            found.update({f"{name}.{key}" if name else key: codes for key, codes in part.deferred.items()})
    return found


def _tensor(root: nn.Module, target: str) -> Tensor:
    owner, _, name = target.rpartition(".")
    found = getattr(root.get_submodule(owner), name)
    assert isinstance(found, torch.Tensor)
    return found
