"""The schedule of scales under Lightning is the plain loop, to the bit, and resumes; what cannot join is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import edgemat
from edgemat.errors import EdgematError, FormatError
from edgemat.lightning import QATCallback
from edgemat.nn import TernaryQuantizer
from tests.lightning.nets import Lit, batches, loader, network, same, trainer
from tests.lightning.test_resume import Stop

RECIPE = edgemat.Recipe(input="fixed<8,3>", weights="ternary", scale="free", activations="fixed<5>")
SCALES = {"start": 2, "steps": 3, "scale": "power_of_two"}


def lit() -> Lit:
    return Lit(network(RECIPE))


def test_the_callback_is_the_plain_loop_and_resumes(tmp_path: Path) -> None:
    by_hand = lit()
    schedule = edgemat.ScaleDeployment(by_hand.net, **SCALES)
    optimizer = by_hand.configure_optimizers()
    by_hand.net.train()
    for batch in batches(2):
        optimizer.zero_grad()
        by_hand.loss(batch).backward()
        optimizer.step()
        schedule.step()
    assert schedule.finished

    whole = lit()
    trainer(max_epochs=2, callbacks=[QATCallback(scales=SCALES)]).fit(whole, loader())
    assert same(whole.net.state_dict(), by_hand.net.state_dict())
    held = [part.held.item() for part in whole.net.modules() if isinstance(part, TernaryQuantizer)]
    assert held == [True, True]

    saver = ModelCheckpoint(tmp_path, filename="last", every_n_epochs=1, enable_version_counter=False)
    options = {"max_epochs": 2, "enable_checkpointing": True}
    trainer(**options, callbacks=[QATCallback(scales=SCALES), saver, Stop(1)]).fit(lit(), loader())
    resumed = lit()
    run = trainer(max_epochs=2, callbacks=[QATCallback(scales=SCALES)])
    run.fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert same(resumed.net.state_dict(), by_hand.net.state_dict())

    control = lit()
    late = {**SCALES, "start": 3}
    trainer(max_epochs=2, callbacks=[QATCallback(scales=late)]).fit(control, loader())
    assert not same(control.net.state_dict(), by_hand.net.state_dict())


def test_a_schedule_that_ends_too_late_is_refused() -> None:
    callback = QATCallback(scales={"start": 0.5, "steps": 0.5, "scale": "power_of_two"})
    with pytest.raises(EdgematError, match="scales are deployed after 8 steps of a training of 8, expected fewer"):
        trainer(max_epochs=2, callbacks=[callback]).fit(lit(), loader())


def test_trits_have_no_grid_on_which_weights_could_oscillate() -> None:
    with pytest.raises(FormatError, match="has ternary weights, whose thresholds follow the mean"):
        edgemat.OscillationTracker(network(RECIPE))
    with pytest.raises(FormatError, match="holds no ternary weights"):
        edgemat.ScaleDeployment(torch.nn.Linear(2, 2), 1)
