"""Compile time, compiler memory and speed of the HLS C simulation, beside hls4ml's in the same run.

``python -m tests.benchmarks hls`` prints the table; ``EDGEMAT_BENCH_PEERS=1`` adds hls4ml (see `peer_hls4ml`). The
networks are the MLP 16-64-32-32-5 and the CNN of the documentation with random weights; 16-bit formats on both sides,
hls4ml's default width.

A second table has the MLP with ternary weights (absmean trits, a quarter of them 0 as uniform weights start), in the
structure and packed, beside ordinary weights of two bits (which may be -2 and are multiplied): compile time and speed
of the simulation, and the modelled hardware.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.peer_hls4ml import CASES, Peer, run_peer

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = {"Mlp": 20000, "SmallCnn": 500}
TERNARY: list[tuple[str, dict[str, str | int]]] = [
    ("fixed<2>", {}),
    ("ternary", {}),
    ("fixed<2>", {"reuse": 16}),
    ("ternary", {"reuse": 16}),
    ("ternary", {"reuse": 16, "packing": "1.6"}),
    ("ternary", {"weights": "axi"}),
    ("ternary", {"weights": "axi", "packing": "1.6"}),
]
WRITE = """
import sys
import torch
import edgemat
from tests.networks import models
name, path = sys.argv[1:3]
torch.manual_seed(0)
module = getattr(models, name)().eval()
example = torch.rand(64, *((16,) if name == "Mlp" else (1, 28, 28))) * 2 - 1
weights, width = (sys.argv[3:] + ["fixed<16>", "16"])[:2]
recipe = edgemat.Recipe(
    input=f"fixed<{width},6>", weights=weights, activations=f"fixed<{width}>", outputs=f"fixed<{width}>"
)
q = edgemat.quantize(module, recipe)
edgemat.calibrate(q, [example])
edgemat.to_onnx(q.eval(), example[:2], path)
"""
# A process that held torch would count its own pages as the compiler's peak.
COMPILE = """
import json, resource, sys, time
import numpy
from edgemat.lower import read
from edgemat.targets.hls.cost import model_cost
from edgemat.targets.hls.plan import Plan
from edgemat.targets.hls.simulation import Simulation
samples, path = int(sys.argv[2]), sys.argv[3]
graph, plan = read(path), Plan(**json.loads(sys.argv[1]))
cost = model_cost(graph, plan)
start = time.perf_counter()
simulation = Simulation(graph, plan)
compile_s = time.perf_counter() - start
peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
tensor = graph.input_type(0)
codes = numpy.random.default_rng(0).integers(-1024, 1024, (samples, *tensor.sample_shape)).clip(tensor.lo, tensor.hi)
best = float("inf")
with simulation:
    for _ in range(3):
        start = time.perf_counter()
        simulation.run({tensor.name: codes})
        best = min(best, time.perf_counter() - start)
figures = {"compile_s": compile_s, "peak_mb": peak_mb, "rate": samples / best}
weights = [call.constant(1) for call in graph.nodes if call.op.name in ("Linear", "Conv")]
figures["zeros"] = sum(int((w == 0).sum()) for w in weights) / sum(w.size for w in weights)
for key in ("ii_cycles", "multipliers", "adders", "adder_luts", "memory_bits", "memory_bytes"):
    figures[key] = getattr(cost, key)
print("RESULT " + json.dumps(figures))
"""


def _ours(name: str, folder: Path, *model: str, **plan: str | int) -> dict[str, float]:
    path = str(folder / "_".join([name, *(str(len(word)) for word in model)])) + ".onnx"
    subprocess.run([sys.executable, "-c", WRITE, name, path, *model], capture_output=True, check=True, cwd=ROOT)
    command = [sys.executable, "-c", COMPILE, json.dumps(plan), str(SAMPLES[name]), path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])


def main() -> None:
    """Prints the table."""
    import tempfile

    peer = (
        run_peer() if os.environ.get("EDGEMAT_BENCH_PEERS") == "1" else Peer(note="EDGEMAT_BENCH_PEERS=1 adds hls4ml")
    )
    table = Table(title="HLS C simulation: edgemat, and edgemat / hls4ml")
    for column in ("network", "io", "compile s", "ratio", "peak MB", "ratio", "samples/s", "ratio"):
        table.add_column(column, justify="left" if column in ("network", "io") else "right")
    with tempfile.TemporaryDirectory() as name:
        for case in CASES:
            ours, theirs = _ours(case[0], Path(name), io=case[1]), peer.cases.get(case, {})
            cells = []
            for key, digits in (("compile_s", 1), ("peak_mb", 0), ("rate", 0)):
                ratio = f"{ours[key] / theirs[key]:.2f}" if key in theirs else "-"
                cells += [f"{ours[key]:,.{digits}f}", ratio]
            table.add_row(*case, *cells)
    console = Console(width=120)
    console.print(table)
    if peer.note:
        console.print(f"hls4ml: {peer.note}", markup=False)
    console.print(ternary_table())


def ternary_table() -> Table:
    """The MLP with ternary weights beside ordinary ones of two bits."""
    import tempfile

    table = Table(title="MLP 16-64-32-32-5, 8-bit codes: C simulation, and modelled hardware (bytes: read from AXI)")
    heads = ("compile s", "samples/s", "II", "multipliers", "adders", "LUTs", "bits", "bytes")
    for column in ("weights", "zeros", "plan", *heads):
        table.add_column(column, justify="left" if column in ("weights", "plan") else "right")
    with tempfile.TemporaryDirectory() as folder:
        for weights, plan in TERNARY:
            found = _ours("Mlp", Path(folder), weights, "8", **plan)
            choice = ", ".join(f"{key} {value}" for key, value in plan.items()) or "unrolled"
            keys = ("ii_cycles", "multipliers", "adders", "adder_luts", "memory_bits", "memory_bytes")
            kind = "ternary" if weights == "ternary" else "2 bits"
            speed = (f"{found['compile_s']:.1f}", f"{found['rate']:,.0f}")
            table.add_row(kind, f"{found['zeros']:.0%}", choice, *speed, *(f"{found[key]:,.0f}" for key in keys))
    return table


if __name__ == "__main__":
    main()
