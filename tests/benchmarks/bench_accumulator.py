"""Accuracy under bounded accumulators (A2Q, A2Q+) against free ones, same float start, epochs and order.

``python -m tests.benchmarks accumulator`` trains the gamma MLP and LeNet (`tests.networks`), one table each. The bits
are read from the exported files: what their sums need in the worst case, in any order, bias included.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

NETWORKS = ("mlp", "lenet")
SETTINGS: tuple[tuple[int | None, str], ...] = (
    (None, ""),
    (16, "auto"),
    (14, "auto"),
    (14, "a2q+"),
    (14, "a2q"),
    (12, "auto"),
    (12, "a2q+"),
    (12, "a2q"),
)
PENALTY = 1e-3


def main() -> None:
    """Prints one table for each network."""
    import torch

    import edgemat
    from edgemat import report
    from edgemat.nn.weighted_layer import WeightedLayer
    from tests.networks import recipes

    for name in NETWORKS:
        network = recipes.NETWORKS[name]
        split = network.load()
        pretrained = recipes.pretrain(network, split)
        table = Table("accumulator", "bound", "after calibration %", "trained %", "bits needed", "zero weights %")
        table.title = (
            f"{name}: float {100 * recipes.score(recipes.outputs(pretrained, split.x_test), split, network):.2f} %"
        )
        for bits, bound in SETTINGS:
            chosen = dict(network.recipe)
            if bits is not None:
                chosen |= {"accumulator": bits, "accumulator_bound": bound}
            module = edgemat.quantize(pretrained, edgemat.Recipe(**chosen))
            edgemat.calibrate(module, [torch.from_numpy(split.x_train[i : i + 64]) for i in range(0, 256, 64)])
            started = 100 * recipes.score(recipes.outputs(module.eval(), split.x_test), split, network)

            def loss(y, x, labels, module=module):  # type: ignore[no-untyped-def]
                return recipes.classify(y, x, labels) + PENALTY * edgemat.accumulator_penalty(module)

            trained = replace(network, loss=loss) if bits is not None else network
            recipes.train(module, split, trained, network.quantised_epochs, network.lr / 5)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "net.onnx"
                edgemat.to_onnx(module, torch.from_numpy(split.x_test[:2]), path)
                graph = report.inspect(path)
                y = edgemat.Simulator(path)(split.x_test)
            sums = [node for node in graph.nodes if node.operator in ("Linear", "Conv")]
            layers = [part for part in module.modules() if isinstance(part, WeightedLayer)]
            codes = [layer.weight_quantizer.codes(layer.quantized()[0]).flatten() for layer in layers]
            weights = torch.cat(codes)
            table.add_row(
                "free" if bits is None else str(bits),
                bound,
                f"{started:.2f}",
                f"{100 * recipes.score(y, split, network):.2f}",
                ", ".join(str(node.needed_bits) for node in sums),
                f"{100 * float((weights == 0).float().mean()):.0f}",
            )
        Console(width=110).print(table)
