"""Calibration before the first step, with the same batches in every process."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

import edgemat
from edgemat.errors import EdgematError, FormatError
from edgemat.lightning import ranks
from edgemat.lightning.network import Found


def calibrate(trainer: Trainer, pl_module: LightningModule, found: Found, batches: int | Iterable[Any] | None) -> None:
    """Sets the formats of a network that has open ones; the random numbers and the loader stay as they are.

    Args:
        trainer: The trainer, its strategy set up.
        pl_module: The LightningModule; if it has a `forward`, that is called, else the network.
        found: The network.
        batches: So many training batches of each process, batches that are the same in all, or None for none.

    Raises:
        FormatError: if formats are open and each of several processes would choose its own.
        EdgematError: if training batches are asked for and there are several loaders.
    """
    open_points = [name for name, part in found.quantizers.items() if not part.ready]
    if not open_points:
        return
    if batches is None:
        if trainer.world_size > 1:
            raise FormatError(
                f"quantiser {open_points[0]!r} has no binary point yet and {trainer.world_size} processes would each "
                "take their own first batch, expected one for all; pass QATCallback(calibration=8) or call "
                "edgemat.calibrate before"
            )
        return
    if isinstance(batches, int):
        trainer.fit_loop.setup_data()  # what Lightning does at the first step; a second call changes nothing
        with isolate_rng():
            taken = list(itertools.islice(_fresh(trainer.train_dataloader), batches))
        taken = ranks.gather_batches(trainer, taken)
    else:
        taken = list(batches)
    whole = type(pl_module).forward is not LightningModule.forward
    with isolate_rng():
        edgemat.calibrate(pl_module if whole else found.network, taken)


def _fresh(loader: Any) -> Iterable[Any]:
    """A loader to iterate, without disturbing the workers that the training's own iterator keeps."""
    if isinstance(loader, Mapping | Sequence):
        raise EdgematError(
            "QATCallback: the training data are several loaders, expected one; pass the batches as calibration="
        )
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        loader = copy.copy(loader)
        loader._iterator = None
    return loader
