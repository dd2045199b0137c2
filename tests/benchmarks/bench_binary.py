"""Instructions and bytes of the sign kernels against int8 on emulated Cortex-M4 and RV32IMC.

``python tests/benchmarks/bench_binary.py`` prints the table. Each layer runs three times: bipolar inputs and weights
(XNOR and bit counts), int8 inputs and bipolar weights (additions), int8 inputs and weights (products). Instructions are
counted in the emulator over one call of the run function, packing and epilogue included; they are not cycles. Every
code is compared with the reference's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from edgemat.ops import BY_NAME
from edgemat.ops.cases import constant, tensor
from edgemat.targets.mcu.emulator import MACHINES, emulate, missing
from edgemat.targets.mcu.generator import project
from edgemat.targets.mcu.sample import sample_codes
from tests.mcu.case_graphs import CaseGraph

SAME = {"strides": (1, 1), "pads": (1, 1, 1, 1), "dilations": (1, 1)}
POINT = {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1)}
LAYERS = (
    ("FC 640->128", "Linear", (640,), (128, 640), {}, 640 * 128),
    ("conv 3x3 16->16, 32x32", "Conv", (16, 32, 32), (16, 16, 3, 3), SAME, 9 * 256 * 1024),
    ("conv 3x3 64->64, 8x8", "Conv", (64, 8, 8), (64, 64, 3, 3), SAME, 9 * 64 * 64 * 64),
    ("pointwise 64->64, 25x5", "Conv", (64, 25, 5), (64, 64, 1, 1), POINT, 64 * 64 * 125),
    ("depthwise 3x3 64, 25x5", "Conv", (64, 25, 5), (64, 1, 3, 3), {**SAME, "groups": 64}, 9 * 64 * 125),
)
KINDS = {"XNOR": ("bipolar", "bipolar"), "additions": ("fixed<8,3>", "bipolar"), "int8": ("fixed<8,3>", "fixed<8,1>")}


def graph_of(op: str, x: tuple[int, ...], w: tuple[int, ...], attrs: dict, kind: str) -> CaseGraph:
    """One layer of one kind, its result requantised to bipolar (to int8 behind int8 weights)."""
    x_format, w_format = KINDS[kind]
    rng = np.random.default_rng(1)
    drawn = rng.integers(-128, 128, w)
    weight, codes = constant(w_format, np.where(drawn < 0, -1, 1) if w_format == "bipolar" else drawn)
    graph = CaseGraph("bench")
    data = graph.add_input(tensor(x_format, (None, *x), "x"))
    result = "fixed<8,5,RND,SAT>" if kind == "int8" else "bipolar"
    attrs = {**attrs, "w_format": w_format, "requantize": result}
    graph.output(graph.add(BY_NAME[op], "layer", [data, weight], attrs, {1: codes}))
    return graph


def measure(graph: CaseGraph, machine: str) -> int:
    """Instructions of one run; the codes are compared with the reference's."""
    codes, expected = sample_codes(graph)
    run = emulate(graph, codes, machine, count=True, optimize="2")
    (name,) = graph.outputs
    assert np.array_equal(run.codes[name], expected[name]), f"{machine} differs from the reference"
    assert run.instructions is not None
    return run.instructions


def main() -> int:
    """Print the table."""
    reason = missing()
    if reason is not None:
        print(reason)
        return 1
    print(f"{'layer':24}{'MACs':>10}  {'kernel':10}{'flash':>8}" + "".join(f"{machine:>26}" for machine in MACHINES))
    for name, op, x, w, attrs, macs in LAYERS:
        for kind in KINDS:
            graph = graph_of(op, x, w, attrs, kind)
            row = f"{name:24}{macs:>10,}  {kind:10}{project(graph).weight_bytes:>8,}"
            for machine in MACHINES:
                count = measure(graph, machine)
                row += f"{count:>12,} ({count / macs:.3f} a MAC)"
            print(row, flush=True)
    print("flash: bytes of weights; instructions are counted in an emulator and are not cycles")
    return 0


if __name__ == "__main__":
    sys.exit(main())
