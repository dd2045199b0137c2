"""edgemat's accuracy/EBOPs front: a width for each weight and each activation channel, under a growing cost.

`edgemat.Front` keeps the epochs' networks that no other beats in both validation accuracy and EBOPs; they are exported,
counted from the file's own integers and verified on every backend.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import edgemat
from edgemat.lower import read
from tests.benchmarks.qat import bits, float_start, loop
from tests.benchmarks.qat.protocol import Job, Split, load
from tests.benchmarks.qat.train_edgemat import BACKENDS, input_format

VERIFIED = 200


def recipe(job: Job) -> edgemat.Recipe:
    """Learned widths from the job's ceilings down to 0."""
    return edgemat.Recipe(
        input=input_format(job),
        weights=f"fixed<{int(job.option('weight_bits', 6))}>",
        activations=f"fixed<{int(job.option('data_bits', 6))}>",
        learn_widths="all",
        weight_groups="weight",
        activation_groups="channel",
    )


def count(path: Path) -> tuple[int, int]:
    """EBOPs of the multiplications, and bits of the biases, from the integers and formats of the file."""
    products = sums = 0
    for node in read(path).nodes:
        if node.op.name != "Linear":
            continue
        weights, bias, data = node.constant(1), node.constant(2), node.x[0].format
        assert weights is not None and bias is not None
        widths = np.array(data.widths or (data.width,)) - data.signed
        products += bits.dense(weights, np.maximum(widths, 0))
        sums += bits.biases(bias)
    return products, sums


def run(job: Job, folder: Path) -> dict[str, Any]:
    """One training with a growing cost; a point after each epoch."""
    split, model = load(job), float_start.model(job, folder)
    q = edgemat.quantize(model, recipe(job))
    edgemat.calibrate(q, loop.calibration_batches(split))
    rate = float(job.option("rate", job.budget.rate))
    groups = edgemat.parameter_groups(q, rate, rate * float(job.option("points", 1.0)))
    steps = job.budget.epochs * (len(split.x) // job.budget.batch)
    first, last = float(job.option("first", 1e-6)), float(job.option("last", 1e-3))
    ramp = edgemat.CostRamp(q, "ebops", start=first, stop=last, steps=steps)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        front = edgemat.Front(name)

        def after_epoch(epoch: int) -> None:
            q.eval()
            reached = {
                "validation": loop.accuracy(q, split.x_validation, split.y_validation),
                "test": loop.accuracy(q, split.x_test, split.y_test),
            }
            cost = float(edgemat.cost(q, "ebops"))
            found.append({"epoch": epoch, "ebops": cost, **reached})
            front.offer(q, reached["validation"], cost)

        loop.train(q, split, job, job.budget.epochs, rate, groups, ramp.penalty, after_epoch, ramp.step)
        for point in front.points:
            front.load(q, point)
            place = next(p for p in found if (p["validation"], p["ebops"]) == (point.accuracy, point.cost))
            place["reported"] = place["ebops"]
            place |= exported(q.eval(), split)
    return {"points": [p for p in found if "verified" in p]}


def exported(q: nn.Module, split: Split) -> dict[str, Any]:
    """What the file of one point says and computes."""
    samples = split.x_test[:VERIFIED]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "net.onnx"
        edgemat.to_onnx(q, torch.from_numpy(samples[:2]), path)
        products, sums = count(path)
        report = edgemat.verify(path, inputs=samples, backends=BACKENDS, module=q).to_dict()
    rows = {backend: row["mismatches"] for backend, row in report["backends"].items()}
    verified = {"samples": report["samples"], "mismatches": rows, "exact": bool(report["ok"])}
    return {"ebops": products, "bias_bits": sums, "verified": verified}
