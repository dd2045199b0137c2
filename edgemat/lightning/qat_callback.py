"""`QATCallback`: the schedules of quantisation-aware training, driven by Lightning's hooks.

**Order.** After each step of the optimiser: the oscillation tracker, the delay, the scales, the costs; as in the plain
loop of `docs/training.md`.

**The penalty.** No hook of Lightning may change the loss, and no method is replaced. A sum's gradient is the sum of the
gradients, so the penalty's is taken with `torch.autograd.grad` in `on_before_backward`, while the graph of the forward
is there (it runs none of DDP's reduction hooks), and added to ``.grad`` in `on_before_optimizer_step`. At that point
the gradients are those of all accumulated batches, unscaled, already averaged over the processes, and not yet clipped;
the penalty depends on weights and formats, which all processes share, so every process adds the same and no factor is
needed. Costs begin when the delay is over: real numbers cost no bits.

**Processes.** Formats must be the same in all of them. Gradients of binary points are averaged as all others; what is
*observed* is shared here: calibration batches are gathered, ranges of WRAP formats and of the delay's last real step
are united, and batch norm statistics are the first process's after every batch, not only in the next one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim import Optimizer

import edgemat
from edgemat.errors import EdgematError, FormatError, UnsupportedOpError
from edgemat.lightning import ranks
from edgemat.lightning.calibration import calibrate
from edgemat.lightning.network import Found, find_network
from edgemat.lightning.saturation import evaluating

Moment = int | float
Options = Mapping[str, Any]


class QATCallback(Callback):
    """Delay, oscillation freezing, cost targets and batch norm freezing for the quantised network of a LightningModule.

    The module calls `edgemat.quantize` itself; this callback never converts anything. Schedules count steps of the
    optimiser, or take a share of the training (a float above 0 and below 1). Everything is part of the checkpoint: a
    resumed training continues bit for bit.

    Args:
        calibration: Training batches with which the formats are set before the first step where they are not yet, or an
            iterable of batches as `edgemat.calibrate` takes them. None leaves that to `edgemat.calibrate`, or to the
            first batch.
        delay: Steps with real numbers before quantisation, or the arguments of `edgemat.QuantizationDelay`.
        oscillation: True, or the arguments of `edgemat.OscillationTracker`; beside them ``start``, the step at which it
            begins.
        cost_target: Arguments of `edgemat.CostTarget`, such as ``{"cost": "lut", "at_most": 2000}``, or several.
        cost_ramp: Arguments of `edgemat.CostRamp`.
        front: ``folder``, ``monitor`` (a logged metric of which more is better) and ``cost`` (a cost model): after each
            validation the network is offered to the `edgemat.Front` in that folder.
        freeze_batch_norm: When the batch norms' statistics are frozen.
        scales: Arguments of `edgemat.ScaleDeployment`; ``start`` and ``steps`` may be shares of the training. They
            must be over before it ends.
        network: Name of the quantised network in the LightningModule; None takes the only one.

    Raises:
        EdgematError: for a setting out of range.
    """

    def __init__(
        self,
        *,
        calibration: int | Iterable[Any] | None = None,
        delay: int | Options | None = None,
        oscillation: bool | Options = False,
        cost_target: Options | Sequence[Options] = (),
        cost_ramp: Options | None = None,
        front: Options | None = None,
        freeze_batch_norm: Moment | None = None,
        scales: Options | None = None,
        network: str | None = None,
    ):
        if isinstance(calibration, int) and calibration < 1:
            raise EdgematError(f"QATCallback: calibration is {calibration}, expected at least one batch")
        self.calibration = calibration
        self.delay = {"delay_steps": delay} if isinstance(delay, int) else None if delay is None else dict(delay)
        self.oscillation = {} if oscillation is True else dict(oscillation) if oscillation is not False else None
        targets = (cost_target,) if isinstance(cost_target, Mapping) else cost_target
        self.cost_targets = [dict(options) for options in targets]
        self.cost_ramp = None if cost_ramp is None else dict(cost_ramp)
        self.front = None if front is None else dict(front)
        if self.front is not None and set(self.front) != {"folder", "monitor", "cost"}:
            raise EdgematError(f"QATCallback: front has keys {sorted(self.front)}, expected folder, monitor and cost")
        self.network = network
        start = None if self.oscillation is None else self.oscillation.pop("start", 0)
        self._moments: dict[str, Moment] = {}
        self.scales = None if scales is None else dict(scales)
        due = {} if scales is None else {"scales.start": scales.get("start", 0), "scales.steps": scales.get("steps", 0)}
        due |= {"freeze_batch_norm": freeze_batch_norm, "oscillation": start}
        for name, moment in due.items():
            if moment is not None:
                self._moments[name] = _checked(name, moment)
        self._found: Found | None = None
        self._steps = 0
        self._at: dict[str, int] = {}
        self._delay: Any = None
        self._scales: Any = None
        self._tracker: Any = None
        self._costs: list[Any] = []
        self._norms: Any = None
        self._global_step = 0
        self._penalties: dict[nn.Parameter, torch.Tensor] | None = None
        self._checked = False
        self._loaded: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """One state per network."""
        return self._generate_state_key(network=self.network)

    # -- the beginning --------------------------------------------------------------------------------------------
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the network, calibrates where that is due, and builds the schedules; checkpoints are loaded already.

        Raises:
            LoweringError: if the LightningModule holds no quantised network, or several and none is named.
            UnsupportedOpError: for strategies and precisions in which formats cannot be exact.
        """
        found = self._found = find_network(pl_module, self.network)
        ranks.check_strategy(trainer)
        _check_precision(trainer, found)
        state, self._loaded = self._loaded, None
        if state is None and trainer.global_step > 0 and self._steps:
            state = self.state_dict()  # fit was called again
        calibrate(trainer, pl_module, found, self.calibration)
        self._steps = 0 if state is None else int(state["steps"])
        self._at = dict(state["at"]) if state is not None else self._resolved(trainer)
        self._global_step = trainer.global_step
        self._delay = self._tracker = self._norms = None
        if self.delay is not None:
            self._delay = edgemat.QuantizationDelay(found.network, **self.delay)
        self._scales = None if self.scales is None else self._scale_deployment(trainer, found)
        self._costs = [edgemat.CostTarget(found.network, **options) for options in self.cost_targets]
        if self.cost_ramp is not None:
            self._costs.append(edgemat.CostRamp(found.network, **self.cost_ramp))
        if state is not None:
            self._restore(state)
        self._apply()
        self._checked = False

    def _scale_deployment(self, trainer: Trainer, found: Found) -> Any:
        """The schedule of ternary scales, which must end before the training does."""
        assert self.scales is not None
        at = {name: self._at[f"scales.{name}"] for name in ("start", "steps")}
        length = trainer.estimated_stepping_batches
        if sum(at.values()) >= length:
            raise EdgematError(
                f"QATCallback: scales are deployed after {sum(at.values())} steps of a training of {length:.0f}, "
                "expected fewer, so that training sees what is exported; lower start or steps"
            )
        return edgemat.ScaleDeployment(found.network, **{**self.scales, **at})

    def _resolved(self, trainer: Trainer) -> dict[str, int]:
        """The moments in steps."""
        made = {}
        for name, moment in self._moments.items():
            if isinstance(moment, float):
                length = trainer.estimated_stepping_batches
                if length == float("inf"):
                    raise EdgematError(
                        f"QATCallback: {name} is {moment}, a share of a training without end, expected a number of "
                        "steps; or give the trainer max_steps or max_epochs"
                    )
                made[name] = int(moment * length)
            else:
                made[name] = moment
        return made

    # -- steps ----------------------------------------------------------------------------------------------------
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remembers the steps before this batch."""
        self._global_step = trainer.global_step

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Takes the penalty's gradient while the forward's graph is there; without a loss there is none."""
        if self._costs and (self._delay is None or self._delay.finished):
            self._penalties = self._penalty_gradients(pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks once whether DDP was told of formats without a gradient; it fails later, and without a name.

        Raises:
            EdgematError: if it was not.
        """
        if self._checked:
            return
        self._checked = True
        assert self._found is not None
        told = getattr(trainer.model, "find_unused_parameters", False) or getattr(trainer.model, "static_graph", False)
        if trainer.world_size > 1 and not told:
            _check_used(self._found)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Adds the gradient of the penalty."""
        if self._penalties is None:
            return
        with torch.no_grad():
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                gradient = self._penalties.pop(parameter, None)
                if gradient is None:
                    continue
                if parameter.grad is None:
                    parameter.grad = gradient
                else:
                    parameter.grad.add_(gradient)

    def _penalty_gradients(self, pl_module: LightningModule) -> dict[nn.Parameter, torch.Tensor]:
        """The gradient of the penalties' sum by parameter.

        Raises:
            FormatError: if it has none, because no width is learned.
        """
        assert self._found is not None
        parameters = [p for p in self._found.network.parameters() if p.requires_grad]
        with torch.enable_grad():
            terms = [cost.penalty() for cost in self._costs]
            penalty = torch.stack(terms).sum() if len(terms) > 1 else terms[0]
            if not penalty.requires_grad:
                raise FormatError(
                    "QATCallback: the cost of the network cannot change, expected learned widths; quantise with "
                    "learn_widths='all' in the recipe"
                )
            gradients = torch.autograd.grad(penalty, parameters, retain_graph=True, allow_unused=True)
        pl_module.log("qat/penalty", penalty.detach())
        for cost, term in zip(self._costs, terms, strict=True):
            pl_module.log(f"qat/{cost.model}", term.detach() / cost.beta if hasattr(cost, "beta") else cost.latest)
        return {p: gradient for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the schedules on if the optimiser made a step."""
        found = self._found
        assert found is not None
        ranks.synchronize(trainer, found.network)
        if trainer.global_step == self._global_step:
            return
        self._steps += 1
        if self._tracker is not None:
            self._tracker.step()
        if self._delay is not None:
            ranks.unite(trainer, self._delay.observed)
            self._delay.step()
        if self._scales is not None:
            self._scales.step()
        for cost in self._costs if self._penalties is not None else ():
            cost.step() if hasattr(cost, "step") else cost.update()
        self._penalties = None
        self._apply()
        if self._tracker is not None and self._steps % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log("qat/frozen", self._tracker.frozen_share)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets all processes validate the same network."""
        if self._found is not None:
            ranks.synchronize(trainer, self._found.network)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Offers the network to the front."""
        if self.front is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        assert self._found is not None
        error: EdgematError | None = None
        try:
            monitor = trainer.callback_metrics.get(self.front["monitor"])
            if monitor is None:
                known = ", ".join(map(repr, trainer.callback_metrics)) or "none"
                raise EdgematError(
                    f"QATCallback: front monitors {self.front['monitor']!r}, which the validation did not log, "
                    f"expected one of its metrics ({known})"
                )
            with evaluating(self._found.network), torch.no_grad():
                cost = edgemat.cost(self._found.network, self.front["cost"])
            if trainer.is_global_zero:
                edgemat.Front(self.front["folder"]).offer(self._found.network, monitor, cost)
        except EdgematError as failed:
            error = failed
        ranks.raise_together(trainer, error)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the same network in all processes."""
        assert self._found is not None
        ranks.synchronize(trainer, self._found.network)

    def _apply(self) -> None:
        """Begins what is due at the present step."""
        assert self._found is not None
        q = self._found.network
        if self._tracker is None and self.oscillation is not None and self._steps >= self._at["oscillation"]:
            self._tracker = edgemat.OscillationTracker(q, **self.oscillation)
        if self._norms is None and self._steps >= self._at.get("freeze_batch_norm", self._steps + 1):
            self._norms = edgemat.freeze_batch_norm(q)

    # -- the end --------------------------------------------------------------------------------------------------
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes back what is not part of the network's state: the delay's hooks, the frozen statistics."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As `teardown`."""
        self._release()

    def _release(self) -> None:
        if self._delay is not None:
            self._delay.remove()
        if self._scales is not None:
            self._scales.remove()
        if self._norms is not None:
            self._norms.undo()

    # -- state ----------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Steps taken, when things begin, and the state of every schedule."""
        if self._loaded is not None:
            return self._loaded
        return {
            "steps": self._steps,
            "at": dict(self._at),
            "delay": None if self._delay is None else self._delay.state_dict(),
            "scales": None if self._scales is None else self._scales.state_dict(),
            "oscillation": None if self._tracker is None else self._tracker.state_dict(),
            "costs": [cost.state_dict() for cost in self._costs],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a checkpoint's state until the schedules exist."""
        self._loaded = copy.deepcopy(state_dict)

    def _restore(self, state: dict[str, Any]) -> None:
        """Continues the schedules.

        Raises:
            EdgematError: if the checkpoint was written with other schedules.
        """
        if set(self._at) != set(self._moments) or (state["delay"] is None) != (self._delay is None):
            raise _other("schedules")
        if len(state["costs"]) != len(self._costs):
            raise _other("costs")
        if state["delay"] is not None:
            self._delay.load_state_dict(state["delay"])
        if self._scales is not None and state.get("scales") is not None:
            self._scales.load_state_dict(state["scales"])
        for cost, kept in zip(self._costs, state["costs"], strict=True):
            cost.load_state_dict(kept)
        self._apply()
        if self._tracker is not None and state["oscillation"] is not None:
            self._tracker.load_state_dict(state["oscillation"])


def _other(what: str) -> EdgematError:
    return EdgematError(
        f"QATCallback: the checkpoint was written with other {what}, expected the same; resume with the arguments the "
        "training began with"
    )


def _checked(name: str, moment: Moment) -> Moment:
    whole = isinstance(moment, int) and not isinstance(moment, bool) and moment >= 0
    if whole or (isinstance(moment, float) and 0.0 < moment < 1.0):
        return moment
    raise EdgematError(
        f"QATCallback: {name} begins at {moment!r}, expected a number of steps or a share of the training between 0 "
        "and 1"
    )


def _check_precision(trainer: Trainer, found: Found) -> None:
    """Refuses parameters that are not float32: formats would be learned from rounded weights."""
    for name, parameter in found.network.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise UnsupportedOpError(
                f"parameter {name!r} is {parameter.dtype} under the trainer's precision {trainer.precision!r}, "
                "expected torch.float32; use '32-true', or mixed precision ('bf16-mixed', '16-mixed')"
            )


def _check_used(found: Found) -> None:
    """Refuses parameters that got no gradient."""
    for name, parameter in found.network.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            raise EdgematError(
                f"parameter {name!r} got no gradient, as delayed formats do, which DDP must be told; use "
                "Trainer(strategy='ddp_find_unused_parameters_true')"
            )
