"""Instructions of the generated portable C on emulated Cortex-M4 and RV32IMC.

``python tests/benchmarks/bench_mcu.py`` prints the table; ``--khot`` the one of weights that are sums of 1, 2 and 3
signed powers of two, multiplied by shifts and additions, against the same layers with products; ``--ternary`` the one
of weights -1, 0 and +1 in 2 and in 1.6 bits against 8, with the bytes of flash. The layers are those
of the published CMSIS-NN measurements in the documentation; instructions are counted in the emulator over one call of
the run function, everything included. They are instructions, not cycles.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from edgemat.op import Tensor
from edgemat.ops import BY_NAME
from edgemat.ops.cases import constant, random_codes, tensor
from edgemat.signed_digits import project as project_digits
from edgemat.targets.mcu.emulator import MACHINES, WITHOUT_MULTIPLIER, emulate, missing
from edgemat.targets.mcu.generator import project
from edgemat.targets.mcu.library import Project
from edgemat.targets.mcu.sample import sample_codes
from edgemat.trits import PER_BYTE
from tests.mcu.case_graphs import CaseGraph

CMSIS_NN = {"FC 640->128": 0.51, "conv 3x3 16->16, 32x32": 0.43, "pointwise 64->64, 25x5": 0.48}
CMSIS_NN["depthwise 3x3 64, 25x5"] = 0.12
CMSIS_NN_4_BITS = {"FC 640->128": 0.25}
"""Multiplications per instruction on M4 as measured with CMSIS-NN's own assembly, at 8 and at 4 bits a weight."""


@dataclass(frozen=True)
class Layer:
    """One row: a graph of one node, its multiplications, and its library if options were given."""

    name: str
    graph: CaseGraph
    macs: int
    planned: Project | None = None


def layers(khot: int | None = None) -> list[Layer]:
    """The layers of the table, int8 in, int8 weights, requantised to int8 (RND, SAT).

    Args:
        khot: Largest number of signed powers of two of a weight; None for any weights.
    """
    stated = {} if khot is None else {"khot": khot}
    made = [_layer("FC 640->128", "Linear", (640,), (128, 640), stated, 640 * 128)]
    same = {"strides": (1, 1), "pads": (1, 1, 1, 1), "dilations": (1, 1), **stated}
    point = {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1), **stated}
    made.append(_layer("conv 3x3 16->16, 32x32", "Conv", (16, 32, 32), (16, 16, 3, 3), same, 9 * 256 * 1024))
    made.append(_layer("pointwise 64->64, 25x5", "Conv", (64, 25, 5), (64, 64, 1, 1), point, 64 * 64 * 125))
    depthwise = {**same, "groups": 64}
    made.append(_layer("depthwise 3x3 64, 25x5", "Conv", (64, 25, 5), (64, 1, 3, 3), depthwise, 9 * 64 * 125))
    return made


def _layer(name: str, op: str, x: tuple[int, ...], w: tuple[int, ...], attrs: dict, macs: int) -> Layer:
    graph = CaseGraph("bench")
    data: Tensor = graph.add_input(tensor("fixed<8,3>", (None, *x), "x"))
    w_format = attrs.get("w_format", "fixed<8,1>")
    codes = random_codes(w_format, w, 1)
    if "khot" in attrs:
        codes = project_digits(codes.astype(np.float64), -128, 127, attrs["khot"])
    weight, codes = constant(w_format, codes)
    b_format = "fixed<24,12>" if w_format == "fixed<8,1>" else "fixed<24,17>"
    bias, bias_codes = constant(b_format, np.arange(w[0]) * 7 - 50, "b")
    attrs = {**attrs, "w_format": w_format, "requantize": "fixed<8,5,RND,SAT>"}
    y = graph.add(BY_NAME[op], "layer", [data, weight, bias], attrs, {1: codes, 2: bias_codes})
    graph.output(y)
    return Layer(name, graph, macs)


def measure(layer: Layer, machine: str, optimize: str = "2") -> int:
    """Instructions of one run; the codes are compared with the reference's."""
    codes, expected = sample_codes(layer.graph)
    run = emulate(layer.planned or layer.graph, codes, machine, count=True, optimize=optimize)
    (name,) = layer.graph.outputs
    assert np.array_equal(run.codes[name], expected[name]), f"{layer.name} on {machine} differs from the reference"
    assert run.instructions is not None
    return run.instructions


