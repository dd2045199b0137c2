"""Trainings on two CPU processes (gloo), one after the other; each process writes what it ends with.

    python -m tests.lightning.ddp_program <folder>

It runs in a process of its own, because the second training process is forked before torch starts its threads.
"""

from __future__ import annotations

import datetime
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

import edgemat
from edgemat.lightning import ExportCallback, FormatLogger, QATCallback
from tests.lightning.nets import LEARNED, Lit, data, network, trainer

DELAY = {"delay_steps": 2, "warmup_steps": 4}
OSCILLATION = {"momentum": 0.3, "threshold": 0.2}
COST = {"cost": "ebops", "at_most": 500.0, "rate": 0.5, "start": 0.1}
NARROW = edgemat.Recipe(
    input="fixed<8,1>", weights="fixed<4>", activations="fixed<5>", learn_widths="weights", weight_groups=4
)
WRAPPING = edgemat.Recipe(input="fixed<8,3>", weights="fixed<4>", activations="fixed<6,RND,WRAP>")


class Rows(torch.utils.data.Sampler[int]):
    """Process r takes batch 2i + r of a fixed order, or every batch where `alike`."""

    def __init__(self, batch: int, alike: bool = False):
        self.batch, self.alike = batch, alike

    def __iter__(self) -> Any:
        started = torch.distributed.is_initialized()
        rank, world = (torch.distributed.get_rank(), 2) if started and not self.alike else (0, 1)
        for start in range(rank * self.batch, len(data()[0]), world * self.batch):
            yield from range(start, start + self.batch)

    def __len__(self) -> int:
        return len(data()[0]) // (2 if torch.distributed.is_initialized() and not self.alike else 1)


def loader(alike: bool = False, batch: int = 6) -> DataLoader:
    return DataLoader(TensorDataset(*data()), batch, sampler=Rows(batch, alike))


class Ending(L.Callback):
    """Writes the state of this process."""

    def __init__(self, path: Path, *callbacks: L.Callback):
        self.path, self.callbacks = path, callbacks

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        states = [part.state_dict() for part in self.callbacks]
        net: Any = pl_module.get_submodule("net")
        torch.save({"net": net.state_dict(), "callbacks": states}, f"{self.path}-{trainer.global_rank}.pt")


def fit(folder: Path, name: str, lit: L.LightningModule, rows: DataLoader, *callbacks: Any, **options: Any) -> None:
    """A fit on two processes, or on one where `single`; an error is written down."""
    single, unused = options.pop("single", False), options.pop("unused", False)
    name += "-single" if single else ""
    if not single:
        strategy = DDPStrategy(
            process_group_backend="gloo",
            start_method="fork",
            find_unused_parameters=unused,
            timeout=datetime.timedelta(seconds=60),
        )
        options |= {"strategy": strategy, "devices": 2, "use_distributed_sampler": False}
    kept = [part for part in callbacks if not isinstance(part, ExportCallback)]
    run = trainer(max_epochs=2, callbacks=[*callbacks, Ending(folder / name, *kept)], **options)
    try:
        run.fit(lit, rows)
    except Exception as error:
        (folder / f"{name}.txt").write_text(f"{type(error).__name__}: {error}")


def halves(folder: Path, single: bool) -> None:
    """Two processes and the batches they share; or one that accumulates the same two."""
    more = {"single": True, "accumulate_grad_batches": 2} if single else {}
    callback = QATCallback(oscillation=OSCILLATION, cost_target=COST)
    fit(folder, "halves", Lit(network(NARROW, norm=False)), loader(), callback, FormatLogger(2, table=False), **more)


def alike(folder: Path, single: bool) -> None:
    """Two processes with the same batches; or one."""
    callback = QATCallback(delay=DELAY, oscillation=OSCILLATION, freeze_batch_norm=10, cost_target=COST)
    fit(folder, "alike", Lit(network(LEARNED)), loader(alike=True), callback, single=single, unused=True)


def ranges(folder: Path, single: bool) -> None:
    """WRAP formats, calibrated far too small, follow the range; the weights stand still."""
    more = {"single": True, "accumulate_grad_batches": 2} if single else {}
    net = edgemat.calibrate(network(WRAPPING, norm=False, calibrated=False), [data()[0][:1] * 0.01])
    fit(folder, "ranges", Lit(net, lr=0.0, kind=torch.optim.SGD), loader(), QATCallback(), **more)


def schedules(folder: Path) -> None:
    """Everything at once, on different batches, from a network that was never calibrated."""
    callback = QATCallback(calibration=2, delay=DELAY, oscillation=OSCILLATION, freeze_batch_norm=6)
    exporter = ExportCallback(folder / "export", samples=4)
    fit(folder, "schedules", Lit(network(calibrated=False)), loader(), callback, exporter, unused=True)


def calibration(folder: Path) -> None:
    """Observers see the batches of both processes; nothing is learned."""
    lit = Lit(network(calibrated=False), lr=0.0, kind=torch.optim.SGD)
    fit(folder, "calibration", lit, loader(), QATCallback(calibration=2, freeze_batch_norm=0))


def refusals(folder: Path) -> None:
    """What would let one process wait for the other, or their formats drift apart."""
    fit(folder, "uncalibrated", Lit(network(calibrated=False)), loader(), QATCallback())
    fit(folder, "unused", Lit(), loader(), QATCallback(delay=2))
    fit(folder, "synchronised", Lit(), loader(), QATCallback(), sync_batchnorm=True)
    fit(folder, "failing", Lit(), loader(), ExportCallback(folder / "failing", backends=["nonsense"]))


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for scenario in (halves, alike, ranges):
        scenario(folder, False)
    for scenario in (schedules, calibration, refusals):
        scenario(folder)
    # torch does not fork after autograd has started its threads: one process comes last.
    for scenario in (halves, alike, ranges):
        scenario(folder, True)


if __name__ == "__main__":
    main()
