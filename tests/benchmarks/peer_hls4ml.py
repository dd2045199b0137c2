"""Times hls4ml's compiled C simulation in an environment that is thrown away; never a dependency of edgemat.

hls4ml comes from the user's package index on request only. It runs as a program of its own, with this environment's
torch.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

CHILD = """
import json, sys, time
import hls4ml, numpy, torch
sys.path.append(sys.argv[1])
from tests.networks.models import Mlp, SmallCnn
found = {}
for model, shape, samples in ((Mlp, (16,), 20000), (SmallCnn, (1, 28, 28), 100)):
    torch.manual_seed(0)
    module = model().eval()
    config = hls4ml.utils.config_from_pytorch_model(
        module, input_shape=shape, default_precision="ap_fixed<16,6>", channels_last_conversion="internal"
    )
    made = hls4ml.converters.convert_from_pytorch_model(
        module, output_dir=f"{sys.argv[2]}/{model.__name__}", backend="Vitis", io_type="io_parallel", hls_config=config
    )
    made.compile()
    x = numpy.random.default_rng(0).random((samples, *shape), dtype=numpy.float32) * 2 - 1
    made.predict(x[:10])
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        made.predict(x)
        best = min(best, time.perf_counter() - start)
    found[model.__name__] = samples / best
    print("RESULT " + json.dumps(found), flush=True)
"""


def measure() -> tuple[dict[str, float], str]:
    """Samples a second by the network's class name, and why some are missing ("" if none is)."""
    if shutil.which("g++") is None:
        return {}, "not measured: its compilation needs g++"
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder) / "env", with_pip=True)
        python = str(Path(folder) / "env" / "bin" / "python")
        steps = [
            [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "hls4ml"],
            [python, "-c", CHILD, str(ROOT), folder],
        ]
        # torch is large: the child sees this environment's packages behind its own.
        purelib = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
        ).stdout.strip()
        (Path(purelib) / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        found: dict[str, float] = {}
        for step in steps:
            try:
                done = subprocess.run(step, capture_output=True, text=True, timeout=900, cwd=folder)
            except subprocess.TimeoutExpired:
                return found, "not measured further: more than 15 minutes"
            for line in done.stdout.splitlines():
                if line.startswith("RESULT "):
                    found = json.loads(line.removeprefix("RESULT "))
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                return found, f"not measured further: {last[:200]}"
    return found, ""


if __name__ == "__main__":
    print(measure())
    sys.exit(0)
