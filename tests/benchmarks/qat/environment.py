"""The peers' interpreter: one the user names, or an environment of its own that the benchmark makes and keeps."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

PACKAGES = {"brevitas": "brevitas==0.13.4", "hgq2": "HGQ2==0.2.0"}
IMPORTS = {"brevitas": "brevitas", "hgq2": "hgq"}
_ASK = "import sys, importlib.metadata as m, {module}; print('VERSION', m.version(sys.argv[1]))"


@dataclass(frozen=True)
class Peers:
    """Where the peers run.

    Attributes:
        python: The interpreter, or "" where there is none.
        versions: Version of each peer that can be imported there.
        reasons: Why a peer is missing.
    """

    python: str
    versions: dict[str, str]
    reasons: dict[str, str]


def find(folder: Path) -> Peers:
    """The peers that can run here.

    ``EDGEMAT_BENCH_PEER_PYTHON`` names an interpreter that has them; ``EDGEMAT_BENCH_PEERS=1`` installs them with pip
    into an environment under `folder`, which sees this environment's torch behind its own packages.
    """
    named = os.environ.get("EDGEMAT_BENCH_PEER_PYTHON", "")
    if named:
        return _checked(named)
    if os.environ.get("EDGEMAT_BENCH_PEERS") != "1":
        reason = "not asked for: EDGEMAT_BENCH_PEERS=1 installs it, EDGEMAT_BENCH_PEER_PYTHON names an interpreter"
        return Peers("", {}, dict.fromkeys(PACKAGES, reason))
    python = folder / "peers" / "bin" / "python"
    if not python.exists():
        made = _make(folder / "peers", python)
        if made:
            return Peers("", {}, dict.fromkeys(PACKAGES, made))
    return _checked(str(python))


def _make(root: Path, python: Path) -> str:
    """Makes the environment; the reason where that fails."""
    venv.create(root, with_pip=True)
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    purelib = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    (Path(purelib) / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *PACKAGES.values()]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        return "installation failed: " + (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
    return ""


def _checked(python: str) -> Peers:
    versions, reasons = {}, {}
    for name, module in IMPORTS.items():
        environment = {**os.environ, "KERAS_BACKEND": "torch"}
        command = [python, "-c", _ASK.format(module=module), PACKAGES[name].split("==")[0]]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        except (OSError, subprocess.TimeoutExpired) as error:
            reasons[name] = f"{type(error).__name__}: {error}"
            continue
        found = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("VERSION ")]
        if done.returncode == 0 and found:
            versions[name] = found[0]
        else:
            reasons[name] = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
    return Peers(python, versions, reasons)
