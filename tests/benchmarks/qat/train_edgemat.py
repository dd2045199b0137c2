"""edgemat: post-training quantisation and QFX at a stated width. The trained state is kept for `exactness`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

import edgemat
from tests.benchmarks.qat import float_start, loop
from tests.benchmarks.qat.protocol import Job, Split, load


def input_format(job: Job) -> str:
    """The format of the inputs."""
    width, frac, signed = job.budget.input
    return f"{'' if signed else 'u'}fixed<{width},{width - frac}>"


def recipe(job: Job) -> edgemat.Recipe:
    """Weights and activations of the job's width, with ``qfx`` every element-wise layer's as well; the data's input."""
    width = f"fixed<{job.bits}>"
    every = job.method == "qfx"
    return edgemat.Recipe(input=input_format(job), weights=width, activations=width, every_layer=every)


def store(job: Job, folder: Path, states: list[dict[str, Any]]) -> None:
    """Keeps the state of each point of a job."""
    written = folder / f"{job.key}.{os.getpid()}"
    torch.save(states, written)
    os.replace(written, folder / f"{job.key}.pt")


def run(job: Job, folder: Path) -> dict[str, Any]:
    """Trains one point."""
    split, model = load(job), float_start.model(job, folder)
    batches = loop.calibration_batches(split)
    if job.method == "ptq":
        q = edgemat.ptq(model, batches, recipe(job))
    else:
        q = edgemat.quantize(model, recipe(job))
        edgemat.calibrate(q, batches, method="mse")
        train(q, split, job)
    q.eval()
    store(job, folder, [q.state_dict()])
    return {
        "validation": loop.accuracy(q, split.x_validation, split.y_validation),
        "test": loop.accuracy(q, split.x_test, split.y_test),
    }


def train(q: nn.Module, split: Split, job: Job) -> None:
    """QFX; binary points are a parameter group of their own, batch norms freeze for the last quarter of the steps."""
    rate = float(job.option("rate", job.budget.rate))
    groups = edgemat.parameter_groups(q, rate, rate * float(job.option("points", 1.0)))
    steps = job.budget.epochs * (len(split.x) // job.budget.batch)
    left = round(float(job.option("freeze", 0.75)) * steps)

    def after_step() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            edgemat.freeze_batch_norm(q)

    loop.train(q, split, job, job.budget.epochs, rate, groups, after_step=after_step)
