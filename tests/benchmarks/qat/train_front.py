"""edgemat's accuracy/EBOPs front: a width for each weight and each activation channel, under a growing cost.

`edgemat.Front` keeps the epochs' networks that no other beats in both validation accuracy and EBOPs; they are exported
and counted from the file's own integers; `exactness` verifies them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import edgemat
from edgemat.lower import read
from tests.benchmarks.qat import bits, float_start, loop, train_edgemat
from tests.benchmarks.qat.protocol import Job, load


def recipe(job: Job) -> edgemat.Recipe:
    """Learned widths from the job's ceilings down to 0."""
    return edgemat.Recipe(
        input=train_edgemat.input_format(job),
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

        loop.train(
            q,
            split,
            job,
            job.budget.epochs,
            rate,
            groups,
            int(job.option("cycles", 1)),
            ramp.penalty,
            after_epoch,
            ramp.step,
        )
        states, points = [], []
        for point in front.points:
            front.load(q, point)
            path = Path(name) / "net.onnx"
            edgemat.to_onnx(q.eval(), torch.from_numpy(split.x_test[:2]), path)
            products, sums = count(path)
            place = next(p for p in found if (p["validation"], p["ebops"]) == (point.accuracy, point.cost))
            points.append({**place, "ebops": products, "bias_bits": sums, "reported": place["ebops"]})
            states.append({key: value.clone() for key, value in q.state_dict().items()})
    train_edgemat.store(job, folder, states)
    return {"points": points}
