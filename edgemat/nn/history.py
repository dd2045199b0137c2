"""`FormatHistory`: the learned formats of a network while it trains, for plots."""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

from torch import nn

from edgemat.errors import EdgematError
from edgemat.nn import arguments
from edgemat.nn.quantizer import FixedQuantizer

KIND, VERSION = "edgemat format history", 1
Row = list[float]


class FormatHistory:
    """Takes note of every quantiser's format at the steps it is told of.

    Args:
        q: The result of `edgemat.quantize`, or a module of edgemat.nn layers.

    Example:
        >>> history = edgemat.FormatHistory(q)
        >>> history.record(step)  # now and then in the training loop
        >>> history.save("history.json")  # then: edgemat report net.onnx --history history.json

    Raises:
        EdgematError: if the module has no quantiser.
    """

    def __init__(self, q: nn.Module):
        arguments.module("FormatHistory", q)
        self._parts = {name: part for name, part in q.named_modules() if isinstance(part, FixedQuantizer)}
        if not self._parts:
            raise EdgematError(f"{type(q).__name__} holds no quantiser of edgemat.nn, expected a quantised module")
        self.steps: list[int] = []
        self._rows: dict[str, list[Row | None]] = {name: [] for name in self._parts}

    def record(self, step: int) -> None:
        """Takes note of all formats; quantisers without a binary point yet are left out of this step.

        Args:
            step: Number of the step, a whole number of at least 0, larger than the last one's.

        Raises:
            EdgematError: if `step` is not.
        """
        step = arguments.whole("FormatHistory: step", step)
        if self.steps and step <= self.steps[-1]:
            raise EdgematError(f"FormatHistory: step {step} after step {self.steps[-1]}, expected a later one")
        self.steps.append(step)
        for name, part in self._parts.items():
            self._rows[name].append(_row(part))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists: mean fractional bits and mean width of each quantiser at each step, or None."""
        return {"kind": KIND, "version": VERSION, "steps": list(self.steps), "quantisers": dict(self._rows)}

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints; `edgemat report` finds it under any key of one."""
        return self.to_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues a history of the same network.

        Raises:
            EdgematError: if the quantisers differ.
        """
        kept = set(state.get("quantisers", ()))
        if kept != set(self._rows):
            different = sorted(kept ^ set(self._rows))[0]
            raise EdgematError(f"FormatHistory: quantiser {different!r} is in one of network and history only")
        self.steps = [int(step) for step in state["steps"]]
        self._rows = {name: list(state["quantisers"][name]) for name in self._rows}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, under a temporary name first.

        Raises:
            EdgematError: if it cannot be written.
        """
        target = arguments.place("FormatHistory: path", path)
        try:
            handle, part = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(self.to_dict(), file)
            os.replace(part, target)
        except OSError as error:
            raise EdgematError(f"{target} cannot be written ({error.strerror}); choose another place") from error


def _row(part: FixedQuantizer) -> Row | None:
    if not part.ready:
        return None
    fmt = part.format
    widths = fmt.widths or (fmt.width,)
    return [sum(fmt.fracs) / len(fmt.fracs), sum(widths) / len(widths)]
