"""Which trainings there are, the cache of their results, and running what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.benchmarks.qat.environment import Peers
from tests.benchmarks.qat.protocol import BITS, NETWORKS, SEEDS, SHORT, Job, Network

ROOT = Path(__file__).resolve().parents[3]
METHODS = ("ptq", "edgemat", "qfx", "brevitas", "hgq2")
PEERS = ("brevitas", "hgq2")
EXPORTED = ("ptq", "edgemat", "qfx")
FRONT_EPOCHS = {"full": 100, "short": 8}
_RAMP: tuple[tuple[str, float | str], ...] = (("first", 1e-6), ("last", 1e-3), ("rate", 2e-2), ("cycles", 10))
FRONT_OPTIONS: dict[str, tuple[tuple[str, float | str], ...]] = {
    "edgemat": (*_RAMP, ("weight_bits", 6), ("data_bits", 6)),
    "hgq2": (*_RAMP, ("weights", "kif"), ("weight_bits", 3), ("data_bits", 3)),
}
TIMEOUT_S = 4 * 3600


def folder() -> Path:
    """Where results, float starts and the peers' environment are kept: ``EDGEMAT_BENCH_CACHE``, outside the tree."""
    named = os.environ.get("EDGEMAT_BENCH_CACHE")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edgemat" / "benchmarks"
    path = Path(named) if named else cache
    path.mkdir(parents=True, exist_ok=True)
    return path


def profile() -> str:
    """``EDGEMAT_BENCH_FULL=1`` takes the whole tables; otherwise a short run that proves the way works."""
    return "full" if os.environ.get("EDGEMAT_BENCH_FULL") == "1" else "short"


def networks(name: str) -> dict[str, Network]:
    """The networks and budgets of a profile."""
    return NETWORKS if name == "full" else SHORT


def table_jobs(name: str) -> Iterator[Job]:
    """The accuracy tables, the most valuable first."""
    seeds, widths = (SEEDS, BITS) if name == "full" else (SEEDS[:1], (4,))
    for network, budget in networks(name).items():
        for seed in seeds:
            for bits in widths:
                for method in METHODS:
                    yield Job("fixed", method, network, bits, seed, budget)


def front_jobs(name: str) -> Iterator[Job]:
    """The accuracy/EBOPs fronts of the MLP."""
    budget = replace(networks(name)["mlp"], epochs=FRONT_EPOCHS[name])
    for seed in SEEDS if name == "full" else SEEDS[:1]:
        for method, options in FRONT_OPTIONS.items():
            yield Job("front", method, "mlp", 0, seed, budget, options)


def jobs(name: str) -> list[Job]:
    """Everything of a profile: the MLP's table, the fronts, the larger networks, then what was exported."""
    table = list(table_jobs(name))
    first = [job for job in table if job.network == "mlp"]
    trainings = [*first, *front_jobs(name), *(job for job in table if job.network != "mlp")]
    return [*trainings, *(replace(job, task=f"exact-{job.task}") for job in trainings if job.method in EXPORTED)]


@dataclass
class Cache:
    """Results by job, one JSON file each."""

    path: Path
    failures: dict[str, str] = field(default_factory=dict)

    def get(self, job: Job) -> dict[str, Any] | None:
        """The stored result, or None."""
        file = self.path / f"{job.key}.json"
        return json.loads(file.read_text("utf-8"))["result"] if file.exists() else None

    def put(self, job: Job, result: dict[str, Any]) -> None:
        """Stores a result; a reader never sees half of it."""
        written = self.path / f"{job.key}.{os.getpid()}"
        written.write_text(json.dumps({"job": json.loads(job.dump()), "result": result}), encoding="utf-8")
        os.replace(written, self.path / f"{job.key}.json")

    def done(self, job: Job) -> bool:
        """Whether the job needs no more work."""
        return self.get(job) is not None


def run(job: Job, cache: Cache, peers: Peers) -> dict[str, Any] | None:
    """The result of a job, from the cache or by running it after the float training it starts from."""
    found = cache.get(job)
    if found is not None:
        return found
    if job.method in PEERS and job.method not in peers.versions:
        return None
    needed = job.start()
    if job.task.startswith("exact-"):
        needed = replace(job, task=job.task.removeprefix("exact-"))
    if job.task != "float" and run(needed, cache, peers) is None:
        return None
    python = peers.python if job.method in PEERS else sys.executable
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "KERAS_BACKEND": "torch"}
    command = [python, "-m", "tests.benchmarks.qat.worker", str(cache.path)]
    streams: dict[str, Any] = {"input": job.dump(), "capture_output": True, "text": True}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=TIMEOUT_S, **streams)
    except subprocess.TimeoutExpired:
        cache.failures[job.key] = f"more than {TIMEOUT_S // 3600} hours"
        return None
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            cache.put(job, result)
            return result
    cache.failures[job.key] = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
    return None


def run_all(asked: list[Job], cache: Cache, peers: Peers) -> None:
    """Runs what is missing, with a bar on a terminal and a line for each training elsewhere."""
    missing = [
        job for job in asked if not cache.done(job) and (job.method not in PEERS or job.method in peers.versions)
    ]
    if not missing:
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("training", total=len(missing))
            for job in missing:
                bar.update(task, description=job.key.rsplit("-", 1)[0])
                run(job, cache, peers)
                bar.advance(task)
        return
    for i, job in enumerate(missing):
        start = time.perf_counter()
        found = run(job, cache, peers)
        said = cache.failures.get(job.key, "") if found is None else ""
        print(f"{i + 1}/{len(missing)} {job.key} {time.perf_counter() - start:.0f} s {said}", flush=True)
