"""A float checkpoint as the start of a quantised network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgemat.errors import FormatError
from edgemat.nn import arguments
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.recipe import nearest

_SHOWN = 3


def load_float(
    q: nn.Module, source: Mapping[str, Tensor] | nn.Module | str | os.PathLike[str], prefix: str = ""
) -> None:
    """Takes the parameters and batch norm statistics of a float network over into a quantised one, in place.

    All names and shapes are compared first: either everything is loaded, or nothing is. Learned binary points belong
    to the values they were set for, so they are given up: call `edgemat.calibrate` next (a first training batch sets
    them, too; `eval()` refuses until one of the two has happened). Stated ones stay.

    Args:
        q: The result of `edgemat.quantize`, or a module built from edgemat.nn layers.
        source: A float module, its `state_dict`, or the path of a file that `torch.save` wrote of one; loaded with
            ``weights_only=True``. A dict with a key ``"state_dict"`` (a Lightning checkpoint) is looked into.
        prefix: What the names start with in the source (``"model."``); other names there are then left out.

    Raises:
        FormatError: if a name is missing or unexpected (the message gives the nearest spelling), a shape differs, a
            number is not finite, or the file cannot be read; if `q` is a float network, which its own `load_state_dict`
            loads.
    """
    arguments.quantized("load_float", q)
    if not isinstance(prefix, str):
        raise FormatError(f"load_float: prefix is {prefix!r}, expected a text such as 'model.'")
    state = _state(source)
    if prefix:
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if not state:
            raise FormatError(
                f"load_float: no name of the checkpoint starts with {prefix!r}, expected the right prefix"
            )
    own = {name for name, part in q.named_modules() if isinstance(part, FixedQuantizer)}
    wanted = {name: value for name, value in q.state_dict().items() if name.rpartition(".")[0] not in own}
    _compare(wanted, state)
    with torch.no_grad():
        for name, target in wanted.items():
            target.copy_(state[name])
    for part in q.modules():
        if isinstance(part, FixedQuantizer) and not part.stated:
            part.reset()


def _state(source: Any) -> dict[str, Tensor]:
    """The name to tensor mapping of a source."""
    if isinstance(source, nn.Module):
        return dict(source.state_dict())
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        try:
            source = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise FormatError(f"load_float: there is no file {path!r}, expected a checkpoint") from None
        except Exception as error:  # unpickling a foreign file may fail in any way
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise FormatError(
                f"load_float: {path!r} cannot be read ({reason}), expected a state_dict written by torch.save"
            ) from None
    if isinstance(source, Mapping) and isinstance(source.get("state_dict"), Mapping):
        source = source["state_dict"]
    if not isinstance(source, Mapping):
        raise FormatError(f"load_float got a {type(source).__name__}, expected a state_dict, a module or a path")
    for name, value in source.items():
        if not isinstance(value, Tensor):
            raise FormatError(
                f"load_float: the entry {name!r} is a {type(value).__name__}, expected a mapping of names to tensors"
            )
    return dict(source)


def _compare(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Refuses a checkpoint of another network."""
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    complaints = []
    if missing:
        complaints.append(f"misses {_listed(missing, unexpected)}")
    if unexpected:
        complaints.append(f"has the unexpected {_listed(unexpected, missing or wanted)}")
    if complaints:
        hint = ""
        if any(name.rpartition(".")[2] in ("frac", "calibrated", "_extra_state") for name in unexpected):
            hint = "; a checkpoint of a quantised network is loaded by q.load_state_dict"
        raise FormatError(
            f"load_float: the checkpoint {' and '.join(complaints)}, expected the float network's names{hint}"
        )
    for name, target in wanted.items():
        if state[name].shape != target.shape:
            raise FormatError(
                f"load_float: {name!r} has the shape {tuple(state[name].shape)}, expected {tuple(target.shape)}"
            )
        if state[name].is_floating_point() and not bool(state[name].isfinite().all()):
            raise FormatError(f"load_float: {name!r} holds NaN or infinities, expected finite numbers")


def _listed(names: list[str], others: Any) -> str:
    shown = [f"{name!r}{_meant(name, others)}" for name in names[:_SHOWN]]
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(shown) + rest


def _meant(name: str, others: Any) -> str:
    hint = nearest(name, others).removeprefix("; did you mean ").removesuffix("?")
    return f" (nearest: {hint})" if hint else ""
