"""`ScaleDeployment`: a training begins with free scales of ternary weights and ends with those that are deployed."""

from __future__ import annotations

from typing import Any

from torch import nn

from edgemat.errors import FormatError
from edgemat.nn.ternary_quantizer import TernaryQuantizer


class ScaleDeployment:
    """Moves the scales of ternary weights from floats to powers of two or fixed multipliers while a network trains.

    For `start` steps of the optimiser the scale in training mode is the free one, ``mean|W|``. Over the next `steps` it
    moves to the deployed one in the logarithm: ``free**(1 - t) * deployed**t`` with t growing evenly from 0 to 1. From
    then on training computes what is exported. With `hold` the deployed scale of that moment stays; trits go on
    following the weights. Eval mode computes the deployed numbers at any time.

    Call `step()` after each step of the optimiser.

    Attributes:
        steps_done: Steps taken.

    Args:
        q: A module with ternary weights.
        start: Optimiser steps with free scales.
        steps: Optimiser steps over which scales move; 0 for a change at once.
        scale: What to deploy where a layer says ``"free"``: ``"power_of_two"`` or ``"fixed<W>"``; None where none does.
        hold: Whether deployed scales stay from then on.

    Raises:
        FormatError: for a negative number of steps, a module without ternary weights, or a free scale that `scale` does
            not say how to deploy.
    """

    def __init__(self, q: nn.Module, start: int, steps: int = 0, scale: str | None = None, hold: bool = True):
        for name, value in (("start", start), ("steps", steps)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise FormatError(f"ScaleDeployment: {name} is {value!r}, expected a whole number of at least 0")
        if scale == "free":
            raise FormatError("ScaleDeployment: scale is 'free', expected 'power_of_two' or 'fixed<W>'")
        self._quantizers = {name: part for name, part in q.named_modules() if isinstance(part, TernaryQuantizer)}
        if not self._quantizers:
            raise FormatError(
                f"ScaleDeployment: {type(q).__name__} holds no ternary weights, expected some; quantise with "
                "weights='ternary' in the recipe or use edgemat.nn.TernaryLinear"
            )
        for name, part in self._quantizers.items():
            if part.free and scale is None:
                raise FormatError(
                    f"ScaleDeployment: {name!r} has a free scale, expected to be told what to deploy; give "
                    "scale='power_of_two' or 'fixed<8>'"
                )
            if part.free:
                assert scale is not None
                part.deploy(scale)
        self.start, self.steps, self.hold, self.steps_done = start, steps, hold, 0
        self._apply()

    def step(self) -> None:
        """Counts one step of the optimiser and moves the scales on."""
        self.steps_done += 1
        self._apply()

    @property
    def blend(self) -> float:
        """How far the scales have come: 0 for free, 1 for deployed."""
        if self.steps_done >= self.start + self.steps:
            return 1.0
        return max(0.0, (self.steps_done - self.start) / self.steps) if self.steps else 0.0

    @property
    def finished(self) -> bool:
        """Whether training computes with the scales that are exported."""
        return self.blend >= 1.0

    def _apply(self) -> None:
        blend = self.blend
        for part in self._quantizers.values():
            part.blend = blend
            if blend >= 1.0 and self.hold and self.steps_done and not part._held:
                part.hold()

    def remove(self) -> None:
        """Lets training compute with deployed scales from now on, without holding them."""
        for part in self._quantizers.values():
            part.blend = 1.0

    def state_dict(self) -> dict[str, Any]:
        """The number of steps taken and the schedule; what is held is part of the module's state."""
        return {"steps_done": self.steps_done, "start": self.start, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken; the schedule must be the one it was taken with.

        Raises:
            FormatError: for a state of another schedule.
        """
        for name in ("start", "steps"):
            if state.get(name) != getattr(self, name):
                raise FormatError(
                    f"ScaleDeployment: the state has {name} {state.get(name)!r}, expected {getattr(self, name)}; "
                    "resume with the schedule the training began with"
                )
        self.steps_done = int(state["steps_done"])
        self._apply()
