"""``python -m tests.benchmarks [name ...]`` prints the benchmark tables, all or the named ones."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def main() -> None:
    """Runs each ``bench_<name>.py`` in turn; one that fails is reported and the others still run."""
    known = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    asked = sys.argv[1:] or known
    unknown = [name for name in asked if name not in known]
    if unknown:
        sys.exit(f"no benchmark is called {unknown[0]!r}; there are {', '.join(known)}")
    failed = []
    for name in asked:
        print(f"== {name}", flush=True)
        try:
            importlib.import_module(f"tests.benchmarks.bench_{name}").main()
        except Exception as error:
            print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr)
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
