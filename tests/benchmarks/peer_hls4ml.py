"""Measures hls4ml's C simulation in an environment that is thrown away; never a dependency of edgemat.

hls4ml comes from the user's package index on request only. It runs as a program of its own, with this environment's
torch, one process a case so that the compiler's peak memory is that case's own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sysconfig
import tempfile
import venv
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CASES = (("Mlp", "parallel"), ("SmallCnn", "parallel"), ("Mlp", "stream"), ("SmallCnn", "stream"))

CHILD = """
import json, subprocess, sys, time
import hls4ml, numpy, torch
root, folder, name, io = sys.argv[1:]
sys.path.append(root)
from tests.networks import models
shape, samples = {"Mlp": ((16,), 20000), "SmallCnn": ((1, 28, 28), 100)}[name]
torch.manual_seed(0)
module = getattr(models, name)().eval()
config = hls4ml.utils.config_from_pytorch_model(
    module, input_shape=shape, default_precision="ap_fixed<16,6>",
    channels_last_conversion="full" if io == "stream" else "internal",
)
made = hls4ml.converters.convert_from_pytorch_model(
    module, output_dir=f"{folder}/{name}_{io}", backend="Vitis", io_type=f"io_{io}", hls_config=config
)
made.write()
# A process that holds torch would count its own pages as its forks' peak: a small one runs the build script.
light = "import json, resource, subprocess, time; s = time.perf_counter(); " \
    "subprocess.run(['bash', 'build_lib.sh'], check=True, capture_output=True); " \
    "print(json.dumps({'compile_s': time.perf_counter() - s, " \
    "'peak_mb': resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024}))"
build = subprocess.run(
    [sys.executable, "-c", light], cwd=f"{folder}/{name}_{io}", capture_output=True, text=True, check=True
)
found = json.loads(build.stdout.splitlines()[-1])
print("RESULT " + json.dumps(found), flush=True)
made.compile()
x = numpy.random.default_rng(0).random((samples, *shape), dtype=numpy.float32) * 2 - 1
if io == "stream" and len(shape) == 3:
    x = numpy.ascontiguousarray(x.transpose(0, 2, 3, 1))
made.predict(x[:10])
best = float("inf")
for _ in range(5):
    start = time.perf_counter()
    made.predict(x)
    best = min(best, time.perf_counter() - start)
found["rate"] = samples / best
print("RESULT " + json.dumps(found), flush=True)
"""


@dataclass
class Peer:
    """What was measured: compile_s, peak_mb and rate (samples a second) by network and io; and why some are missing."""

    cases: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    note: str = ""


@lru_cache(maxsize=1)
def run_peer() -> Peer:
    """Installs hls4ml into a throwaway environment and measures every case of `CASES`."""
    if shutil.which("g++") is None:
        return Peer(note="not measured: its compilation needs g++")
    peer = Peer()
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder) / "env", with_pip=True)
        python = str(Path(folder) / "env" / "bin" / "python")
        # torch is large: the child sees this environment's packages behind its own.
        ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        purelib = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
        (Path(purelib) / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "hls4ml"]
        steps: list[tuple[tuple[str, str] | None, list[str]]] = [(None, install)]
        steps += [(case, [python, "-c", CHILD, str(ROOT), folder, *case]) for case in CASES]
        for case, command in steps:
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=folder)
            except subprocess.TimeoutExpired:
                peer.note = f"{case or 'installation'}: more than 15 minutes"
                continue
            for line in done.stdout.splitlines():
                if case is not None and line.startswith("RESULT "):
                    peer.cases[case] = json.loads(line.removeprefix("RESULT "))
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                peer.note = f"{' '.join(case) if case else 'installation'}: {last[:200]}"
                if case is None:
                    break
    return peer


def measure() -> tuple[dict[str, float], str]:
    """Samples a second of the parallel simulation by the network's class name, and why some are missing."""
    peer = run_peer()
    rates = {name: found["rate"] for (name, io), found in peer.cases.items() if io == "parallel" and "rate" in found}
    return rates, peer.note
