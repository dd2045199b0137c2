"""The float network every quantised training of a seed starts from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.benchmarks.qat import loop
from tests.benchmarks.qat.protocol import Job, load


def path(job: Job, folder: Path) -> Path:
    """Where the float weights of this job's start lie, as arrays by state_dict name."""
    return folder / f"{job.start().key}.npz"


def run(job: Job, folder: Path) -> dict[str, Any]:
    """Trains the float network and stores its weights."""
    split = load(job)
    model = loop.MODELS[job.network]()
    loop.train(model, split, job, job.budget.float_epochs, job.budget.float_rate)
    found = {
        "validation": loop.accuracy(model, split.x_validation, split.y_validation),
        "test": loop.accuracy(model, split.x_test, split.y_test),
    }
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    written = path(job, folder).with_name(f"float-{os.getpid()}.npz")
    np.savez(written, **arrays)
    os.replace(written, path(job, folder))
    return found


def arrays(job: Job, folder: Path) -> dict[str, np.ndarray]:
    """The stored weights by state_dict name."""
    with np.load(path(job, folder)) as stored:
        return {name: stored[name] for name in stored.files}


def model(job: Job, folder: Path) -> nn.Module:
    """The float network, in eval mode."""
    made = loop.MODELS[job.network]()
    made.load_state_dict({name: torch.from_numpy(value) for name, value in arrays(job, folder).items()})
    return made.eval()
