"""A training resumed from a checkpoint in the middle of every schedule ends with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import edgemat
from edgemat.errors import EdgematError
from edgemat.lightning import ExportCallback, FormatLogger, QATCallback
from tests.lightning.nets import LEARNED, RECIPE, Lit, loader, network, same, trainer

OPTIONS: dict[str, Any] = {
    "delay": {"delay_steps": 3, "warmup_steps": 10},
    "oscillation": {"momentum": 0.3, "threshold": 0.2, "start": 5},
    "freeze_batch_norm": 0.6,
    "cost_target": {"cost": "ebops", "at_most": 500.0, "rate": 0.5, "start": 0.1},
}


def fit(epochs: int, folder: Path, ckpt: Path | None = None, **options: Any) -> tuple[Lit, list[Any], Path]:
    """A fit of at most 6 epochs (24 steps), cut after `epochs`; module, callbacks and its last checkpoint."""
    torch.manual_seed(100 if ckpt is None else 200)  # the resumed process has other random numbers and other weights
    lit = Lit(network(LEARNED, calibrated=ckpt is None))
    callbacks = [QATCallback(**(OPTIONS | options)), FormatLogger(4, table=False)]
    saver = ModelCheckpoint(folder, filename="last", every_n_epochs=1, enable_version_counter=False)
    run = trainer(max_epochs=6, enable_checkpointing=True, callbacks=[*callbacks, saver, Stop(epochs)])
    run.fit(lit, loader(), ckpt_path=ckpt)
    return lit, [*callbacks, run.optimizers[0]], folder / "last.ckpt"


class Stop(ModelCheckpoint):
    """Ends the training after a number of epochs, when the checkpoint is written."""

    def __init__(self, epochs: int):
        super().__init__(save_top_k=0)
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


@pytest.mark.parametrize("half", [1, 2, 4])
def test_resuming_gives_the_same_bits(half: int, tmp_path: Path) -> None:
    straight, parts, _ = fit(6, tmp_path / "straight")
    _, cut, checkpoint = fit(half, tmp_path / "cut")
    assert cut[0].state_dict()["steps"] == 4 * half
    resumed, continued, _ = fit(6, tmp_path / "resumed", checkpoint)
    assert same(resumed.state_dict(), straight.state_dict())
    for a, b in zip(parts, continued, strict=True):
        assert same(a.state_dict(), b.state_dict())
    assert parts[0].state_dict()["steps"] == 24
    assert parts[0].state_dict()["costs"][0]["latest"] > 0


class Resumable:
    """A loader that Lightning asks for its position, so that a training may be cut within an epoch."""

    def __init__(self) -> None:
        self.position = 0

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Any:
        made = list(loader(shuffle=False))
        while self.position < len(made):
            self.position += 1
            yield made[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_within_an_epoch_gives_the_same_bits(accumulate: int, tmp_path: Path) -> None:
    def run(steps: int, ckpt: Path | None = None) -> tuple[Lit, QATCallback]:
        lit, callback = (
            Lit(network(LEARNED, calibrated=ckpt is None)),
            QATCallback(**OPTIONS | {"freeze_batch_norm": 7}),
        )
        saver = ModelCheckpoint(tmp_path, filename="at-{step}", every_n_train_steps=1, save_top_k=-1)
        options: dict[str, Any] = {"max_epochs": 6, "max_steps": steps, "accumulate_grad_batches": accumulate}
        made = trainer(enable_checkpointing=True, callbacks=[callback, saver], **options)
        made.fit(lit, Resumable(), ckpt_path=ckpt)
        return lit, callback

    cut, total = (6, 10) if accumulate == 1 else (3, 8)
    run(cut)
    resumed = run(total, tmp_path / f"at-step={cut}.ckpt")
    straight = run(total)
    assert same(resumed[0].state_dict(), straight[0].state_dict())
    assert same(resumed[1].state_dict(), straight[1].state_dict())


def test_a_checkpoint_loads_with_weights_only(tmp_path: Path) -> None:
    _, callbacks, checkpoint = fit(2, tmp_path)
    state = torch.load(checkpoint, weights_only=True)["callbacks"]
    assert same(state[callbacks[0].state_key], callbacks[0].state_dict())
    assert same(state[callbacks[1].state_key], callbacks[1].state_dict())


def test_without_the_callbacks_state_the_bits_differ(tmp_path: Path) -> None:
    """The control: what resumes is the state, not luck."""
    straight, parts, _ = fit(6, tmp_path / "straight")
    _, _, checkpoint = fit(2, tmp_path / "cut")
    state = torch.load(checkpoint, weights_only=True)
    state["callbacks"].pop(parts[0].state_key)
    torch.save(state, checkpoint)
    resumed, _, _ = fit(6, tmp_path / "resumed", checkpoint)
    assert not same(resumed.state_dict(), straight.state_dict())


def test_moments_stay_where_the_first_run_set_them(tmp_path: Path) -> None:
    _, _, checkpoint = fit(2, tmp_path / "cut")
    _, callbacks, _ = fit(3, tmp_path / "resumed", checkpoint, freeze_batch_norm=0.9)
    assert callbacks[0].state_dict()["at"]["freeze_batch_norm"] == 14  # 0.6 of 24


def test_other_schedules_are_refused(tmp_path: Path) -> None:
    _, _, checkpoint = fit(2, tmp_path / "cut")
    with pytest.raises(EdgematError, match="written with other schedules"):
        fit(6, tmp_path / "resumed", checkpoint, freeze_batch_norm=None)


def test_fit_again_continues() -> None:
    """`fit` called twice on one trainer goes on with the schedules of the first call."""
    once, callback = Lit(network(LEARNED)), QATCallback(**OPTIONS | {"freeze_batch_norm": 14})
    trainer(max_epochs=6, callbacks=[callback]).fit(once, loader())
    twice, other = Lit(network(LEARNED)), QATCallback(**OPTIONS | {"freeze_batch_norm": 14})
    run = trainer(max_epochs=3, callbacks=[other])
    run.fit(twice, loader())
    run.fit_loop.max_epochs = 6
    run.fit(twice, loader())
    assert other.state_dict()["steps"] == 24
    assert same(callback.state_dict()["at"], other.state_dict()["at"])


def test_a_checkpoint_of_other_formats_is_refused(tmp_path: Path) -> None:
    _, _, checkpoint = fit(1, tmp_path)
    recipe = edgemat.Recipe(input="fixed<8,3>", weights="fixed<4>", activations="fixed<5>")
    assert recipe != RECIPE
    with pytest.raises(RuntimeError, match="weight_quantizer"):
        trainer(max_epochs=2, callbacks=[ExportCallback(tmp_path / "out")]).fit(
            Lit(network(recipe)), loader(), ckpt_path=checkpoint
        )
