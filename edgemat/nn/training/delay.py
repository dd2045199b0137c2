"""`QuantizationDelay`: a training begins with real numbers, and the quantisers join it one after the other.

Warm-up could also blend, ``x + c * (Q(x) - x)`` with c growing to 1. It staggers instead: each quantiser is either off
or exactly what will be deployed, so no step trains a network that is neither; binary points get their true gradients
from their first step on; a quantiser that is on runs the fused passes, while a blend never does; and the layers behind
one that just joined adapt to it while they are still real. The order is the forward pass's, from the input on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgemat.errors import FormatError
from edgemat.nn.bipolar import BipolarQuantizer
from edgemat.nn.calibration import METHODS, Statistics
from edgemat.nn.emission import exporting
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.training.reference import real
from edgemat.nn.training.traversal import quantizers_in_order
from edgemat.nn.weight_points import fit_weights


class RealPass:
    """A forward hook of a quantiser: while it is delayed, training gets the real values.

    A hook works for every kind of quantiser and is gone when the delay is over, so the quantiser's own path does not
    know of it. The rounded result is dropped, so that nothing flows to the binary point.

    Attributes:
        statistics: What the last real batches are noted in, or None.
    """

    def __init__(self) -> None:
        self.statistics: Statistics | None = None

    def __call__(self, quantizer: FixedQuantizer, inputs: tuple[Tensor, ...], rounded: Tensor) -> Tensor | None:
        """The real values, or None to keep the rounded ones."""
        if not (quantizer.delayed and quantizer.training) or exporting() or isinstance(quantizer, BipolarQuantizer):
            return None  # a bipolar quantiser passes a clipped value by itself
        x = real(quantizer, inputs[0])
        if self.statistics is not None:
            self.statistics.update(x)
        return x.to(rounded.dtype)


class QuantizationDelay:
    """Keeps quantisers off at the beginning of a training; eval mode is exact at any time.

    For the first `delay_steps` steps every chosen quantiser lets real values pass in training mode. Over the next
    `warmup_steps` they join, quantiser ``i`` of ``n`` (in the order of the forward pass) at step
    ``delay_steps + i * warmup_steps // n``; without warm-up all join at once. Delayed quantisation is the
    ``quant_delay`` of Jacob et al. (arXiv 1712.05877, section 3.1: activations quantised only after the network has
    settled); the order from the input on is that of progressive quantisation.

    Call `step()` after each step of the optimiser. Ranges move while a network trains on real numbers, so learned
    binary points are set anew by `recalibrate` from what the last real step saw. Under `torch.nn.parallel` each
    process sees its own batches: unite what `observed` gives before `step()`, or calibrate and give
    ``recalibrate=None``.

    Args:
        q: The result of `edgemat.quantize`, or a module built from edgemat.nn layers.
        delay_steps: Optimiser steps with real numbers.
        warmup_steps: Optimiser steps over which the quantisers join.
        weights: Whether quantisers of weights are delayed.
        activations: Whether quantisers of inputs and layer outputs are delayed.
        recalibrate: ``"mse"``, ``"minmax"``, ``"percentile"`` (of 99.99), or None to keep the binary points.

    Raises:
        FormatError: for a negative number of steps, an unknown method, or a module without quantisers.
    """

    def __init__(
        self,
        q: nn.Module,
        delay_steps: int,
        warmup_steps: int = 0,
        weights: bool = True,
        activations: bool = True,
        recalibrate: str | None = "mse",
    ):
        for name, value in (("delay_steps", delay_steps), ("warmup_steps", warmup_steps)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise FormatError(f"QuantizationDelay: {name} is {value!r}, expected a whole number of at least 0")
        if recalibrate is not None and recalibrate not in METHODS:
            raise FormatError(
                f"QuantizationDelay: recalibrate is {recalibrate!r}, expected None or one of {', '.join(METHODS)}"
            )
        self.delay_steps, self.warmup_steps, self.recalibrate = delay_steps, warmup_steps, recalibrate
        self.steps = 0
        chosen = [
            (name, part)
            for name, part in quantizers_in_order(q)
            if (weights if part.role == "weights" else activations)
        ]
        self._starts = {name: delay_steps + i * warmup_steps // len(chosen) for i, (name, _) in enumerate(chosen)}
        self._quantizers = dict(chosen)
        self._owners = {
            id(part.weight_quantizer): part
            for part in q.modules()
            if getattr(part, "weight_quantizer", None) is not None
        }
        self._hooks: dict[str, tuple[RealPass, Any]] = {}
        self._apply()

    def step(self) -> None:
        """Counts one step of the optimiser and lets quantisers join whose turn it is."""
        self.steps += 1
        self._apply()

    @property
    def finished(self) -> bool:
        """Whether every quantiser has joined."""
        return not self._hooks

    @property
    def delayed(self) -> tuple[str, ...]:
        """Names of the quantisers that have not joined yet, in the order in which they will."""
        return tuple(self._hooks)

    @property
    def observed(self) -> dict[str, Statistics]:
        """What the last real step saw, by the names of the quantisers that the next `step()` lets join."""
        return {name: hook.statistics for name, (hook, _) in self._hooks.items() if hook.statistics is not None}

    def remove(self) -> None:
        """Lets every quantiser join now, with the binary point it has."""
        for name in tuple(self._hooks):
            self._join(name)

    def _apply(self) -> None:
        for name, start in self._starts.items():
            quantizer = self._quantizers[name]
            if self.steps >= start:
                if name in self._hooks:
                    self._refit(name)
                    self._join(name)
                continue
            if name not in self._hooks:
                hook = RealPass()
                self._hooks[name] = hook, quantizer.register_forward_hook(hook)
                quantizer.delayed = True
            noted = self.recalibrate is not None and self.steps == start - 1 and quantizer.role != "weights"
            self._hooks[name][0].statistics = Statistics(channels=quantizer.per_channel) if noted else None

    def _join(self, name: str) -> None:
        self._hooks.pop(name)[1].remove()
        self._quantizers[name].delayed = False

    @torch.no_grad()
    def _refit(self, name: str) -> None:
        """Sets a learned binary point by what the last real step saw, or by the present weights."""
        quantizer, seen = self._quantizers[name], self._hooks[name][0].statistics
        if quantizer.stated or self.recalibrate is None:
            return
        if quantizer.role == "weights":
            owner = self._owners.get(id(quantizer))
            if owner is not None and not getattr(owner, "target", ""):
                fit_weights(owner, self.recalibrate)
        elif seen is not None and seen.low <= seen.high:
            seen.settle(quantizer, self.recalibrate, 99.99)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps taken and the schedule."""
        return {"steps": self.steps, "delay_steps": self.delay_steps, "warmup_steps": self.warmup_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken; the schedule must be the one it was taken with.

        Raises:
            FormatError: for a state of another schedule.
        """
        for name in ("delay_steps", "warmup_steps"):
            if state.get(name) != getattr(self, name):
                raise FormatError(
                    f"QuantizationDelay: the state has {name} {state.get(name)!r}, expected {getattr(self, name)}; "
                    "resume with the schedule the training began with"
                )
        self.steps = int(state["steps"])
        # Binary points came with the module's own state: nothing is set anew here.
        for name, start in self._starts.items():
            if name in self._hooks and self.steps >= start:
                self._join(name)
        self._apply()
