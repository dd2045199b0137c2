"""What a training's checkpoint says of its formats: read with torch, tensors only, nothing in it is run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgemat.errors import EdgematError
from edgemat.formats import OVERFLOWS, ROUNDINGS, Fixed
from edgemat.report.history import KIND, Series, from_dict

MAGIC = b"PK\x03\x04"
_DEPTH = 6


@dataclass(frozen=True)
class CheckpointFormat:
    """A quantiser as a checkpoint holds it.

    Attributes:
        name: The quantiser.
        format: Its format with the binary point left out, or "" where the checkpoint does not say it.
        calibrated: Whether its binary point is set.
        fracs: Fractional bits, rounded, flat int64.
    """

    name: str
    format: str
    calibrated: bool
    fracs: np.ndarray


@dataclass(frozen=True)
class Checkpoint:
    """What `read_checkpoint` returns.

    Attributes:
        formats: Every quantiser.
        weights: Real weights of the layers that quantise theirs, float32, by layer.
        history: Formats over time, where the checkpoint keeps a `FormatHistory`'s state.
        step: Optimiser steps so far, or None.
    """

    formats: tuple[CheckpointFormat, ...]
    weights: dict[str, np.ndarray]
    history: tuple[Series, ...]
    step: int | None


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one that `torch.save` wrote (a zip), and not an ONNX file.

    Raises:
        EdgematError: if it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise EdgematError(f"{path} cannot be read ({error.strerror}); give a lowered file or a checkpoint") from error


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a `state_dict`, or any checkpoint that holds one (Lightning's, a dict of your own).

    Raises:
        EdgematError: if it holds anything but tensors and plain data, or no quantiser.
    """
    import torch

    path = Path(path)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise EdgematError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}), expected tensors and plain data as "
            "torch.save(q.state_dict(), ...) writes them"
        ) from error
    states = [found for found in _mappings(data, _DEPTH) if any(str(key).endswith("frac") for key in found)]
    if not states:
        raise EdgematError(f"{path} holds no quantiser, expected the state_dict of a network edgemat.quantize made")
    state: dict[str, Any] = {str(key): value for key, value in states[0].items()}
    formats, weights = [], {}
    for key, value in state.items():
        prefix = key.removesuffix("frac")
        if not key.endswith("frac") or f"{prefix}calibrated" not in state:
            continue
        kept = state.get(f"{prefix}_extra_state")
        name = prefix.rstrip(".") or "quantiser"
        fracs = np.rint(value.detach().float().numpy()).astype(np.int64).reshape(-1)
        formats.append(CheckpointFormat(name, _text(kept), bool(state[f"{prefix}calibrated"]), fracs))
        layer = prefix.removesuffix("weight_quantizer.")
        weight = state.get(f"{layer}weight")
        if layer != prefix and weight is not None and weight.numel():
            weights[layer.rstrip(".") or "layer"] = weight.detach().float().numpy()
    histories = [from_dict(dict(m)) for m in _mappings(data, _DEPTH) if m.get("kind") == KIND]
    step = data.get("global_step") if isinstance(data, Mapping) else None
    return Checkpoint(
        tuple(formats), weights, tuple(histories[0]) if histories else (), step if isinstance(step, int) else None
    )


def _mappings(data: Any, depth: int) -> Iterator[Mapping[Any, Any]]:
    """All mappings in nested plain data, outer ones first."""
    if depth and isinstance(data, Mapping):
        yield data
        for value in data.values():
            yield from _mappings(value, depth - 1)


def _text(kept: Any) -> str:
    """The format an extra state means: width, signedness, rounding and overflow."""
    try:
        width, signed, rounding, overflow = (int(v) for v in kept.tolist()[:4])
        return str(Fixed(width, None, bool(signed), ROUNDINGS[rounding], OVERFLOWS[overflow]))
    except (AttributeError, ValueError, IndexError, EdgematError):
        return ""
