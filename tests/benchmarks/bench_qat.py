"""Accuracy by width and the accuracy/EBOPs front, edgemat beside Brevitas and HGQ2.

``python -m tests.benchmarks qat`` runs a short profile that proves the way works and prints its tables;
``EDGEMAT_BENCH_FULL=1`` runs everything and writes docs/evidence.md. Results are kept in ``EDGEMAT_BENCH_CACHE`` and an
interrupted run goes on from there. ``EDGEMAT_BENCH_PEERS=1`` installs the peers into an environment of their own,
``EDGEMAT_BENCH_PEER_PYTHON`` names an interpreter that has them. ``EDGEMAT_BENCH_ONLY=mlp`` takes the jobs whose name
holds one of the words; ``EDGEMAT_BENCH_REPORT=1`` runs nothing and reports what is there.
"""

from __future__ import annotations

import json
import os

from rich.console import Console

from tests.benchmarks.qat import campaign, environment, page
from tests.networks.data import DataMissingError, folder


def main() -> None:
    """Runs what is missing and reports."""
    console = Console(width=120)
    try:
        folder("magic_gamma")
    except DataMissingError as missing:
        console.print(f"qat: not run, {missing}", markup=False)
        return
    name, cache = campaign.profile(), campaign.Cache(campaign.folder())
    peers = environment.find(cache.path)
    for peer, reason in peers.reasons.items():
        console.print(f"{peer} is unavailable: {reason}", markup=False)
    for peer, version in peers.versions.items():
        console.print(f"{peer} {version}", markup=False)
    words = os.environ.get("EDGEMAT_BENCH_ONLY", "").split()
    jobs = [job for job in campaign.jobs(name) if not words or any(word in job.key for word in words)]
    if os.environ.get("EDGEMAT_BENCH_REPORT") != "1":
        campaign.run_all(jobs, cache, peers)
    rows = []
    for job in dict.fromkeys([*(job.start() for job in campaign.jobs(name)), *campaign.jobs(name)]):
        result = cache.get(job)
        if result is not None:
            rows.append({"job": json.loads(job.dump()), "result": result})
    if name == "full":
        page.write(rows)
        console.print(f"{len(rows)} results; wrote {page.PAGE.name}, {page.DATA.name} and {page.PLOT.name}")
    else:
        console.print(page.tables(page.compact(rows)), markup=False)
    for key, reason in cache.failures.items():
        console.print(f"failed: {key}: {reason}", markup=False)


if __name__ == "__main__":
    main()