def ternary_layers() -> list[Layer]:
    """The same with weights -1, 0 and +1 (a third each), and a wider fully connected one; depthwise is not packed."""
    stated = {"w_format": "fixed<2,0,RND,SAT_SYM>"}
    same = {"strides": (1, 1), "pads": (1, 1, 1, 1), "dilations": (1, 1), **stated}
    point = {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1), **stated}
    return [
        _layer("FC 640->128", "Linear", (640,), (128, 640), stated, 640 * 128),
        _layer("FC 640->512", "Linear", (640,), (512, 640), stated, 640 * 512),
        _layer("conv 3x3 16->16, 32x32", "Conv", (16, 32, 32), (16, 16, 3, 3), same, 9 * 256 * 1024),
        _layer("pointwise 64->64, 25x5", "Conv", (64, 25, 5), (64, 64, 1, 1), point, 64 * 64 * 125),
    ]


def ternary_table() -> None:
    """Multiplications per instruction, flash and arena: packed ternary weights against 8 bits a weight."""
    eight = {
        layer.name: layer for layer in [*layers(), _layer("FC 640->512", "Linear", (640,), (512, 640), {}, 327680)]
    }
    print(f"{'layer':26}{'weights':>10}{'flash':>9}{'arena':>8}" + "".join(f"{m:>22}" for m in MACHINES))
    for layer in ternary_layers():
        rows = [
            ("int8", project(eight[layer.name].graph)),
            *((b, project(layer.graph, ternary_packing=b)) for b in PER_BYTE),
        ]
        for name, made in rows:
            graph = eight[layer.name].graph if name == "int8" else layer.graph
            counts = [measure(Layer(layer.name, graph, layer.macs, made), machine) for machine in MACHINES]
            text = "".join(f"{count:>13,} ({layer.macs / count:.3f})" for count in counts)
            print(f"{layer.name:26}{name:>10}{made.weight_bytes:>9,}{made.arena_bytes:>8,}{text}")
        published = f"int8 {CMSIS_NN[layer.name]:.2f}" if layer.name in CMSIS_NN else ""
        published += f", s4 {CMSIS_NN_4_BITS[layer.name]:.2f}" if layer.name in CMSIS_NN_4_BITS else ""
        print(f"{'':26}CMSIS-NN on M4, its own assembly: {published or 'not measured'}")
    print("instructions (MAC per instruction); emulated, not cycles; every code equal to the reference's")


def shift_add_table() -> None:
    """Instructions per weight and input: products against shifts and additions."""
    kinds = (None, 1, 2, 3)
    print(f"{'layer':26}{'machine':>12}" + "".join(f"{'product' if k is None else f'khot={k}':>12}" for k in kinds))
    for rows in zip(*(layers(k) for k in kinds), strict=True):
        for machine in (*MACHINES, WITHOUT_MULTIPLIER):
            counts = [measure(row, machine) / row.macs for row in rows]
            print(f"{rows[0].name:26}{machine:>12}" + "".join(f"{count:>12.2f}" for count in counts))
    print("instructions per weight and input; emulated, not cycles; every code equal to the reference's")


def main(arguments: Sequence[str] = ()) -> int:
    """Print the table."""
    reason = missing()
    if reason is not None:
        print(reason)
        return 1
    if "--ternary" in arguments:
        ternary_table()
        return 0
    if "--khot" in arguments:
        shift_add_table()
        return 0
    print(f"{'layer':26}{'MACs':>10}" + "".join(f"{machine:>24}" for machine in MACHINES) + f"{'CMSIS-NN, M4':>16}")
    for layer in layers():
        row = f"{layer.name:26}{layer.macs:>10,}"
        for machine in MACHINES:
            count = measure(layer, machine)
            row += f"{count:>15,} ({layer.macs / count:.3f})"
        print(row + f"{CMSIS_NN[layer.name]:>16.2f}")
    print("instructions (MAC per instruction); emulated, not cycles; every code equal to the reference's")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
