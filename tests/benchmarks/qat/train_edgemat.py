"""edgemat: post-training quantisation and QFX at a stated width. Every point is exported and verified."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import edgemat
from tests.benchmarks.qat import float_start, loop
from tests.benchmarks.qat.protocol import Job, Split, load

VERIFIED = {"mlp": 500, "lenet": 50, "resnet8": 10}
BACKENDS = ("reference", "onnx", "hls:parallel", "mcu")


def input_format(job: Job) -> str:
    """The format of the inputs."""
    width, frac, signed = job.budget.input
    return f"{'' if signed else 'u'}fixed<{width},{width - frac}>"


def recipe(job: Job) -> edgemat.Recipe:
    """Weights and activations of the job's width, with ``qfx`` every element-wise layer's as well; the data's input."""
    width = f"fixed<{job.bits}>"
    every = job.method == "qfx"
    return edgemat.Recipe(input=input_format(job), weights=width, activations=width, every_layer=every)


def run(job: Job, folder: Path) -> dict[str, Any]:
    """Trains and verifies one point."""
    split, model = load(job), float_start.model(job, folder)
    batches = loop.calibration_batches(split)
    if job.method == "ptq":
        q = edgemat.ptq(model, batches, recipe(job))
    else:
        q = edgemat.quantize(model, recipe(job))
        edgemat.calibrate(q, batches, method="mse")
        train(q, split, job)
    q.eval()
    return {
        "validation": loop.accuracy(q, split.x_validation, split.y_validation),
        "test": loop.accuracy(q, split.x_test, split.y_test),
        "verified": verified(q, split, job),
    }


def train(q: nn.Module, split: Split, job: Job) -> None:
    """QFX; binary points are a parameter group of their own."""
    rate = float(job.option("rate", job.budget.rate))
    groups = edgemat.parameter_groups(q, rate, rate * float(job.option("points", 1.0)))
    loop.train(q, split, job, job.budget.epochs, rate, groups)


def verified(q: nn.Module, split: Split, job: Job) -> dict[str, Any]:
    """Exports and compares integer codes on every backend there is; samples, mismatches by backend."""
    samples = split.x_test[: VERIFIED[job.network]]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "net.onnx"
        edgemat.to_onnx(q, torch.from_numpy(np.ascontiguousarray(samples[:2])), path)
        report = edgemat.verify(path, inputs=samples, backends=BACKENDS, module=q).to_dict()
    rows = {backend: row["mismatches"] for backend, row in report["backends"].items()}
    return {"samples": report["samples"], "mismatches": rows, "exact": bool(report["ok"])}
