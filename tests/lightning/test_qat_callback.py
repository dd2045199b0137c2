"""The schedules of `QATCallback` are those of a plain loop, to the bit, and change nothing they need not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

import edgemat
from edgemat.errors import EdgematError, FormatError, LoweringError, UnsupportedOpError
from edgemat.lightning import QATCallback
from tests.lightning.nets import LEARNED, Lit, batches, data, loader, network, same, trainer

DELAY = {"delay_steps": 3, "warmup_steps": 5}
OSCILLATION = {"momentum": 0.3, "threshold": 0.2}


def plain(lit: Lit, epochs: int, accumulate: int = 1, frozen_at: int | None = None) -> Any:
    """The loop of docs/training.md by hand: delay, oscillations, frozen statistics."""
    q = lit.net
    delay, tracker = edgemat.QuantizationDelay(q, **DELAY), edgemat.OscillationTracker(q, **OSCILLATION)
    optimizer = lit.configure_optimizers()
    q.train()
    steps = 0
    for index, batch in enumerate(batches(epochs)):
        (lit.loss(batch) / accumulate).backward()
        if (index + 1) % accumulate:
            continue
        optimizer.step()
        optimizer.zero_grad()
        tracker.step()
        delay.step()
        steps += 1
        if steps == frozen_at:
            edgemat.freeze_batch_norm(q)
    return tracker


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_callback_is_the_plain_loop(accumulate: int) -> None:
    by_hand, by_lightning = Lit(), Lit()
    tracker = plain(by_hand, 5, accumulate, frozen_at=7)
    callback = QATCallback(delay=DELAY, oscillation=OSCILLATION, freeze_batch_norm=7)
    trainer(max_epochs=5, accumulate_grad_batches=accumulate, callbacks=[callback]).fit(by_lightning, loader())
    assert same(by_lightning.net.state_dict(), by_hand.net.state_dict())
    assert same(callback.state_dict()["oscillation"], tracker.state_dict())
    assert callback.state_dict()["steps"] == 20 // accumulate
    if accumulate == 1:
        assert tracker.frozen_share > 0.0
        other = Lit()
        plain(other, 5, frozen_at=8)  # the control: one step later
        assert not same(by_lightning.net.state_dict(), other.net.state_dict())


def test_without_options_the_training_is_lightnings_own() -> None:
    with_it, without = Lit(), Lit()
    trainer(max_epochs=2, callbacks=[QATCallback()]).fit(with_it, loader())
    trainer(max_epochs=2).fit(without, loader())
    assert same(with_it.state_dict(), without.state_dict())


def test_shares_of_the_training() -> None:
    callback = QATCallback(freeze_batch_norm=0.5, oscillation={"start": 0.25})
    trainer(max_epochs=2, callbacks=[callback]).fit(Lit(), loader())
    assert callback.state_dict()["at"] == {"freeze_batch_norm": 4, "oscillation": 2}
    with pytest.raises(EdgematError, match=r"freeze_batch_norm is 0\.5, a share of a training without end"):
        trainer(max_epochs=-1, callbacks=[QATCallback(freeze_batch_norm=0.5)]).fit(Lit(), loader())


def test_frozen_statistics_end_with_the_fit() -> None:
    lit = Lit()
    before = lit.net.get_buffer("1.running_mean").clone()
    trainer(max_epochs=1, callbacks=[QATCallback(freeze_batch_norm=0)]).fit(lit, loader())
    assert torch.equal(lit.net.get_buffer("1.running_mean"), before)
    lit.net.train()(data()[0])
    assert not torch.equal(lit.net.get_buffer("1.running_mean"), before)


def test_a_fit_that_ends_in_the_delay_leaves_quantisers_on() -> None:
    lit = Lit()
    trainer(max_epochs=1, callbacks=[QATCallback(delay=100)]).fit(lit, loader())
    parts = [part for part in lit.net.modules() if hasattr(part, "delayed")]
    assert parts and not any(part.delayed or part._forward_hooks for part in parts)


def test_a_failing_fit_leaves_nothing_behind() -> None:
    class Failing(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 2:
                raise RuntimeError("out of luck")
            return self.loss(batch)

    lit = Failing()
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(max_epochs=1, callbacks=[QATCallback(delay=100, freeze_batch_norm=0)]).fit(lit, loader())
    assert not any(getattr(part, "delayed", False) or getattr(part, "frozen", False) for part in lit.modules())


def test_calibration_takes_training_batches() -> None:
    lit, by_hand = Lit(network(calibrated=False)), network(calibrated=False)
    callback = QATCallback(calibration=2)
    run = trainer(max_epochs=1, num_sanity_val_steps=2, callbacks=[callback], limit_train_batches=1)
    lit.lr = 0.0
    run.fit(lit, loader(), loader(shuffle=False))
    edgemat.calibrate(by_hand, batches(1)[:2])
    points = {name: value for name, value in by_hand.state_dict().items() if name.endswith("frac")}
    assert points
    assert same({name: lit.net.state_dict()[name] for name in points}, points)


class Recorded(Lit):
    """Keeps the labels of every training batch."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen = [*getattr(self, "seen", []), batch[1].tolist()]
        return self.loss(batch)


