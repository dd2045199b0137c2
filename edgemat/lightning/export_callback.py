"""`ExportCallback`: the lowered file and the targets' projects, verified before they are kept."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from edgemat.errors import EdgematError, ParityError
from edgemat.exporting import TARGETS, export
from edgemat.lightning import ranks
from edgemat.lightning.network import Arguments, Capture, Found, find_network, is_compiled
from edgemat.lightning.network import arguments_of as arguments_of_batch
from edgemat.lower import read, to_onnx
from edgemat.nn.arguments import place, whole
from edgemat.verification.report import Report
from edgemat.verification.verify import verify

FILE, REPORT = "net.onnx", "verify.json"
MOMENTS = ("end", "best")


class ExportCallback(Callback):
    """Writes ``<folder>/net.onnx``, ``verify.json`` and the projects asked for, all or nothing.

    Everything is written beside the folder first, verified, and then takes the folder's place; where a backend computes
    other integers nothing is kept and `ParityError` names the node. In a distributed run the first process writes and
    the others wait; an error is raised in all of them. The network, its modes and the random numbers stay as they are,
    so training goes on with the same bits.

    Attributes:
        path: The lowered file last written, or None.
        report: What its verification found (first process only), or None.

    Args:
        folder: Folder to write; it may hold nothing but an earlier export.
        when: ``"end"`` exports once, at the end of the training; ``"best"`` each time a `ModelCheckpoint` with a
            `monitor` has saved a new best checkpoint: exactly the checkpoint's weights.
        targets: ``"hls"``, ``"mcu"``, or a mapping of them to the options of `edgemat.export`.
        backends: What verifies, besides torch; None takes reference, onnx and the targets.
        samples: Samples compared, of those the network was called with; corner vectors come on top.
        example_input: What the network takes, as in `edgemat.to_onnx`; None takes what the network was called with
            first, or else the LightningModule's `example_input_array`.
        network: Name of the quantised network in the LightningModule; None takes the only one.

    Raises:
        EdgematError: for an unknown moment or target, or a setting of another type.
    """

    def __init__(
        self,
        folder: str | Path = "export",
        when: str = "end",
        *,
        targets: Sequence[str] | Mapping[str, Mapping[str, Any]] = (),
        backends: Sequence[str] | None = None,
        samples: int = 64,
        example_input: Any = None,
        network: str | None = None,
    ):
        if when not in MOMENTS:
            raise EdgematError(f"ExportCallback: when is {when!r}, expected one of {', '.join(MOMENTS)}")
        named = (targets,) if isinstance(targets, str) else targets
        if not isinstance(named, Iterable):
            raise EdgematError(f"ExportCallback: targets is {targets!r}, expected names out of {', '.join(TARGETS)}")
        self.targets = dict(named) if isinstance(named, Mapping) else {target: {} for target in named}
        for target, options in self.targets.items():
            if target not in TARGETS:
                raise EdgematError(f"ExportCallback: target is {target!r}, expected one of {', '.join(TARGETS)}")
            if not isinstance(options, Mapping):
                raise EdgematError(
                    f"ExportCallback: the options of {target!r} are {options!r}, expected a dict of edgemat.export's"
                )
        if backends is not None and (isinstance(backends, str) or not isinstance(backends, Iterable)):
            raise EdgematError(f"ExportCallback: backends is {backends!r}, expected a list such as ['onnx', 'mcu']")
        self.folder = place("ExportCallback: folder", folder)
        self.when = when
        self.backends = tuple(backends) if backends is not None else ("reference", "onnx", *self.targets)
        self.samples = whole("ExportCallback: samples", samples, 1)
        self.example_input = example_input
        self.network = network
        self.path: Path | None = None
        self.report: Report | None = None
        self._found: Found | None = None
        self._capture = Capture()
        self._seen: Arguments | None = None
        self._best: tuple[str, float | None] | None = None
        self._pending: Mapping[str, Tensor] | None = None

    # -- hooks ----------------------------------------------------------------------------------------------------
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the network, waits for its first arguments, and refuses what would fail only at the end.

        Raises:
            LoweringError: if the LightningModule holds no quantised network, or several and none is named.
            EdgematError: if the folder holds other things, or nothing says which checkpoint is best.
        """
        self._found = find_network(pl_module, self.network)
        ranks.check_strategy(trainer)
        check_folder(self.folder)
        if self.when == "best" and _monitoring(trainer) is None:
            raise EdgematError(
                "ExportCallback(when='best') found no checkpoint callback that monitors anything, expected one; add "
                "ModelCheckpoint(monitor='...') to the trainer's callbacks"
            )
        self._seen = None
        if self.example_input is None:
            self._capture.arm(self._found, is_compiled(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes note of the best checkpoint of the training that is resumed."""
        monitor = _monitoring(trainer)
        self._best = None if monitor is None else _best(monitor)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Writes the best checkpoint before the weights move on."""
        self._write_pending(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes note of a few samples."""
        assert self._found is not None
        if self._seen is None:
            given = self._capture.arguments or arguments_of_batch(self._found.network, batch)
            self._seen = None if given is None else given.first(self.samples)
            self._capture.disarm()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notices a new best checkpoint; it is exported as soon as it is written."""
        monitor = _monitoring(trainer)
        if self.when != "best" or monitor is None:
            return
        best = _best(monitor)
        if best[0] and best != self._best:
            self._best = best
            self._pending = checkpoint["state_dict"]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports the trained weights."""
        if self.when == "end":
            assert self._found is not None
            self._write(trainer, pl_module, self._found.network)
        else:
            self._write_pending(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports a best checkpoint that was saved when the training ended."""
        self._write_pending(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves no hook behind."""
        self._capture.disarm()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves no hook behind."""
        self._capture.disarm()

    # -- writing --------------------------------------------------------------------------------------------------
    def _write_pending(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state, self._pending = self._pending, None
        if state is None:
            return
        found = self._found
        assert found is not None
        self._write(trainer, pl_module, _restored(pl_module, found, state) if trainer.is_global_zero else found.network)

    def _write(self, trainer: Trainer, pl_module: LightningModule, network: nn.Module) -> None:
        error: EdgematError | None = None
        if trainer.is_global_zero:
            try:
                with isolate_rng():
                    self.report = self._export(network, self._arguments(pl_module))
            except EdgematError as failed:
                error = failed
        ranks.raise_together(trainer, error)
        self.path = self.folder / FILE

    def _arguments(self, pl_module: LightningModule) -> Arguments:
        example = self.example_input
        if example is None and self._seen is not None:
            return self._seen
        if example is None:
            example = pl_module.example_input_array
        if example is None:
            raise EdgematError(
                "ExportCallback saw no input of the network, expected one; pass example_input= or set "
                "example_input_array on the LightningModule"
            )
        if isinstance(example, Tensor):
            return Arguments((example,))
        return Arguments((), dict(example)) if isinstance(example, Mapping) else Arguments(tuple(example))

    def _export(self, network: nn.Module, arguments: Arguments) -> Report:
        """Writes, verifies and publishes.

        Raises:
            ParityError: if a backend computes other integers.
            EdgematError: if the folder holds other things, or the network cannot be exported.
        """
        check_folder(self.folder)
        copied = copy.deepcopy(network).to("cpu").eval()
        example: Any = arguments.kwargs or arguments.args
        if arguments.kwargs and arguments.args:
            raise EdgematError(
                "ExportCallback saw the network called with inputs by position and by name, expected one of the two; "
                "pass example_input="
            )
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{self.folder.name}-", dir=self.folder.parent) as scratch:
            staging = Path(scratch) / "new"
            staging.mkdir()
            file = staging / FILE
            to_onnx(copied, example, file)
            for target, options in self.targets.items():
                export(file, target, staging / target, **options)
            report = verify(file, _samples(file, arguments, self.samples), backends=self.backends, module=copied)
            if not report.ok:
                raise ParityError(_difference(report, self.folder))
            (staging / REPORT).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
            _publish(staging, self.folder, Path(scratch) / "old")
        return report


def check_folder(folder: Path) -> None:
    """Refuses a folder that holds anything but an earlier export.

    Raises:
        EdgematError: if it is a file, or holds other things.
    """
    if not folder.exists():
        return
    known = {FILE, REPORT, *TARGETS}
    strange = sorted(entry.name for entry in folder.iterdir() if entry.name not in known) if folder.is_dir() else ["."]
    here = Path.cwd().resolve()
    if strange or folder.resolve() in (here, *here.parents):
        what = f"holds {strange[0]!r}" if strange and strange[0] != "." else "is a file or the current folder"
        raise EdgematError(f"ExportCallback: {folder} {what}, expected a folder for exports alone; name a new one")


def _publish(staging: Path, folder: Path, aside: Path) -> None:
    """Puts `staging` into the folder's place; the earlier export comes back if that fails."""
    if not folder.exists():
        staging.rename(folder)
        return
    folder.rename(aside)
    try:
        staging.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _samples(file: Path, arguments: Arguments, count: int) -> dict[str, np.ndarray]:
    """The arguments by the names of the file's inputs; an input the network does not use has none."""
    names = read(file).input_names
    if arguments.kwargs:
        found = {name: arguments.kwargs[name] for name in names}
    else:
        found = dict(zip(names, arguments.tensors(), strict=True))
    return {name: value[:count].detach().cpu().float().numpy() for name, value in found.items()}


def _difference(report: Report, folder: Path) -> str:
    first = report.first_mismatch
    if first is None:
        return f"the export to {folder} could not be compared with anything, expected backends that run; name others"
    return (
        f"node {first.node!r}: backend {first.backend} computes {first.found} at {first.index}, expected "
        f"{first.expected}; the export to {folder} was not kept"
    )


def _monitoring(trainer: Trainer) -> ModelCheckpoint | None:
    """The first checkpoint callback that knows what is best."""
    kept = (part for part in trainer.checkpoint_callbacks if isinstance(part, ModelCheckpoint))
    return next((part for part in kept if part.monitor is not None), None)


def _best(monitor: ModelCheckpoint) -> tuple[str, float | None]:
    score = monitor.best_model_score
    return monitor.best_model_path, None if score is None else float(score)


def _restored(pl_module: LightningModule, found: Found, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the network with the weights of a checkpoint of its LightningModule."""
    made = copy.deepcopy(found.network)
    holder = next(name for name, part in pl_module.named_modules() if part is found.network)
    prefix = f"{holder}." if holder else ""
    with torch.no_grad():
        made.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return made
