"""Speed of the bit-exact Simulator beside the float32 network on onnxruntime, same run, same threads.

``python -m tests.benchmarks.bench_simulation`` prints the table. The networks and batches are those of the project's
figures: MLP 16-64-32-32-5 on 20,000 samples, the small CNN on 500, ResNet8 on 100; random weights, no training. The two
sides take turns, the fastest turn of each counts; "open" is reading the file, building the fused copy and 20 samples.
With ``EDGEMAT_BENCH_PEERS=1`` hls4ml is installed into a throwaway
environment and its compiled C simulation of the MLP and the CNN is timed as well (g++ needed, some minutes).
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table

import edgemat
from edgemat.sim import reference
from edgemat.sim.arrays import to_codes
from edgemat.sim.session import thread_count
from tests.benchmarks.peer_hls4ml import measure as measure_peer
from tests.networks.models import Mlp, ResNet8, SmallCnn

TURNS, SECONDS = 15, 3.0
PROMISED, GOAL = 0.3, 0.5
CHECKED = 20


@dataclass(frozen=True)
class Case:
    """One network and its batch."""

    name: str
    model: Callable[[], torch.nn.Module]
    shape: tuple[int, ...]
    samples: int


CASES = (
    Case("MLP", Mlp, (16,), 20_000),
    Case("CNN", SmallCnn, (1, 28, 28), 500),
    Case("ResNet8", ResNet8, (3, 32, 32), 100),
)


@dataclass(frozen=True)
class Row:
    """Seconds for the whole batch, by side."""

    case: Case
    bits: int
    float_s: float
    edgemat_s: float
    open_s: float

    @property
    def ratio(self) -> float:
        """Speed as a fraction of the float network's."""
        return self.float_s / self.edgemat_s


def take_turns(sides: list[Callable[[], object]]) -> list[float]:
    """Seconds of the fastest turn of each side, alternating, after one to warm up."""
    best = [float("inf")] * len(sides)
    turn, begin = 0, time.perf_counter()
    while turn <= TURNS or time.perf_counter() - begin < SECONDS:
        for index, side in enumerate(sides):
            start = time.perf_counter()
            side()
            if turn:
                best[index] = min(best[index], time.perf_counter() - start)
        turn += 1
    return best


def float_session(module: torch.nn.Module, x: torch.Tensor, path: Path) -> onnxruntime.InferenceSession:
    """The float32 network on onnxruntime with default settings (and the threads of this run)."""
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), path, dynamo=True, dynamic_shapes=dynamic, external_data=False, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = thread_count()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def measure(case: Case, folder: Path) -> Iterator[Row]:
    """Times one network at 6 and at 8 bits."""
    torch.manual_seed(0)
    module = case.model()
    calibration = torch.rand(64, *case.shape) * 2 - 1
    module.train()
    module(calibration)
    module.eval()
    plain = float_session(module, calibration[:2], folder / "float.onnx")
    for bits in (6, 8):
        yield measure_width(case, module, plain, calibration, bits, folder / "net.onnx")


def measure_width(
    case: Case,
    module: torch.nn.Module,
    plain: onnxruntime.InferenceSession,
    calibration: torch.Tensor,
    bits: int,
    path: Path,
) -> Row:
    """Times one network at one width; refuses to time what is not exact."""
    recipe = edgemat.Recipe(input="fixed<8,1>", weights=f"fixed<{bits}>", activations=f"fixed<{bits}>")
    quantised = edgemat.quantize(module, recipe)
    edgemat.calibrate(quantised, [calibration])
    quantised.eval()
    edgemat.to_onnx(quantised, calibration[:1], path)
    x = np.random.default_rng(1).random((case.samples, *case.shape), dtype=np.float32) * 2 - 1
    start = time.perf_counter()
    simulate = edgemat.Simulator(path)
    found = simulate.codes(x[:CHECKED])
    open_s = time.perf_counter() - start
    wanted = reference.run(simulate.graph, to_codes(simulate.graph, x[:CHECKED], False))
    if not (found == wanted[simulate.graph.outputs[0]]).all():
        raise AssertionError(f"{case.name} at {bits} bits differs from the reference")
    name = plain.get_inputs()[0].name
    float_s, edgemat_s = take_turns([lambda: plain.run(None, {name: x}), lambda: simulate(x)])
    return Row(case, bits, float_s, edgemat_s, open_s)


def main() -> int:
    """Prints the table; exit code 1 where a promise is not kept."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    console = Console()
    title = f"Simulator against the float32 network on onnxruntime {onnxruntime.__version__}, {thread_count()} threads"
    table = Table(title=title)
    for heading in ("network", "bits", "float ms", "edgemat ms", "ratio", "samples/s", "open ms"):
        table.add_column(heading, justify="left" if heading.startswith("network") else "right")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            for row in measure(case, Path(folder)):
                rows.append(row)
                mark = "" if row.ratio >= GOAL else " *" if row.ratio >= PROMISED else " **"
                table.add_row(
                    case.name,
                    str(row.bits),
                    f"{row.float_s * 1e3:.2f}",
                    f"{row.edgemat_s * 1e3:.2f}",
                    f"{row.ratio:.2f}{mark}",
                    f"{case.samples / row.edgemat_s:,.0f}",
                    f"{row.open_s * 1e3:.0f}",
                )
    console.print(table)
    console.print(f"promised: {PROMISED}; * below the goal of {GOAL}, ** below the promise")
    peers(console, rows)
    return 0 if all(row.ratio >= PROMISED for row in rows) else 1


def peers(console: Console, rows: list[Row]) -> None:
    """The ratio to hls4ml's compiled C simulation, or why it was not measured."""
    if os.environ.get("EDGEMAT_BENCH_PEERS") != "1":
        console.print(
            "hls4ml's C simulation: not measured; EDGEMAT_BENCH_PEERS=1 installs it into a throwaway environment"
        )
        return
    found, reason = measure_peer()
    for row in rows:
        speed = found.get(row.case.model.__name__)
        if speed is not None:
            own = row.case.samples / row.edgemat_s
            console.print(
                f"hls4ml's C simulation, {row.case.name}: {speed:,.0f} samples/s; edgemat {own / speed:.0f} times that"
            )
    if reason:
        console.print(f"hls4ml's C simulation: {reason}")


if __name__ == "__main__":
    sys.exit(main())
