"""`FormatLogger`: the right figures, in any logger, without touching the training."""

from __future__ import annotations

import csv
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import edgemat
from edgemat import formats
from edgemat.errors import EdgematError
from edgemat.formats import OVERFLOWS, ROUNDINGS, Fixed
from edgemat.lightning import FormatLogger, QATCallback
from edgemat.lightning.format_logger import bits
from edgemat.lightning.saturation import count_saturated
from tests.lightning.nets import Lit, data, loader, network, same, trainer

NARROW = edgemat.Recipe(input="fixed<8,1>", weights="fixed<3>", activations="fixed<5>")


def events(folder: Path) -> dict[str, dict[int, float]]:
    """The scalars of TensorBoard's event files, by tag and step."""
    from tensorboardX.proto import event_pb2

    found: dict[str, dict[int, float]] = {}
    for path in folder.rglob("events.out.tfevents.*"):
        blob = path.read_bytes()
        while blob:
            (length,) = struct.unpack("<Q", blob[:8])
            event = event_pb2.Event.FromString(blob[12 : 12 + length])
            blob = blob[16 + length :]
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "lightning_logs" / "version_0" / "metrics.csv").open()))


def fit(lit: Lit, *callbacks: Any, **options: Any) -> FormatLogger:
    logger = FormatLogger(4)
    trainer(max_epochs=2, callbacks=[logger, *callbacks], **options).fit(lit, loader())
    return logger


def test_every_logger_gets_every_format(tmp_path: Path) -> None:
    lit = Lit(network(NARROW))
    fit(lit, logger=[CSVLogger(tmp_path), TensorBoardLogger(tmp_path / "board")])
    board, table = events(tmp_path / "board"), [row for row in rows(tmp_path) if row["step"] in ("3", "7")]
    assert len(table) == 2
    quantizers = {n: p for n, p in lit.net.named_modules() if isinstance(p, edgemat.nn.FixedQuantizer)}
    assert len(quantizers) == 4
    for name, part in quantizers.items():
        expected = bits(part.format)
        assert {"width"} < set(expected)
        for key, value in expected.items():
            tag = f"formats/{name}/{key}"
            assert board[tag][7] == np.float32(value) and float(table[1][tag]) == value
        assert 0.0 <= float(table[1][f"formats/{name}/saturated"]) <= 1.0
    assert {step for steps in board.values() for step in steps} == {3, 7}


def test_the_input_saturates_as_counted_by_hand(tmp_path: Path) -> None:
    logger = fit(Lit(network(NARROW)), logger=CSVLogger(tmp_path))
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1)).tolist()  # of the second epoch
    codes = np.floor(data()[0][order[36:]].numpy().astype(np.float64) * 128 + 0.5)
    share = ((codes > 127) | (codes < -128)).mean()
    assert float(rows(tmp_path)[1]["formats/input_1_quantizer/saturated"]) == share
    row = next(row for row in logger.rows() if row.name == "input_1_quantizer")
    assert row.saturated == share and row.worst is not None and row.worst >= share > 0


def test_logging_does_not_touch_the_training() -> None:
    with_it, without = Lit(network(NARROW)), Lit(network(NARROW))
    fit(with_it)
    trainer(max_epochs=2).fit(without, loader())
    assert same(with_it.state_dict(), without.state_dict())
    assert not any(part._forward_pre_hooks for part in with_it.modules())


def test_a_step_of_several_batches_is_measured_once(tmp_path: Path) -> None:
    fit(Lit(network(NARROW)), logger=CSVLogger(tmp_path), accumulate_grad_batches=2)
    assert [row["step"] for row in rows(tmp_path)] == ["3"]


def test_nothing_is_measured_where_nothing_is_asked(tmp_path: Path) -> None:
    lit, run = Lit(network(NARROW)), FormatLogger(4, saturation=False, table=False)
    trainer(max_epochs=2, callbacks=[run], logger=CSVLogger(tmp_path)).fit(lit, loader())
    assert not any(name.endswith("saturated") for name in rows(tmp_path)[0])
    assert all(row.saturated is None for row in run.rows())


def test_the_table_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    lit = Lit(network(NARROW), lr=0.5)
    logger = fit(lit)
    printed = capsys.readouterr().out
    assert "learned formats" in printed and "5.weight_quantizer" in printed
    row = next(row for row in logger.rows() if row.name == "5.weight_quantizer")
    assert row.format == lit.net.get_submodule("5.weight_quantizer").format
    assert row.start != row.format and row.start is not None and row.start.width == 3


def test_a_delayed_network_is_measured_as_deployed(tmp_path: Path) -> None:
    fit(Lit(network(NARROW)), QATCallback(delay=100), logger=CSVLogger(tmp_path))
    assert float(rows(tmp_path)[0]["formats/input_1_quantizer/saturated"]) > 0.0


def test_settings() -> None:
    with pytest.raises(EdgematError, match="every_n_steps is 0, expected a whole number of at least 1"):
        FormatLogger(0)
    for value in ("a", None, 1.5):
        with pytest.raises(EdgematError, match=f"every_n_steps is {value!r}, expected a whole number"):
            FormatLogger(value)
    with pytest.raises(EdgematError, match="has no network yet"):
        FormatLogger().rows()


def test_figures_of_formats() -> None:
    assert bits(Fixed.parse("fixed<8,3>")) == {"width": 8, "int_bits": 3, "frac_bits": 5}
    assert bits(Fixed.parse("fixed<[6,3,0],[1,2,3],RND,SAT>")) == {
        "width_min": 0, "width_max": 6, "width_mean": 3, "int_bits_min": 1, "int_bits_max": 3, "int_bits_mean": 2,
        "frac_bits_min": -3, "frac_bits_max": 5, "frac_bits_mean": 1,
    }  # fmt: skip


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("signed", [True, False])
def test_saturation_is_where_a_wider_format_differs(rounding: str, overflow: str, signed: bool) -> None:
    """Against the definition: 4 bits saturate where 16 bits of the same grid give a code beyond their rails."""
    fmt = Fixed(4, 2, signed, rounding, overflow)
    wide = Fixed(16, 14, True, rounding, "SAT")
    x = np.arange(-80, 80, dtype=np.float64) / 16
    codes = formats.quantize(x, wide)
    low, high = fmt.rails
    beyond = int(((codes < low) | (codes > high)).sum())
    for values in (torch.from_numpy(x).float(), torch.from_numpy(x), torch.from_numpy(x).bfloat16()):
        assert count_saturated(values, fmt) == (beyond, 160)
    channels = Fixed(4, (2, 2), signed, rounding, overflow)  # another path
    assert count_saturated(torch.from_numpy(x).view(80, 2), channels) == (beyond, 160)
    assert 0 < beyond < 160


def test_saturation_by_channel_leaves_out_pruned_channels() -> None:
    fmt = Fixed.parse("fixed<[6,3,0],[1,2,3],RND,SAT>")
    x = torch.tensor([[0.99, 1.8, 9.0], [0.5, 1.7, 0.0], [-1.0, -2.5, 5.0]])
    assert count_saturated(x, fmt, axis=1) == (3, 6)
    assert count_saturated(x.t(), fmt, axis=0) == (3, 6)
    assert count_saturated(x, Fixed.parse("bipolar")) == (0, 0)
