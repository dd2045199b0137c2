"""Every trained point of edgemat again: loaded from its state, exported, and compared on every backend."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import edgemat
from tests.benchmarks.qat import float_start, loop, train_edgemat, train_front
from tests.benchmarks.qat.protocol import Job, load

PREFIX = "exact-"
SAMPLES = {"mlp": 200, "lenet": 50, "resnet8": 10}
BACKENDS = {
    "mlp": ("reference", "onnx", "hls:parallel", "mcu"),
    "lenet": ("reference", "onnx", "hls:stream", "mcu"),
    "resnet8": ("reference", "onnx", "mcu"),
}


def job_of(training: Job) -> Job:
    """The comparison of a training's points."""
    return replace(training, task=PREFIX + training.task)


def training_of(job: Job) -> Job:
    """The training that a comparison is about."""
    return replace(job, task=job.task.removeprefix(PREFIX))


def run(job: Job, folder: Path) -> dict[str, Any]:
    """Samples, mismatches by backend and the test accuracy of each point."""
    training = training_of(job)
    recipe = train_front.recipe if training.task == "front" else train_edgemat.recipe
    split = load(training)
    q = edgemat.quantize(float_start.model(training, folder), recipe(training)).eval()
    samples = split.x_test[: SAMPLES[job.network]]
    points = []
    for state in torch.load(folder / f"{training.key}.pt", weights_only=True):
        q.load_state_dict(state)
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "net.onnx"
            edgemat.to_onnx(q, torch.from_numpy(samples[:2]), path)
            report = edgemat.verify(path, inputs=samples, backends=BACKENDS[job.network], module=q).to_dict()
        rows = {backend: row["mismatches"] for backend, row in report["backends"].items()}
        test = loop.accuracy(q, split.x_test, split.y_test)
        points.append({"samples": report["samples"], "mismatches": rows, "exact": bool(report["ok"]), "test": test})
    return {"verified": points}