@pytest.mark.parametrize("workers", [0, 1])
def test_calibration_takes_no_batch_and_no_random_number_from_the_training(workers: int) -> None:
    orders = []
    for calibrated in (True, False):
        pairs = torch.utils.data.TensorDataset(*data())
        options = {"num_workers": workers, "persistent_workers": workers > 0}
        shuffled = torch.utils.data.DataLoader(pairs, 12, shuffle=True, **options)
        lit = Recorded(network(calibrated=calibrated))
        torch.manual_seed(5)
        trainer(max_epochs=2, callbacks=[QATCallback(calibration=3)]).fit(lit, shuffled)
        orders.append(lit.seen)
    assert len(orders[0]) == 8
    assert orders[0] == orders[1]


COSTS = [
    ("cost_target", "CostTarget", {"cost": "ebops", "at_most": 500.0, "rate": 0.5, "start": 0.1}),
    ("cost_ramp", "CostRamp", {"cost": "lut", "start": 1e-4, "stop": 1e-2, "steps": 6}),
]


def penalty_gradients(lit: Lit, penalty: torch.Tensor) -> list[Any]:
    gradients = torch.autograd.grad(penalty, list(lit.net.parameters()), retain_graph=True, allow_unused=True)
    return list(zip(lit.net.parameters(), gradients, strict=True))


def add(gradients: list[Any]) -> None:
    for parameter, gradient in gradients:
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def advance(cost: Any) -> None:
    cost.step() if isinstance(cost, edgemat.CostRamp) else cost.update()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize(("option", "name", "settings"), COSTS, ids=["target", "ramp"])
