"""Time and memory of lowering and simulating MatMul-free language models with random weights, up to 370M parameters.

``python -m tests.benchmarks scale`` prints the table for the small sizes; ``EDGEMAT_BENCH_SCALE=10M,40M,100M,370M``
chooses them. 370M is the published configuration (arXiv 2406.02528: 24 layers, d = 1024, 32,000 tokens) and wants
8 GB of memory and some minutes.

Every stage is a process of its own, so that its peak (VmHWM, set back to what is resident before the stage) is of that
stage alone. *Packed* counts 2 bits for each trit, the embedding at its 16 bits, gains and tables at theirs. Memory of
lowering is the peak of `to_onnx` beyond what the process held before: the float model and torch with its exporter,
which has lowered a tiny model already. Memory of simulation is the peak of `edgemat.Simulator` and its steps beyond a
process that has simulated a tiny model; torch is not loaded there. The float model of the same shapes runs under torch,
its memory is counted in the same way. Formats come from `edgemat.calibrate` on one sequence of four random tokens:
trits follow from the weights alone, what is measured is where the activations lie.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

STEPS = 8
MIB = 1 << 20


@dataclass(frozen=True)
class Size:
    """A configuration."""

    vocabulary: int
    dim: int
    layers: int


SIZES = {
    "1M": Size(256, 128, 3),
    "10M": Size(4000, 256, 9),
    "40M": Size(8000, 512, 10),
    "100M": Size(16000, 768, 12),
    "370M": Size(32000, 1024, 24),
}
TINY = Size(16, 16, 1)


# -- what a process measures of itself ----------------------------------------------------------------------------
def status() -> dict[str, int]:
    """Bytes by the names that /proc/self/status has for them."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    pairs = (line.split(":") for line in lines if line.startswith(("VmHWM", "VmRSS", "RssAnon", "RssFile")))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def measured(task: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a task, its peak and what stays resident, in bytes beyond what the process held before."""
    before = status()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    wall, processor = time.perf_counter(), time.process_time()
    task()
    made = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
    after = status()
    made["peak"] = after["VmHWM"] - before["VmRSS"]
    made["resident"] = after["VmRSS"] - before["VmRSS"]
    made["anonymous"] = after["RssAnon"] - before["RssAnon"]
    return made


def model(size: Size):  # type: ignore[no-untyped-def]
    """A `MatMulFreeLM` with random weights, in eval mode, without formats."""
    import torch

    from edgemat.nn import MatMulFreeLM

    torch.manual_seed(0)
    return MatMulFreeLM(size.vocabulary, size.dim, size.layers).eval()


def calibrate(module, size: Size) -> None:  # type: ignore[no-untyped-def]
    """Formats by one sequence of four random tokens."""
    import torch

    import edgemat

    edgemat.calibrate(module, [torch.randint(0, size.vocabulary, (1, 4))])
    module.eval()


def lower(size: Size, path: str) -> dict[str, Any]:
    """Builds and lowers a model; where its weights go to is left to the default, but for the tiny ones."""
    import torch

    import edgemat
    from edgemat.lower import from_torch

    torch.set_num_threads(1)
    example = (torch.zeros(1, dtype=torch.int64),)
    tiny = model(TINY)
    calibrate(tiny, TINY)
    edgemat.to_onnx(tiny, example, f"{path}.tiny", external_data=True)
    held: list[Any] = []
    made: dict[str, Any] = {"build": measured(lambda: held.append(model(size)))}
    module = held[0]
    made["calibrate"] = measured(lambda: calibrate(module, size))
    made["parameters"] = sum(parameter.numel() for parameter in module.parameters())
    tracing, traced = from_torch.traced, []

    def timed(*arguments: Any) -> Any:
        began = time.process_time()
        found = tracing(*arguments)
        traced.append(time.process_time() - began)
        return found

    from_torch.traced = timed
    made["lower"] = measured(lambda: edgemat.to_onnx(module, example, path, external_data=True))
    made["trace"] = traced[0]
    files = [file for file in Path(path).parent.iterdir() if file.name.startswith(Path(path).name)]
    made["file"] = sum(file.stat().st_size for file in files if ".tiny" not in file.name)
    module.reset()
    made["logits"] = module.step(torch.tensor([3]))[0, :64].tolist()
    return made


def packed_bytes(graph) -> int:  # type: ignore[no-untyped-def]
    """Bytes of a graph's constants at the widths of their formats: two bits for a trit."""
    seen: dict[str, int] = {}
    for call in graph.nodes:
        for index in call.constants:
            keys = {1: ("w_format", "table_format", "y_format", "slope_format"), 2: ("b_format",)}.get(index, ())
            stated = next((call.format_attr(key).storage_width for key in keys if call.attrs.get(key)), 32)
            size = 1
            for extent in call.x[index].shape:
                size *= int(extent)
            seen[call.inputs[index]] = (size * stated + 7) // 8
    return sum(seen.values())


