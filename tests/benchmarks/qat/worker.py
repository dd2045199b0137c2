"""``python -m tests.benchmarks.qat.worker FOLDER < job.json``: one training in a process of its own.

The last line it prints is ``RESULT`` and the result as JSON. `FOLDER` keeps the float starts. The interpreter decides
what can run: this environment's for edgemat, the peers' for Brevitas and HGQ2.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import warnings
from pathlib import Path

from tests.benchmarks.qat.protocol import Job

METHODS = {
    "float": "float_start",
    "ptq": "train_edgemat",
    "edgemat": "train_edgemat",
    "qfx": "train_edgemat",
    "brevitas": "train_brevitas",
    "hgq2": "train_hgq2",
}


def main() -> None:
    """Runs the job on standard input."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("KERAS_BACKEND", "torch")
    folder = Path(sys.argv[1])
    job = Job.read(sys.stdin.read())
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(job.seed)
    start = time.perf_counter()
    name = METHODS[job.method]
    if job.task.startswith("exact-"):
        name = "exactness"
    elif (job.task, job.method) == ("front", "edgemat"):
        name = "train_front"
    module = importlib.import_module(f"tests.benchmarks.qat.{name}")
    found = module.run(job, folder)
    found["seconds"] = time.perf_counter() - start
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
