"""Two CPU processes (gloo): the same network in both, and one process's bits where it must."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import edgemat
from edgemat.errors import UnsupportedOpError
from edgemat.lightning.ranks import check_strategy
from tests.lightning.ddp_program import NARROW, WRAPPING
from tests.lightning.nets import data, network, same

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which every scenario left what it ended with."""
    folder = tmp_path_factory.mktemp("ddp")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.lightning.ddp_program", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def end(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    failed = folder / f"{name}.txt"
    assert not failed.exists(), failed.read_text()
    return torch.load(folder / f"{name}-{rank}.pt", weights_only=True)


@pytest.mark.parametrize("name", ["halves", "alike", "schedules", "ranges", "calibration"])
def test_both_processes_end_alike(name: str, ends: Path) -> None:
    assert same(end(ends, name, 0), end(ends, name, 1))


def test_two_processes_are_one_that_accumulates(ends: Path) -> None:
    """The averaged gradients are the accumulated ones to the bit, so is the penalty, so are frozen weights."""
    two, one = end(ends, "halves"), end(ends, "halves-single")
    assert same(two["net"], one["net"])
    assert same(two["callbacks"][0], one["callbacks"][0])
    assert two["callbacks"][0]["oscillation"]["steps_done"] == 8
    start = network(NARROW, norm=False).state_dict()
    assert not same(two["net"], dict(start))


def test_two_processes_with_the_same_batches_are_one(ends: Path) -> None:
    two, one = end(ends, "alike"), end(ends, "alike-single")
    assert same(two, one)
    assert two["callbacks"][0]["delay"]["steps"] == 16


def test_ranges_are_united(ends: Path) -> None:
    two, one = end(ends, "ranges")["net"], end(ends, "ranges-single")["net"]
    seen = [name for name in one if name.endswith("seen")]
    assert seen
    assert same(two, one)
    small = edgemat.calibrate(network(WRAPPING, norm=False, calibrated=False), [data()[0][:1] * 0.01]).state_dict()
    assert all((one[name].abs() > small[name].abs()).any() for name in seen)


def test_observers_see_all_batches(ends: Path) -> None:
    """The first two batches of each process, in the order of the processes."""
    x = data()[0]
    expected = edgemat.calibrate(network(calibrated=False), [x[i : i + 6] for i in (0, 6, 12, 18)])
    assert same(end(ends, "calibration")["net"], dict(expected.state_dict()))
    fewer = edgemat.calibrate(network(calibrated=False), [x[0:6], x[12:18]])  # the control: one process's
    assert not same(dict(fewer.state_dict()), dict(expected.state_dict()))


def test_saturation_counts_both_processes(ends: Path) -> None:
    """Of the input quantiser, fixed<8,1>, by hand: the last step's batches are the last twelve samples."""
    codes = (data()[0][-12:].double() * 128 + 0.5).floor()
    beyond = int(((codes > 127) | (codes < -128)).sum())
    rate, worst = end(ends, "halves", 1)["callbacks"][1]["rates"]["input_1_quantizer"]
    assert rate == beyond / codes.numel()
    assert worst >= rate > 0.0


def test_strategies_that_split_parameters_are_refused() -> None:
    with pytest.raises(UnsupportedOpError, match="the strategy is SimpleNamespace, which may split parameters"):
        check_strategy(SimpleNamespace(strategy=SimpleNamespace()))  # type: ignore[arg-type]


def test_the_first_process_exports(ends: Path) -> None:
    assert edgemat.verify(ends / "export" / "net.onnx", samples=4, backends=["onnx"]).ok


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "uncalibrated",
            "2 processes would each take their own first batch, expected one for all; pass QATCallback(ca",
        ),
        ("unused", "got no gradient, as delayed formats do, which DDP must be told; use Trainer(strategy='ddp_find_"),
        ("synchronised", "sync_batchnorm=True, which does not reach batch norms folded into quantised layers"),
        ("failing", "nonsense"),
    ],
)
def test_refusals_end_both_processes(name: str, message: str, ends: Path) -> None:
    assert message in (ends / f"{name}.txt").read_text()