def test_the_penalty_is_added_to_the_gradients(
    option: str, name: str, settings: dict[str, Any], clip: float | None, accumulate: int
) -> None:
    lit, by_hand = Lit(network(LEARNED)), Lit(network(LEARNED))
    callback = QATCallback(**{option: settings})
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    run = trainer(max_epochs=2, callbacks=[callback], **options)
    run.fit(lit, loader())
    cost, optimizer = getattr(edgemat, name)(by_hand.net, **settings), by_hand.configure_optimizers()
    by_hand.net.train()
    for index, batch in enumerate(batches(2)):
        loss = by_hand.loss(batch) / accumulate
        extra = penalty_gradients(by_hand, cost.penalty())
        by_hand_cost = float(edgemat.cost(by_hand.net, settings["cost"]))
        loss.backward()
        if (index + 1) % accumulate:
            continue
        add(extra)
        if clip is not None:
            nn.utils.clip_grad_norm_(by_hand.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        advance(cost)
    assert same(lit.net.state_dict(), by_hand.net.state_dict())
    assert callback.state_dict()["costs"] == [cost.state_dict()]
    logged = run.logged_metrics[f"qat/{settings['cost']}"]
    assert float(logged) == pytest.approx(by_hand_cost, rel=1e-6)
    without = Lit(network(LEARNED))  # the control
    trainer(max_epochs=2, **options).fit(without, loader())
    assert not same(lit.net.state_dict(), without.net.state_dict())


@pytest.mark.parametrize("frozen", [None, 0])
def test_the_gradients_are_those_of_the_sum(frozen: int | None) -> None:
    """One step of plain descent against ``(loss + penalty).backward()``, which adds in another order."""
    lit, by_hand = Lit(network(LEARNED), kind=torch.optim.SGD), Lit(network(LEARNED), kind=torch.optim.SGD)
    options = COSTS[0][2] | {"start": 10.0}
    callback = QATCallback(cost_target=options, freeze_batch_norm=frozen)
    trainer(max_steps=1, callbacks=[callback]).fit(lit, loader())
    by_hand.net.train()
    if frozen is not None:
        edgemat.freeze_batch_norm(by_hand.net)
    start = {name: p.detach().clone() for name, p in by_hand.net.named_parameters()}
    (by_hand.loss(batches(1)[0]) + edgemat.CostTarget(by_hand.net, **options).penalty()).backward()
    by_hand.configure_optimizers().step()
    moved: dict[str, float] = {}
    for (name, a), b in zip(by_hand.net.named_parameters(), lit.net.parameters(), strict=True):
        moved[name] = float((a - start[name]).abs().max())
        assert (a - b).abs().max() <= 1e-5 * moved[name], name
    assert moved["0.weight"] > 0 and moved["0.weight_quantizer.frac"] > 0


def test_several_costs_and_a_delay() -> None:
    """The penalties are one sum; they begin when the last quantiser has joined."""
    lit, by_hand = Lit(network(LEARNED)), Lit(network(LEARNED))
    targets = [{"cost": "ebops", "at_most": 500.0}, {"cost": "mcu", "at_most": 30.0}]
    callback = QATCallback(delay=DELAY, cost_target=targets)
    trainer(max_epochs=3, callbacks=[callback]).fit(lit, loader())
    costs = [edgemat.CostTarget(by_hand.net, **options) for options in targets]  # type: ignore[arg-type]
    delay, optimizer = edgemat.QuantizationDelay(by_hand.net, **DELAY), by_hand.configure_optimizers()
    by_hand.net.train()
    for batch in batches(3):
        begun = delay.finished
        loss = by_hand.loss(batch)
        penalty = torch.stack([cost.penalty() for cost in costs]).sum() if begun else None
        extra = [] if penalty is None else penalty_gradients(by_hand, penalty)
        loss.backward()
        add(extra)
        optimizer.step()
        optimizer.zero_grad()
        delay.step()
        for cost in costs if begun else []:
            cost.update()
    assert same(lit.net.state_dict(), by_hand.net.state_dict())
    assert callback.state_dict()["costs"] == [cost.state_dict() for cost in costs]
    assert costs[0].latest is not None


def test_each_optimizer_gets_the_penalty_of_its_own_parameters() -> None:
    class Two(Lit):
        def __init__(self) -> None:
            super().__init__(network(LEARNED))
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            loss = self.loss(batch)
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()

        def configure_optimizers(self) -> Any:
            first = list(self.net.get_submodule("0").parameters())
            last = list(self.net.get_submodule("5").parameters())
            return torch.optim.SGD(first, lr=0.1), torch.optim.SGD(last, lr=0.2)

    lit, by_hand = Two(), Two()
    option, name, settings = COSTS[1]
    callback = QATCallback(**{option: settings})
    trainer(max_epochs=1, callbacks=[callback]).fit(lit, loader())
    cost, optimizers = getattr(edgemat, name)(by_hand.net, **settings), by_hand.configure_optimizers()
    by_hand.net.train()
    for batch in batches(1):
        by_hand.zero_grad()
        loss = by_hand.loss(batch)
        extra = penalty_gradients(by_hand, cost.penalty())
        loss.backward()
        add(extra)
        for optimizer in optimizers:
            optimizer.step()
        advance(cost)
    assert callback.state_dict()["steps"] == 4
    assert same(lit.net.state_dict(), by_hand.net.state_dict())


def test_a_skipped_step_gets_no_penalty() -> None:
    class Skipping(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            return None

    lit = Skipping(network(LEARNED), kind=torch.optim.SGD)
    before = {name: value.clone() for name, value in lit.named_parameters()}
    trainer(max_epochs=1, callbacks=[QATCallback(cost_target={"at_most": 10.0})]).fit(lit, loader())
    assert same(dict(lit.named_parameters()), before)


def test_a_cost_that_cannot_change_is_refused() -> None:
    with pytest.raises(FormatError, match="cannot change, expected learned widths"):
        trainer(max_epochs=1, callbacks=[QATCallback(cost_ramp={"cost": "ebops"})]).fit(Lit(), loader())


def test_the_front(tmp_path: Path) -> None:
    class Scored(Lit):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("accuracy", 0.5 + 0.1 * self.current_epoch)

    lit = Scored(network(LEARNED))
    front = {"folder": tmp_path / "front", "monitor": "accuracy", "cost": "ebops"}
    callback = QATCallback(cost_ramp={"cost": "ebops", "start": 0.01, "stop": 0.1, "steps": 8}, front=front)
    run = trainer(max_epochs=3, num_sanity_val_steps=1, callbacks=[callback])
    run.fit(lit, loader(), loader(shuffle=False))
    found = edgemat.Front(tmp_path / "front")
    assert found.points[-1].accuracy == pytest.approx(0.7)
    again = network(LEARNED)
    found.load(again, found.points[-1])
    with torch.no_grad():
        again.eval()(data()[0][:1])
        assert float(edgemat.cost(again, "ebops")) == found.points[-1].cost
    with pytest.raises(EdgematError, match=r"front monitors 'acc', .* expected one of its metrics \(.*'accuracy'"):
        wrong = QATCallback(front=front | {"monitor": "acc"})
        trainer(max_epochs=1, callbacks=[wrong]).fit(Scored(network(LEARNED)), loader(), loader(shuffle=False))
    with pytest.raises(EdgematError, match=r"front has keys \['folder'\], expected folder, monitor and cost"):
        QATCallback(front={"folder": "front"})


def test_the_module_and_the_trainer_keep_their_methods() -> None:
    """What a fit with the callback leaves behind is what a fit without it leaves behind."""

    def shape_of(thing: Any) -> dict[str, Any]:
        return {k: v.__func__ if hasattr(v, "__func__") else type(v) for k, v in vars(thing).items()}

    ends = []
    for callbacks in ([], [QATCallback(delay=2, oscillation=OSCILLATION, freeze_batch_norm=4)]):
        lit, run = Lit(), trainer(max_epochs=2, callbacks=list(callbacks))
        net, graph, classes = lit.net, lit.net.code, {part: type(part) for part in lit.modules()}
        run.fit(lit, loader())
        assert lit.net is net and lit.net.code == graph and {part: type(part) for part in lit.modules()} == classes
        assert not any(name in vars(lit) for name in ("forward", "training_step", "configure_optimizers"))
        hooks = [(p._forward_hooks, p._forward_pre_hooks, p._backward_hooks) for p in lit.modules()]
        assert not any(map(any, hooks))
        ends.append((shape_of(run), shape_of(lit), {name: set(vars(p)) for name, p in lit.named_modules()}))
    (run, lit, parts), (other_run, other_lit, other_parts) = ends
    assert run == other_run
    assert lit == other_lit
    # The public freeze leaves its flag, down again.
    changed = {name: other_parts[name] ^ parts[name] for name in parts if other_parts[name] != parts[name]}
    assert all(names <= {"frozen", "delayed"} for names in changed.values())


def test_early_stopping() -> None:
    from lightning.pytorch.callbacks import EarlyStopping

    stop = EarlyStopping("val", min_delta=100.0, patience=2)
    callback = QATCallback(delay=2, oscillation=True)
    run = trainer(max_epochs=50, callbacks=[stop, callback])
    run.fit(Lit(), loader(), loader(shuffle=False))
    assert stop.stopped_epoch > 0 and run.current_epoch < 5
    assert callback.state_dict()["steps"] == run.global_step


def test_modules_without_a_quantised_network_are_refused() -> None:
    with pytest.raises(LoweringError, match=r"Lit holds no quantised network, .* call self\.net = edgemat\.quantize"):
        trainer(max_epochs=1, callbacks=[QATCallback()]).fit(Lit(nn.Linear(3, 3)), loader())


def test_two_networks_need_a_name() -> None:
    class Pair(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.other = network()

    with pytest.raises(LoweringError, match=r"2 quantised networks \('net', 'other'\), .* network='\.\.\.'"):
        trainer(max_epochs=1, callbacks=[QATCallback()]).fit(Pair(), loader())
    lit = Pair()
    trainer(max_epochs=1, callbacks=[QATCallback(network="other", freeze_batch_norm=0)]).fit(lit, loader())
    with pytest.raises(LoweringError, match=r"network='nett' names no quantised network of Pair, .* 'net', 'other'"):
        trainer(max_epochs=1, callbacks=[QATCallback(network="nett")]).fit(Pair(), loader())


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_a_network_made_late(hook: str) -> None:
    class Late(L.LightningModule):
        training_step, loss, configure_optimizers = Lit.training_step, Lit.loss, Lit.configure_optimizers
        lr, kind = 0.05, torch.optim.Adam

    setattr(Late, hook, lambda self, stage=None: setattr(self, "net", network()))
    late, soon = Late(), Lit()
    for lit in (late, soon):
        trainer(max_epochs=1, callbacks=[QATCallback(delay=2)]).fit(lit, loader())
    assert same(late.state_dict(), soon.state_dict())


def test_a_network_of_layers_built_by_hand() -> None:
    from edgemat.lightning.network import find_network
    from edgemat.nn import QuantLinear

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = QuantLinear(4, 2)

    class Outer(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

    outer = Outer()
    assert find_network(outer).name == "inner" and find_network(outer).network is outer.inner
    outer.head = QuantLinear(2, 2)
    assert find_network(outer).name == "" and find_network(outer).network is outer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_batch_norm": -1}, "freeze_batch_norm begins at -1"),
        ({"freeze_batch_norm": 1.5}, r"begins at 1\.5"),
        ({"freeze_batch_norm": True}, "begins at True"),
        ({"calibration": 0}, "calibration is 0, expected at least one batch"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EdgematError, match=message):
        QATCallback(**options)


def test_parameters_must_be_float32() -> None:
    with pytest.raises(UnsupportedOpError, match=r"torch\.bfloat16 under the trainer's precision 'bf16-true'"):
        trainer(max_epochs=1, precision="bf16-true", callbacks=[QATCallback()]).fit(Lit(), loader())


def test_settings_of_the_schedules_are_checked_by_themselves() -> None:
    with pytest.raises(FormatError, match="QuantizationDelay: delay_steps is -3"):
        trainer(max_epochs=1, callbacks=[QATCallback(delay=-3)]).fit(Lit(), loader())


def test_several_loaders_are_refused_for_calibration() -> None:
    lit = Lit(network(calibrated=False))
    with pytest.raises(EdgematError, match="several loaders"):
        trainer(max_epochs=1, callbacks=[QATCallback(calibration=2)]).fit(lit, {"a": loader(), "b": loader()})