def simulate(size: Size, path: str) -> dict[str, Any]:
    """Opens a file and runs steps, without torch."""
    import numpy as np

    import edgemat

    edgemat.Simulator(f"{path}.tiny")(np.array([3]))
    held: list[Any] = []

    def open_file() -> None:
        simulator = edgemat.Simulator(path)
        held.append((simulator, simulator(np.array([3]))))

    def steps() -> None:
        for token in range(STEPS):
            held[0][0](np.array([token]))

    made: dict[str, Any] = {"open": measured(open_file), "steps": measured(steps)}
    simulator, logits = held[0]
    made["packed"] = packed_bytes(simulator.graph)
    made["logits"] = logits[0, :64].tolist()
    assert size.vocabulary == logits.shape[1] and "torch" not in sys.modules
    return made


def float_model(size: Size) -> dict[str, Any]:
    """The float model of the same shapes under torch, one token at a time."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    hidden = -(-8 * size.dim // (3 * 256)) * 256
    held: list[Any] = []

    def build() -> None:
        blocks = []
        for _ in range(size.layers):
            sizes = [(size.dim, size.dim)] * 4 + [(size.dim, hidden)] * 2 + [(hidden, size.dim)]
            blocks.append([nn.Linear(a, b, bias=False) for a, b in sizes])
        held.append((nn.Embedding(size.vocabulary, size.dim), blocks, nn.Linear(size.dim, size.vocabulary, bias=False)))

    @torch.no_grad()
    def steps() -> None:
        embedding, blocks, head = held[0]
        states = [torch.zeros(1, size.dim) for _ in blocks]
        for token in range(STEPS):
            x = embedding(torch.tensor([token]))
            for index, (f, c, g, o, gate, up, down) in enumerate(blocks):
                y = nn.functional.rms_norm(x, (size.dim,))
                forget = f(y).sigmoid()
                states[index] = forget * states[index] + (1 - forget) * nn.functional.silu(c(y))
                x = x + o(nn.functional.rms_norm(g(y).sigmoid() * states[index], (size.dim,)))
                y = nn.functional.rms_norm(x, (size.dim,))
                x = x + down(nn.functional.silu(gate(y)) * up(y))
            head(x)

    nn.Linear(16, 16)(torch.zeros(1, 16))
    return {"build": measured(build), "steps": measured(steps)}


STAGES = {"lower": lower, "simulate": simulate, "float": lambda size, _: float_model(size)}


def stage(name: str, size: str, path: Path) -> dict[str, Any]:
    """What a stage measured in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_scale", name, size, str(path)]
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if run.returncode:
        raise RuntimeError(f"{name} {size}: {run.stderr.strip().splitlines()[-1:]}")
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def row(name: str, folder: Path) -> tuple[str, ...]:
    """The line of a size."""
    path = folder / f"{name}.onnx"
    made, ran, plain = stage("lower", name, path), stage("simulate", name, path), stage("float", name, path)
    if ran["logits"] != made["logits"]:
        raise AssertionError(f"{name}: the simulator's logits differ from torch's")
    packed = ran["packed"]
    floats = plain["build"]["resident"] + plain["steps"]["peak"]
    peak = max(ran["open"]["peak"], ran["open"]["resident"] + ran["steps"]["peak"])
    resident = ran["open"]["resident"] + ran["steps"]["resident"]
    return (
        f"{made['parameters'] / 1e6:.1f}M",
        f"{packed / MIB:.1f}",
        f"{made['build']['processor']:.1f}",
        f"{made['calibrate']['processor']:.1f}",
        f"{made['lower']['processor']:.0f} ({made['trace']:.0f})",
        f"{made['file'] / MIB:.0f}",
        f"{made['lower']['peak'] / MIB:.0f}",
        f"{made['lower']['peak'] / packed:.2f}",
        f"{ran['open']['processor']:.1f}",
        f"{peak / MIB:.0f}",
        f"{peak / packed:.2f}",
        f"{resident / MIB:.0f}",
        f"{ran['steps']['processor'] / STEPS:.3f}",
        f"{floats / MIB:.0f}",
        f"{plain['steps']['processor'] / STEPS:.3f}",
        f"{resident / floats:.3f}",
    )


COLUMNS = (
    "parameters",
    "packed MiB",
    "build s",
    "formats s",
    "lower s (torch.export)",
    "files MiB",
    "lowering MiB",
    "/ packed",
    "open s",
    "simulation MiB",
    "/ packed",
    "kept MiB",
    "s/token",
    "float MiB",
    "s/token",
    "kept / float",
)


def main() -> None:
    """Prints the table."""
    names = os.environ.get("EDGEMAT_BENCH_SCALE", "1M,10M").split(",")
    unknown = [name for name in names if name not in SIZES]
    if unknown:
        sys.exit(f"EDGEMAT_BENCH_SCALE names {unknown[0]!r}, expected some of {', '.join(SIZES)}")
    table = Table(title="lowering and simulation by size; processor seconds, one thread")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            cells = row(name, Path(folder))
            table.add_row(*cells)
            print(f"{name}: {', '.join(f'{c} {v}' for c, v in zip(COLUMNS, cells, strict=True))}", flush=True)
            for file in Path(folder).iterdir():
                file.unlink()
    Console(width=200).print(table)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(STAGES[sys.argv[1]](SIZES[sys.argv[2]], sys.argv[3])))
    else:
        main()
