"""`OscillationTracker`: finds weights that jump between two grid values, and stops them.

The straight-through gradient pushes a weight over a rounding threshold, the loss pushes it back, and so on: an
oscillation, which no learning rate schedule ends by itself and which spoils batch statistics. Two answers:

**Iterative freezing** (Nagel et al., arXiv 2203.08114, section 4.2 and algorithm 1). In step t a weight oscillates,
``o = 1``, if its code changes in the direction opposite to its last change. The frequency is the running mean
``f = m * o + (1 - m) * f``, and so is the mean of its grid values. Where f exceeds the threshold the weight is frozen
at its mean, rounded to the grid: the value at which it spent most of its time. With ``mode="anneal"`` the threshold
falls along half a cosine, so that ever rarer oscillations are frozen towards the end.

**Confidence-guided annealing** (Liu et al., OFQ, arXiv 2302.02210, section 4.2). A weight further than a margin from
every rounding threshold is sure of its code and does not move any more; those within the margin move until they leave
it. A fine-tuning after the training proper; with the default margin of 0.005 LSB.

What is frozen is the deployed value, ``Q(w * s)`` with the batch norm's scale s folded in: after each step the float
weight is set to ``value / s``, the middle of its rounding interval, whatever momentum, weight decay or a change of s
did. If the binary point of a channel becomes finer the value stays representable and stays; if it becomes too coarse
for the value, the value is rounded to that grid for as long. Changes of a binary point count as no oscillation.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor, distributed, nn

from edgemat.errors import FormatError
from edgemat.nn import arguments
from edgemat.nn.batch_norm import folded_scale
from edgemat.nn.learned_width import LearnedWidthQuantizer
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.rounding import power_of_two
from edgemat.nn.ternary_quantizer import TernaryQuantizer
from edgemat.nn.training.traversal import weighted_layers
from edgemat.nn.weighted_layer import WeightedLayer
from edgemat.recipe import nearest

MODES = ("freeze", "anneal", "cga")
_THRESHOLDS = {"freeze": 0.02, "anneal": 0.04, "cga": 0.005}
_WIDEST = 16  # beyond, value / s is not safely inside its rounding interval in float32, and nothing oscillates
_STATES = {
    "freeze": ("value", "exponents", "direction", "frequency", "mean", "frozen", "held"),
    "cga": ("frozen", "held"),
}


class OscillationTracker:
    """Tracks the oscillations of quantised weights and freezes the weights concerned; see the module's docstring.

    Call `step()` after each step of the optimiser. Frozen weights really stay, momentum and weight decay included.
    `state_dict()` with the module's and the optimiser's own states resumes a training bit for bit. Under
    `torch.distributed` the batch statistics of rank 0 decide, so that the weights stay equal on all ranks.

    Args:
        q: The result of `edgemat.quantize`, or a module built from edgemat.nn layers. Its linear layers and
            convolutions of at most 16 weight bits are tracked.
        momentum: m of the running means, above 0, at most 1.
        threshold: Frequency (0 to 1) above which a weight is frozen; for ``"anneal"`` the first one; for ``"cga"`` the
            margin in LSBs, below 0.5. None takes 0.02, 0.04 and 0.005.
        mode: ``"freeze"``, ``"anneal"`` or ``"cga"``.
        steps: Steps over which the threshold of ``"anneal"`` falls.
        final_threshold: Where it ends.

    Attributes:
        steps_done: Number of calls of `step()`.

    Raises:
        FormatError: for a setting out of range, or a module without layers to track.
    """

    def __init__(
        self,
        q: nn.Module,
        momentum: float = 0.01,
        threshold: float | None = None,
        mode: str = "freeze",
        steps: int | None = None,
        final_threshold: float = 0.01,
    ):
        if mode not in MODES:
            raise FormatError(
                f"OscillationTracker: mode is {mode!r}, expected one of {', '.join(MODES)}{nearest(str(mode), MODES)}"
            )
        arguments.module("OscillationTracker", q)
        limit = 0.5 if mode == "cga" else 1.0
        threshold = _THRESHOLDS[mode] if threshold is None else threshold
        for name, value, high in (
            ("momentum", momentum, 1.0),
            ("threshold", threshold, limit),
            ("final_threshold", final_threshold, 1.0),
        ):
            if not isinstance(value, Real) or not 0 < value <= high:
                raise FormatError(f"OscillationTracker: {name} is {value!r}, expected a number above 0, at most {high}")
        if (mode == "anneal") != (steps is not None) or (
            steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1)
        ):
            raise FormatError(
                f"OscillationTracker: steps is {steps!r} with mode {mode!r}, expected a positive whole number with "
                "'anneal' (the threshold falls over them), and None otherwise"
            )
        self.mode, self.momentum, self.steps, self.steps_done = mode, float(momentum), steps, 0
        self._start, self._final = float(threshold), float(final_threshold)
        self._layers = {name: layer for name, layer in weighted_layers(q) if layer.weight_quantizer.width <= _WIDEST}
        if not self._layers:
            raise FormatError(
                f"OscillationTracker: {type(q).__name__} holds no linear layer or convolution of at most {_WIDEST} "
                "weight bits, expected a module that edgemat.quantize made"
            )
        for name, layer in self._layers.items():
            if isinstance(layer.weight_quantizer, TernaryQuantizer):
                raise FormatError(
                    f"OscillationTracker: layer {name!r} has ternary weights, whose thresholds follow the mean of all, "
                    "expected weights on a grid of their own; leave the tracker out"
                )
            if layer.limiter is not None:
                raise FormatError(
                    f"OscillationTracker: layer {name!r} bounds its accumulator, which moves the weights of an output "
                    "together, expected weights that can be frozen one by one; leave `accumulator` or the tracker out"
                )
        self._states: dict[str, dict[str, Tensor]] = {name: {} for name in self._layers}
        if mode == "cga":
            self._advance()

    # -- what a user sees -----------------------------------------------------------------------------------------
    @property
    def threshold(self) -> float:
        """The threshold of the next step."""
        if self.steps is None:
            return self._start
        part = min(self.steps_done / self.steps, 1.0)
        return self._final + (self._start - self._final) * 0.5 * (1.0 + math.cos(math.pi * part))

    @property
    def frozen(self) -> dict[str, float]:
        """The share of frozen weights of each layer, by name."""
        return {name: _share(state.get("frozen")) for name, state in self._states.items()}

    @property
    def frozen_share(self) -> float:
        """The share of frozen weights of all tracked ones."""
        total = sum(layer.weight.numel() for layer in self._layers.values())
        count = sum(int(state["frozen"].sum()) for state in self._states.values() if state)
        return count / total

    @property
    def frequency(self) -> dict[str, float]:
        """The mean frequency of oscillation of each layer's weights, by name; frozen ones stand still. Not of CGA."""
        return {
            name: float(state["frequency"].mean()) if "frequency" in state else 0.0
            for name, state in self._states.items()
        }

    @torch.no_grad()
    def step(self) -> None:
        """Holds frozen weights, takes note of the step the optimiser made, and freezes where that is due."""
        self.steps_done += 1
        self._advance()

    def state_dict(self) -> dict[str, Any]:
        """Step count, mode and the tensors of each layer (copies)."""
        tensors = {name: {k: v.clone() for k, v in state.items()} for name, state in self._states.items()}
        return {"mode": self.mode, "steps_done": self.steps_done, "layers": tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken; load the module's state first.

        Raises:
            FormatError: for a state of another mode or of another network.
        """
        if not isinstance(state, dict) or not {"mode", "layers", "steps_done"} <= set(state):
            raise FormatError(
                "OscillationTracker: the state lacks 'mode', 'layers' or 'steps_done', expected what state_dict() gave"
            )
        if state["mode"] != self.mode:
            raise FormatError(
                f"OscillationTracker: the state is of mode {state['mode']!r}, expected {self.mode!r}; resume with "
                "the mode the training began with"
            )
        layers = state["layers"]
        for name in [*layers, *self._layers]:
            if name not in layers or name not in self._layers:
                raise FormatError(
                    f"OscillationTracker: layer {name!r} is in only one of the state and the network, expected "
                    f"the same layers{nearest(name, self._layers if name in layers else layers)}"
                )
        for name, layer in self._layers.items():
            kept = layers[name]
            wanted = _STATES["cga" if self.mode == "cga" else "freeze"]
            if kept and (set(kept) != set(wanted) or kept["held"].shape != layer.weight.shape):
                raise FormatError(
                    f"OscillationTracker: the state of layer {name!r} has weights of another shape, expected "
                    f"{tuple(layer.weight.shape)}"
                )
        for name, layer in self._layers.items():
            self._states[name] = {k: v.detach().clone().to(layer.weight.device) for k, v in layers[name].items()}
        self.steps_done = int(state["steps_done"])

    # -- the work -------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _advance(self) -> None:
        threshold = self.threshold
        scales = self._scales()
        for name, layer in self._layers.items():
            quantizer = layer.weight_quantizer
            if quantizer.observing or not quantizer.ready:
                continue  # real weights have no codes yet
            if self.mode == "cga":
                self._anneal(layer, self._states[name], scales[name], threshold)
            else:
                self._track(layer, self._states[name], scales[name], threshold)

    def _scales(self) -> dict[str, Tensor | None]:
        """The factor per channel that the batch norm of each layer folds in, laid along its weights."""
        found: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            if layer.norm is not None:
                found[name] = folded_scale(layer.norm).float()
        if found and distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            flat = torch.cat(list(found.values()))
            distributed.broadcast(flat, 0)
            parts = flat.split([scale.numel() for scale in found.values()])
            found = dict(zip(found, parts, strict=True))
        return {
            name: layer._along_outputs(found[name].masked_fill(found[name] == 0.0, 1.0)) if name in found else None
            for name, layer in self._layers.items()
        }

    def _track(self, layer: WeightedLayer, state: dict[str, Tensor], scale: Tensor | None, threshold: float) -> None:
        """Algorithm 1 of Nagel et al. for one layer."""
        quantizer = layer.weight_quantizer
        weight = layer.weight.detach()
        if state:
            _hold(weight, state, scale)
        values = quantizer(weight if scale is None else weight * scale)
        exponents = _points(quantizer).clone()
        if not state:
            state.update(
                value=values,
                exponents=exponents,
                direction=torch.zeros_like(values),
                frequency=torch.zeros_like(values),
                mean=values.clone(),
                frozen=torch.zeros_like(values, dtype=torch.bool),
                held=torch.zeros_like(values),
            )
            return
        sign = (values - state["value"]).sign_()
        if not torch.equal(exponents, state["exponents"]):
            sign *= _laid(exponents == state["exponents"], layer)  # the grid moved there, not the weight
        turned = (sign * state["direction"]).clamp_(max=0.0)  # -1 where the direction is the opposite, else 0
        state["frequency"].mul_(1.0 - self.momentum).sub_(turned, alpha=self.momentum)
        state["mean"].lerp_(values, self.momentum)
        state["direction"].mul_(1.0 - sign.abs()).add_(sign)  # the sign, or the old one where it is 0
        state["value"], state["exponents"] = values, exponents
        new = (state["frequency"] > threshold) & ~state["frozen"]
        if bool(new.any()):
            step = power_of_two(-_laid(exponents, layer), values.dtype)
            nearest = (state["mean"] / step).round_().mul_(step)
            if not quantizer.tracks and not isinstance(quantizer, LearnedWidthQuantizer):
                nearest = quantizer(nearest)  # not every point of the grid is a value of a bipolar or K-hot format
            state["held"] = torch.where(new, nearest, state["held"])
            state["value"] = torch.where(new, nearest, values)
            state["frozen"] |= new
            _hold(weight, state, scale)

    def _anneal(self, layer: WeightedLayer, state: dict[str, Tensor], scale: Tensor | None, margin: float) -> None:
        """Holds the confident weights of one layer, then looks which of them are confident now."""
        quantizer = layer.weight_quantizer
        weight = layer.weight.detach()
        if state:
            weight.copy_(torch.where(state["frozen"], state["held"], weight))
        folded = weight if scale is None else weight * scale
        reach = power_of_two(-_laid(_points(quantizer), layer), folded.dtype) * margin
        # A rounding threshold lies within the margin where the two ends of it round to different values.
        state["frozen"] = quantizer(folded - reach) == quantizer(folded + reach)
        state["held"] = weight.clone()
        quantizer(folded)  # what follows the weights (points, codes) follows these


def _share(mask: Tensor | None) -> float:
    return 0.0 if mask is None else float(mask.float().mean())


def _points(quantizer: FixedQuantizer) -> Tensor:
    """Fractional bits of each weight's grid, int32: ``[]``, ``[outputs]``, or laid along the weights."""
    if isinstance(quantizer, LearnedWidthQuantizer):
        return quantizer.groups.spread(quantizer.frac.detach()).round().to(torch.int32)
    return quantizer.exponents()


def _laid(values: Tensor, layer: WeightedLayer) -> Tensor:
    """Binary points, or what belongs to them, laid along the weights."""
    return layer._along_outputs(values) if values.dim() == 1 else values


def _hold(weight: Tensor, state: dict[str, Tensor], scale: Tensor | None) -> None:
    """Puts frozen weights back where they were frozen, in place."""
    if not bool(state["frozen"].any()):
        return
    held = state["held"] if scale is None else state["held"] / scale
    weight.copy_(torch.where(state["frozen"], held.to(weight.dtype), weight))
