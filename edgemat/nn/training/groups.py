"""Optimiser groups: weights, vectors (biases, norms, slopes) and format parameters want different settings."""

from __future__ import annotations

from typing import Any

from torch import nn

from edgemat.errors import FormatError
from edgemat.nn import arguments
from edgemat.nn.activation import QuantConstant
from edgemat.nn.quantizer import FixedQuantizer


def parameter_groups(
    q: nn.Module,
    lr: float,
    format_lr: float | None = None,
    weight_decay: float = 0.0,
    **options: Any,
) -> list[dict[str, Any]]:
    """The trainable parameters of a quantised module as groups for any torch optimiser.

    Three groups, named by the key ``"name"``; empty ones are left out, and each parameter is in exactly one:

    * ``"weights"``: matrices and kernels, with `lr` and `weight_decay`;
    * ``"vectors"``: biases, batch norm parameters, slopes and learned constants, with `lr`, never decayed;
    * ``"formats"``: everything quantisers learn (binary points, widths), with `format_lr`, never decayed. Decay pulls
      to 0, which means nothing for a binary point. They move by whole bits, and a bit doubles the grid: with Adam, a
      step is at most about `format_lr` bits.

    Args:
        q: The result of `edgemat.quantize`, or any module that holds layers of edgemat.nn.
        lr: Learning rate of weights and vectors.
        format_lr: Learning rate of the format parameters; None takes `lr`.
        weight_decay: Decay of the weights.
        options: Further keys that each group gets, such as ``momentum=0.9``.

    Returns:
        A list of dicts, as ``torch.optim.AdamW(edgemat.parameter_groups(q, lr=1e-3))`` takes it.

    Raises:
        FormatError: for a setting that is negative or no finite number, or a module without trainable parameters.
    """
    for name, value in (("lr", lr), ("format_lr", format_lr), ("weight_decay", weight_decay)):
        if value is not None or name != "format_lr":
            arguments.number(f"parameter_groups: {name}", value, least=0)
    arguments.module("parameter_groups", q)
    formats = {id(p) for part in q.modules() if isinstance(part, FixedQuantizer) for p in part.parameters()}
    constants = {part.target for part in q.modules() if isinstance(part, QuantConstant) and part.target}
    members: dict[str, list[nn.Parameter]] = {"weights": [], "vectors": [], "formats": []}
    for name, parameter in q.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in formats:
            members["formats"].append(parameter)
        elif parameter.dim() > 1 and name not in constants:
            members["weights"].append(parameter)
        else:
            members["vectors"].append(parameter)
    if not any(members.values()):
        raise FormatError(
            f"parameter_groups: {type(q).__name__} has no trainable parameter, expected at least one; does every "
            "parameter have requires_grad=False?"
        )
    settings = {
        "weights": {"lr": lr, "weight_decay": weight_decay},
        "vectors": {"lr": lr, "weight_decay": 0.0},
        "formats": {"lr": lr if format_lr is None else format_lr, "weight_decay": 0.0},
    }
    return [
        {"name": name, "params": parameters, **settings[name], **options}
        for name, parameters in members.items()
        if parameters
    ]
