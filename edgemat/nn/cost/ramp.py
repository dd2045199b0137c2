"""`CostRamp`: a weight of the cost that grows geometrically, so that one training traces the accuracy/cost front."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgemat.errors import FormatError
from edgemat.nn import arguments
from edgemat.nn.cost.models import check_model
from edgemat.nn.cost.models import cost as cost_of


class CostRamp:
    """The penalty ``beta * cost`` with ``beta`` growing from `start` to `stop` by the same factor each step.

    HGQ's schedule (arXiv 2405.00645, section IV). Add `penalty()` to the loss after the forward, call `step()` after
    the optimiser's; a resumed training continues from `state_dict()`.

    Attributes:
        count: Steps done.

    Args:
        q: The network.
        cost: Name of the cost model (`edgemat.cost`).
        start: First weight, in units of the loss per unit of cost; above 0.
        stop: Last weight; above 0.
        steps: Number of steps, at least 1; later ones keep `stop`.

    Raises:
        FormatError: for a weight or a number of steps out of range.
    """

    def __init__(self, q: nn.Module, cost: str = "ebops", start: float = 1e-6, stop: float = 1e-3, steps: int = 1000):
        self.q, self.model = arguments.module("CostRamp", q), check_model(cost)
        self.start = arguments.number("CostRamp: start", start, above=0)
        self.stop = arguments.number("CostRamp: stop", stop, above=0)
        self.steps = arguments.whole("CostRamp: steps", steps, 1)
        self.count = 0

    @property
    def beta(self) -> float:
        """The present weight."""
        part = min(self.count, self.steps - 1) / max(self.steps - 1, 1)
        return float(self.start * (self.stop / self.start) ** part)

    def penalty(self) -> Tensor:
        """``beta * cost``, to be added to the loss; float32, no dimensions."""
        return torch.mul(cost_of(self.q, self.model), self.beta)

    def step(self) -> None:
        """One training step is done."""
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs."""
        return {"count": self.count, "start": self.start, "stop": self.stop, "steps": self.steps, "model": self.model}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken, on its ramp.

        Raises:
            FormatError: if it was taken with another cost model.
        """
        if state.get("model") != self.model:
            raise FormatError(
                f"CostRamp: the checkpoint ramps {state.get('model')!r}, expected {self.model!r}; construct it with "
                "that model"
            )
        self.count, self.steps = int(state["count"]), int(state["steps"])
        self.start, self.stop = float(state["start"]), float(state["stop"])
