"""Optional native passes for training: one pass over the data where eager torch needs several.

The C files here are compiled once with the machine's GCC into the user's cache folder and run on torch's own OpenMP
threads. Where there is no GCC, no GNU OpenMP in the process, or ``EDGEMAT_NATIVE=0``, `kernel` gives None and the
layers use eager torch. Forward values have the same bits either way. A compiler that is there and fails is warned of.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

_FLOAT, _PLAIN, _tracing = torch.float32, (Tensor, torch.nn.Parameter), torch.compiler.is_compiling
_NAMES = ("quantize.c", "norm.c", "norm_rows.c", "stage.c", "widths.c", "passes.h")
_SOURCES = tuple(Path(__file__).with_name(name) for name in _NAMES)
_FLAGS = ("-std=c99", "-O3", "-march=native", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno")
_FLAGS += ("-fno-trapping-math",)
_SECONDS = 60
_P, _N, _F, _D, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_double, ctypes.c_int
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "edgemat_quantize": (None, [_P, _P, _N, _F, _F, _F, _F, _I, _I]),
    "edgemat_quantize_backward": (_D, [_P, _P, _P, _P, _N, _F, _F, _I]),
    "edgemat_affine": (None, [_P, _P, _P, _P, _N, _N, _N, _F, _F, _F, _I]),
    "edgemat_statistics": (None, [_P] * 5 + [_N, _N, _N, _D, _I]),
    "edgemat_affine_backward": (_D, [_P] * 10 + [_N, _N, _N, _F, _F, _I]),
    "edgemat_quantize_rows": (_D, [_P] * 7 + [_D, _N, _N, _F, _F, _I]),
    "edgemat_quantize_bias": (_D, [_P] * 3 + [_N] * 3 + [_D, _D]),
    "edgemat_stage_forward": (_I, [_P] * 7 + [_D, _P]),
    "edgemat_stage_backward": (None, [_P] * 9),
    "edgemat_rows_forward": (None, [_P] * 6),
    "edgemat_rows_backward": (None, [_P] * 8 + [_D, _D, _D, _P]),
    "edgemat_saturate": (None, [_P] * 6 + [_N] * 3 + [_I]),
    "edgemat_saturate_backward": (None, [_P] * 10 + [_N] * 3 + [_I] * 2),
    "edgemat_round_groups": (_I, [_P] * 7 + [_N] * 4 + [_I] * 3),
    "edgemat_quantize_rows_backward": (None, [_P] * 6 + [_N, _N, _F, _F, _I]),
}


def kernel(*tensors: Tensor) -> ctypes.CDLL | None:
    """The native passes if they can run on all of `tensors`: contiguous float32 in main memory, not being traced."""
    for x in tensors:
        if x.dtype is not _FLOAT or not x.is_cpu or type(x) not in _PLAIN or not x.is_contiguous():
            return None
    return None if _tracing() else load()


@functools.cache
def load() -> ctypes.CDLL | None:
    """Compiles (once per machine) and loads the native passes; None where that is not possible.

    Warns:
        RuntimeWarning: if there is a compiler and they can still not be made or loaded.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or os.environ.get("EDGEMAT_NATIVE") == "0" or not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(str(_built(compiler)))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"edgemat trains without its native passes, which {compiler} did not make ({_reason(error)}): the bits are "
            "the same, a step takes longer; mend the compiler, or set EDGEMAT_NATIVE=0",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return library


def _reason(error: Exception) -> str:
    """What a compiler complained of first, else the error itself; one line."""
    said = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else ""
    lines = [line.strip() for line in (said or str(error)).splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)[:300]


def _built(compiler: str) -> Path:
    """The library compiled with `compiler`, from the cache folder or made now."""
    key = hashlib.sha256(b"".join(source.read_bytes() for source in _SOURCES))
    key.update(" ".join((*_FLAGS, platform.machine(), os.path.realpath(compiler), _processor())).encode())
    target = _cache_folder() / f"passes-{key.hexdigest()[:20]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        # Linked without -fopenmp: the runtime is the one torch has loaded, so that threads are shared with it.
        sources = [source for source in _SOURCES if source.suffix == ".c"]
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        linked = Path(folder) / "passes.so"
        compiling = [[compiler, *_FLAGS, "-c", str(s), "-o", o] for s, o in zip(sources, objects, strict=True)]
        for command in (*compiling, [compiler, "-shared", *objects, "-o", str(linked), "-lm"]):
            subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
        os.replace(linked, target)
    return target


def _cache_folder() -> Path:
    """``EDGEMAT_CACHE``, or a folder in the user's cache folder; code is never loaded from a shared one."""
    stated = os.environ.get("EDGEMAT_CACHE")
    if stated:
        return Path(stated).expanduser() / "native"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "edgemat" / "native"


def _processor() -> str:
    """What ``-march=native`` depends on, so that machines that share a home do not share a library."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}))
