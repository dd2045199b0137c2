"""`CostTarget`: a cost of at most N, kept by a multiplier that grows while the cost is above and fades below.

Minimise the loss subject to ``cost <= N``. The Lagrangian's multiplier is found by ascent on the dual while the network
trains; the ascent is multiplicative, ``m <- m * (cost / N)**rate``, so that its speed does not depend on the scale of
loss or cost, and the multiplier stays positive. The penalty weighs ``m * (cost / N)**2``: the proportional part of the
controller, which keeps the ascent from swinging.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from edgemat.errors import FormatError
from edgemat.nn import arguments
from edgemat.nn.cost.models import check_model
from edgemat.nn.cost.models import cost as cost_of

_LIMITS = (1e-6, 1e4)
_RATIO = 4.0
_GAIN = 2


class CostTarget:
    """Keeps the cost of a network at most N while it trains.

    Add `penalty()` to the loss after the forward, and call `update()` after the optimiser's step.

    Attributes:
        multiplier: The present multiplier of ``cost / N``, in units of the loss.

    Args:
        q: The network; something in it must learn its width.
        cost: Name of the cost model (`edgemat.cost`).
        at_most: N, above 0, in the model's unit: EBOPs, tables, bytes.
        rate: Exponent of the ascent per step. The multiplier grows by ``2**rate`` where the cost is 2 N.
        start: First multiplier.
        margin: Part of N that is kept free, because the cost of single steps wavers; a learning rate that decays
            steadies the end.

    Raises:
        FormatError: for a setting out of range or of another type (`penalty` refuses a network in which no width is
            learned).
    """

    def __init__(
        self,
        q: nn.Module,
        cost: str = "ebops",
        at_most: float = 1000.0,
        rate: float = 0.03,
        start: float = 1e-3,
        margin: float = 0.05,
    ):
        self.q, self.model = arguments.module("CostTarget", q), check_model(cost)
        self.at_most = arguments.number("CostTarget: at_most", at_most, above=0)
        self.rate = arguments.number("CostTarget: rate", rate, above=0)
        self.margin = arguments.number("CostTarget: margin", margin, least=0, below=1)
        self.multiplier = min(max(arguments.number("CostTarget: start", start, above=0), _LIMITS[0]), _LIMITS[1])
        self.latest: float | None = None

    def penalty(self) -> Tensor:
        """``multiplier * (cost / N)**2 * cost / N``, the square without a gradient; float32, no dimensions.

        Add it to the loss. Both ratios are taken to N without its margin, and the square within 1/16 and 16.

        Raises:
            FormatError: if the cost has no gradient, because nothing in the network learns its width.
        """
        found = cost_of(self.q, self.model)
        if torch.is_grad_enabled() and not found.requires_grad:
            raise FormatError(
                f"CostTarget: the {self.model} of {type(self.q).__name__} cannot change, expected learned widths; "
                "quantise with learn_widths='all' in the recipe"
            )
        self.latest = found.item()
        return torch.mul(found, self.multiplier * self._ratio() ** _GAIN / self.at_most)

    def _ratio(self) -> float:
        """The latest cost in units of N without its margin, within bounds."""
        assert self.latest is not None
        return min(max(self.latest / (self.at_most * (1.0 - self.margin)), 1.0 / _RATIO), _RATIO)

    def update(self) -> None:
        """One step of the ascent, after the optimiser's step; uses the cost that `penalty` saw."""
        if self.latest is None:
            raise FormatError("CostTarget: update() came before the first penalty(), expected it after the step")
        self.multiplier = min(max(self.multiplier * self._ratio() ** self.rate, _LIMITS[0]), _LIMITS[1])

    @torch.no_grad()
    def met(self) -> bool:
        """Whether the network as it is now costs at most N."""
        return self.present() <= self.at_most

    @torch.no_grad()
    def present(self) -> float:
        """The cost of the network as it is deployed now."""
        was = self.q.training
        self.q.eval()
        try:
            return float(cost_of(self.q, self.model).item())
        finally:
            self.q.train(was)

    def report(self) -> str:
        """One sentence: what the network costs, and whether that is at most N."""
        found = self.present()
        if found <= self.at_most:
            return f"{self.model} {found:,.0f}, at most {self.at_most:,.0f} asked for: met"
        if self.multiplier >= _LIMITS[1] * (1.0 - 1e-9):
            reason = "the multiplier is at its limit; what is left cannot be learned away: prune the network's shape"
        else:
            reason = f"the multiplier is {self.multiplier:.3g} and still growing: train longer or raise rate"
        return f"{self.model} {found:,.0f}, at most {self.at_most:,.0f} asked for: not met, and {reason}"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs."""
        latest = math.nan if self.latest is None else self.latest
        return {"multiplier": self.multiplier, "latest": latest, "at_most": self.at_most, "model": self.model}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            FormatError: if it was taken with another cost model.
        """
        if state.get("model") != self.model:
            raise FormatError(
                f"CostTarget: the checkpoint limits {state.get('model')!r}, expected {self.model!r}; construct it with "
                "that model"
            )
        self.multiplier, self.at_most = float(state["multiplier"]), float(state["at_most"])
        self.latest = None if math.isnan(state["latest"]) else float(state["latest"])
