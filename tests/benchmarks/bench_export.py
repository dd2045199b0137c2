"""Time of `to_onnx` against torch's own exporter, and of `edgemat export` and `edgemat --help`.

``python -m tests.benchmarks export`` prints the table. `to_onnx` is compared in processor seconds of one process, in
turn with `torch.onnx.export` of the float network it was made of, first call and later calls apart.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROUNDS = 3
_FIRST = """
import sys, time, warnings
warnings.simplefilter("ignore")
import torch, edgemat
from tests.benchmarks.bench_export import float_export, quantized
module, example, float_module = quantized(sys.argv[2])
start = time.process_time()
if sys.argv[1] == "float":
    float_export(float_module, example, sys.argv[3])
else:
    edgemat.to_onnx(module, example, sys.argv[3])
print(time.process_time() - start)
"""


def quantized(name: str):  # type: ignore[no-untyped-def]
    """A calibrated quantised network by name, an example input and the float network."""
    import torch

    import edgemat
    from tests.networks import models

    torch.manual_seed(0)
    shape = {"mlp": (16,), "resnet8": (3, 32, 32)}[name]
    if name == "mlp":
        sizes = (16, 64, 32, 32, 5)
        layers: list[torch.nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(sizes)):
            layers += [torch.nn.Linear(a, b)] + ([torch.nn.ReLU()] if i < 3 else [])
        float_module: torch.nn.Module = torch.nn.Sequential(*layers)
    else:
        float_module = models.ResNet8()
    float_module.eval()
    example = torch.randn(32, *shape)
    recipe = edgemat.Recipe(input="fixed<8,2>", weights="fixed<8>", activations="fixed<8>")
    module = edgemat.quantize(float_module, recipe)
    edgemat.calibrate(module, [example])
    return module, example[:2], float_module


def float_export(module, example, path: str) -> None:  # type: ignore[no-untyped-def]
    """torch's exporter on the float network, with a dynamic batch."""
    import logging

    import torch

    logging.disable(logging.WARNING)
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(module, (example,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)


def _processor_seconds(call) -> float:  # type: ignore[no-untyped-def]
    start = time.process_time()
    call()
    return time.process_time() - start


def _first(kind: str, name: str, folder: Path) -> float:
    command = [sys.executable, "-c", _FIRST, kind, name, str(folder / "first.onnx")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def _command(arguments: list[str]) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "edgemat", *arguments], capture_output=True, check=True)
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    """Prints the table."""
    warnings.simplefilter("ignore")
    import edgemat

    table = Table(title="export: processor seconds in a started process; whole commands in wall seconds, best of 3")
    for column in ("what", "network", "edgemat", "peer, or whole command", "ratio", "goal"):
        table.add_column(column, justify="left" if column in ("what", "network") else "right")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = _command(["--help"])
        table.add_row("edgemat --help", "", f"{start:.2f}", "", "", "0.5 s")
        for network in ("mlp", "resnet8"):
            ours, theirs = _first("edgemat", network, folder), _first("float", network, folder)
            table.add_row("to_onnx, first", network, f"{ours:.2f}", f"{theirs:.2f}", f"{ours / theirs:.2f}", "1.5")
            module, example, float_module = quantized(network)
            path = folder / f"{network}.onnx"
            float_export(float_module, example, str(folder / "float.onnx"))
            edgemat.to_onnx(module, example, path)
            ratios = []
            for _ in range(ROUNDS):
                theirs = _processor_seconds(
                    lambda m=float_module, e=example: float_export(m, e, str(folder / "float.onnx"))
                )
                ours = _processor_seconds(lambda m=module, e=example, p=path: edgemat.to_onnx(m, e, p))
                ratios.append((ours / theirs, ours, theirs))
            ratio, ours, theirs = sorted(ratios)[len(ratios) // 2]
            table.add_row("to_onnx, later", network, f"{ours:.2f}", f"{theirs:.2f}", f"{ratio:.2f}", "1.5")
            for target in ("hls", "mcu"):
                edgemat.export(path, target=target, output=folder / target)  # imports the target's room: the start
                took = min(
                    _processor_seconds(lambda p=path, t=target: edgemat.export(p, target=t, output=folder / t))
                    for _ in range(ROUNDS)
                )
                whole = _command(["export", str(path), "--target", target, "-o", str(folder / target)])
                goal = {"mlp": "0.5 s", "resnet8": "2 s"}[network]
                table.add_row(f"export --target {target}", network, f"{took:.2f}", f"{whole:.2f}", "", goal)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
