"""`FormatLogger`: every format and its saturation rate to the trainer's loggers, and a table at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from edgemat.errors import EdgematError, FormatError
from edgemat.formats import Fixed
from edgemat.lightning import ranks
from edgemat.lightning.network import Capture, Found, arguments_of, find_network, is_compiled, quantizers
from edgemat.lightning.saturation import measure
from edgemat.nn import prepare_export
from edgemat.nn.arguments import whole

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class FormatRow:
    """What the table says of one quantiser.

    Attributes:
        name: Its name in the network.
        role: ``input``, ``requantize`` or ``weights``.
        format: Its format now.
        start: Its format when the training began, or None where it had no binary point then.
        saturated: Share of the values beyond the rails when last measured, 0 to 1, or None.
        worst: The largest such share of the training, or None.
    """

    name: str
    role: str
    format: Fixed
    start: Fixed | None
    saturated: float | None
    worst: float | None


class FormatLogger(Callback):
    """Logs width, integer and fractional bits and the saturation rate of every quantiser.

    Every `every_n_steps` optimiser steps each logger of the trainer (TensorBoard, CSV, any other) gets, under
    ``formats/<quantiser>/``, ``width``, ``int_bits`` and ``frac_bits``; where they differ by channel, ``..._min``,
    ``..._max`` and ``..._mean``. ``saturated`` is the share of the values (0 to 1) whose rounded code lies beyond the
    rails, measured on that step's last batch with one run of the network in eval mode, so it is the deployed network's;
    its cost is that of a forward pass in `every_n_steps`. Formats in which it cannot be measured have none. In a
    distributed run all processes' batches count.

    Args:
        every_n_steps: Optimiser steps between two logs.
        saturation: Whether saturation is measured.
        table: Whether a table is printed at the end of the training.
        network: Name of the quantised network in the LightningModule; None takes the only one.

    Raises:
        FormatError: if `every_n_steps` is no whole number of at least 1.
    """

    def __init__(
        self, every_n_steps: int = 50, *, saturation: bool = True, table: bool = True, network: str | None = None
    ):
        self.every_n_steps = whole("FormatLogger: every_n_steps", every_n_steps, 1)
        self.saturation = saturation
        self.table = table
        self.network = network
        self._found: Found | None = None
        self._capture = Capture()
        self._start: dict[str, str] = {}
        self._rates: dict[str, tuple[float, float]] = {}
        self._logged = -1

    @property
    def state_key(self) -> str:
        """One state per network."""
        return self._generate_state_key(network=self.network)

    # -- hooks ----------------------------------------------------------------------------------------------------
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the network.

        Raises:
            LoweringError: if the LightningModule holds no quantised network, or several and none is named.
        """
        self._found = find_network(pl_module, self.network)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes note of the formats the training starts from."""
        assert self._found is not None
        if trainer.global_step == 0:
            self._start, self._rates, self._logged = {}, {}, -1
        if not self._start:
            found = quantizers(deployed(self._found))
            self._start = {name: str(part.format) for name, part in found.items() if part.ready}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before a batch that may be measured, waits for the network's arguments."""
        assert self._found is not None
        if self.saturation and self._due(trainer.global_step + 1):
            self._capture.arm(self._found, is_compiled(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs after the optimiser's step."""
        self._capture.disarm()
        step = trainer.global_step
        if self._due(step):
            self._logged = step
            self._log(trainer, batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the table."""
        if self.table and trainer.is_global_zero:
            from rich.console import Console

            Console().print(self.render())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves no hook behind."""
        self._capture.disarm()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves no hook behind."""
        self._capture.disarm()

    def state_dict(self) -> dict[str, Any]:
        """The formats at the start, the saturation rates and the step last logged."""
        return {"start": dict(self._start), "rates": dict(self._rates), "logged": self._logged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues a checkpoint's log."""
        self._start = dict(state_dict["start"])
        self._rates = {name: (float(last), float(worst)) for name, (last, worst) in state_dict["rates"].items()}
        self._logged = int(state_dict["logged"])

    # -- figures --------------------------------------------------------------------------------------------------
    def _due(self, step: int) -> bool:
        return step > 0 and step % self.every_n_steps == 0 and step != self._logged

    def _log(self, trainer: Trainer, batch: Any) -> None:
        assert self._found is not None
        try:
            network = deployed(self._found)
            kept = {name: part.format for name, part in quantizers(network).items() if part.ready}
            figures = {f"formats/{name}/{key}": v for name, fmt in kept.items() for key, v in bits(fmt).items()}
            if self.saturation and len(kept) == len(self._found.quantizers):
                for name, rate in self._measured(trainer, network, batch).items():
                    figures[f"formats/{name}/saturated"] = rate
                    self._rates[name] = rate, max(rate, self._rates.get(name, (0.0, 0.0))[1])
        except FormatError as error:
            rank_zero_warn(f"FormatLogger logs nothing at step {trainer.global_step}: {error}")
            return
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step - 1)  # Lightning numbers steps from 0

    def _measured(self, trainer: Trainer, network: nn.Module, batch: Any) -> dict[str, float]:
        """The saturation rate by quantiser, over the batches of all processes."""
        arguments = self._capture.arguments or arguments_of(network, batch)
        if arguments is None:
            return {}
        counts = measure(network, arguments)
        if not counts:
            return {}
        device = next((t.device for t in arguments.tensors()), torch.device("cpu"))
        both = ranks.total(trainer, torch.tensor(list(counts.values()), dtype=torch.int64, device=device)).tolist()
        return {name: beyond / count for name, (beyond, count) in zip(counts, both, strict=True) if count}

    # -- the table ------------------------------------------------------------------------------------------------
    def rows(self) -> list[FormatRow]:
        """One row for each quantiser that has a binary point, in the order of the network.

        Raises:
            EdgematError: before the trainer has set this callback up.
        """
        if self._found is None:
            raise EdgematError("FormatLogger has no network yet, expected one; pass it to a Trainer and call fit first")
        made = []
        for name, part in quantizers(deployed(self._found)).items():
            if not part.ready:
                continue
            start = Fixed.parse(self._start[name]) if name in self._start else None
            last, worst = self._rates.get(name, (None, None))
            made.append(FormatRow(name, part.role, part.format, start, last, worst))
        return made

    def render(self) -> Table:
        """The rows as a table for the terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title="learned formats", title_justify="left")
        table.add_column("quantiser", overflow="fold")
        for column in ("width", "int", "frac", "at start", "saturated", "worst"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.rows():
            start = "-" if row.start is None else _span(row.start.fracs)
            shares = ("-" if share is None else f"{share:.3%}" for share in (row.saturated, row.worst))
            points = _span(_int_bits(row.format)), _span(row.format.fracs), start
            cells = row.name, _span(_widths(row.format)), *points, *shares
            table.add_row(*(Text(cell) for cell in cells))
        return table


def deployed(found: Found) -> nn.Module:
    """A copy of the network with the formats it would be deployed with; before calibration the network as it is."""
    if all(part.ready for part in found.quantizers.values()):
        return prepare_export(found.network)
    return found.network


def bits(fmt: Fixed) -> dict[str, float]:
    """The figures a logger gets of a format."""
    figures: dict[str, float] = {}
    for key, values in (("width", _widths(fmt)), ("int_bits", _int_bits(fmt)), ("frac_bits", fmt.fracs)):
        if len(values) == 1:
            figures[key] = float(values[0])
        else:
            mean = sum(values) / len(values)
            figures |= {f"{key}_min": float(min(values)), f"{key}_max": float(max(values)), f"{key}_mean": mean}
    return figures


def _widths(fmt: Fixed) -> tuple[int, ...]:
    return fmt.widths if fmt.widths is not None else (fmt.width,)


def _int_bits(fmt: Fixed) -> tuple[int, ...]:
    assert fmt.int_bits is not None
    return fmt.int_bits if isinstance(fmt.int_bits, tuple) else (fmt.int_bits,)


def _span(values: tuple[int, ...]) -> str:
    """``3``, or ``2..5`` where channels differ."""
    return str(values[0]) if min(values) == max(values) else f"{min(values)}..{max(values)}"
