"""The vendor's ``ap_int.h`` and ``ap_fixed.h``, which the HLS C simulation compiles against.

edgemat ships none of them. They come from, in this order:

1. the folder ``EDGEMAT_AP_INCLUDE`` names;
2. a Vitis or Vivado HLS installation (``XILINX_HLS``, ``XILINX_VITIS``, ``XILINX_VIVADO``);
3. the user's cache, filled once by ``edgemat headers``: the Apache-2.0 headers out of the hls4ml wheel, which
   is downloaded alone and never installed. The wheel's other files stay behind: among them are two with a
   confidential notice, and the package itself requires an LGPL one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from edgemat.errors import ToolchainError
from edgemat.targets.toolchain import run, user_cache_dir

WHEEL = "hls4ml==1.3.0"
WHEEL_SHA256 = "01bf1de2cd9bca56699b9fe3385cb1735026b022f9580fe1d73faf192dfb90f2"
_PREFIX = PurePosixPath("hls4ml/templates/vivado/ap_types")
_LICENCE = b"Licensed under the Apache License, Version 2.0"
_REFUSED = ("ap_shift_reg.h",)
_REQUIRED = ("ap_int.h", "ap_fixed.h", "ap_common.h", "etc/ap_private.h")
_FILE_BYTES_MAX = 4 << 20

NOTICE = "HLS arbitrary precision types, Copyright 2011-2019 Xilinx, Inc., licensed under the Apache License 2.0."


def cache_folder() -> Path:
    """Where fetched headers live: one folder per version of their source below the user's cache."""
    return user_cache_dir() / f"ap_types-{WHEEL.partition('==')[2]}"


def find_ap_headers() -> Path | None:
    """The folder to pass as ``-isystem``, or None when no headers are on this machine yet.

    Raises:
        ToolchainError: ``EDGEMAT_AP_INCLUDE`` names a folder without the headers.
    """
    named = os.environ.get("EDGEMAT_AP_INCLUDE")
    if named:
        folder = Path(named).expanduser()
        if not _holds_headers(folder):
            raise ToolchainError(
                f"EDGEMAT_AP_INCLUDE names {folder}, which holds no ap_int.h and ap_fixed.h; "
                "point it at the folder that does, or unset it and run: edgemat headers"
            )
        return folder.resolve()
    for variable in ("XILINX_HLS", "XILINX_VITIS", "XILINX_VIVADO"):
        root = os.environ.get(variable)
        if root and _holds_headers(Path(root, "include")):
            return Path(root, "include").resolve()
    cached = cache_folder()
    return cached if all((cached / name).is_file() for name in _REQUIRED) else None


def _holds_headers(folder: Path) -> bool:
    return (folder / "ap_int.h").is_file() and (folder / "ap_fixed.h").is_file()


def require_ap_headers() -> Path:
    """As :func:`find_ap_headers`, for callers that cannot go on without.

    Raises:
        ToolchainError: There are none; the message says how to get them.
    """
    folder = find_ap_headers()
    if folder is None:
        raise ToolchainError(
            "The ap_int.h and ap_fixed.h headers are not on this machine; run: edgemat headers "
            "(or set EDGEMAT_AP_INCLUDE to a folder that holds them)."
        )
    return folder


def fetch_ap_headers(wheel: Path | str | None = None) -> Path:
    """Return the headers' folder, fetching them into the user's cache if no place has them yet.

    Args:
        wheel: An already downloaded wheel to take them from; None downloads it with pip.

    Raises:
        ToolchainError: The wheel cannot be had, is not the expected one, or its headers are not Apache-2.0.
    """
    found = find_ap_headers()
    if found is not None:
        return found
    target = cache_folder()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ap_types-", dir=target.parent) as work:
        source = Path(wheel) if wheel is not None else _download(Path(work, "wheel"))
        folder = Path(work, "include")
        _extract(source, folder)
        if target.is_dir():  # an incomplete folder, since find_ap_headers did not take it
            shutil.rmtree(target, ignore_errors=True)
        try:
            os.replace(folder, target)
        except OSError:
            if find_ap_headers() is None:  # not another process that was faster
                raise
    return target


def _download(folder: Path) -> Path:
    """Download the wheel alone: nothing is installed, no dependency is resolved, no code of it runs."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), WHEEL]
    try:
        run(command, what=f"downloading the wheel {WHEEL} for its ap_* headers", timeout_s=300)
    except ToolchainError as error:
        raise ToolchainError(
            f"{error} Without a network, set EDGEMAT_AP_INCLUDE to a folder with ap_int.h and ap_fixed.h."
        ) from None
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ToolchainError(f"pip download {WHEEL} left {len(wheels)} wheels where 1 was expected; try it by hand.")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise ToolchainError(
            f"The downloaded wheel {wheels[0].name} has SHA-256 {digest}, expected {WHEEL_SHA256}; "
            "it is not the file edgemat was tested with, so nothing was taken from it."
        )
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> None:
    """Copy the Apache-licensed ``ap_*.h`` and ``etc/`` of a wheel into ``folder``; check each licence."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                name = _kept_name(member.filename)
                if name is None:
                    continue
                if member.file_size > _FILE_BYTES_MAX:
                    raise ToolchainError(
                        f"{member.filename} in {wheel.name} has {member.file_size} bytes; not a header."
                    )
                text = archive.read(member)
                if not _is_apache(text):
                    continue
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(text)
    except (zipfile.BadZipFile, FileNotFoundError) as error:
        raise ToolchainError(f"{wheel} is not a wheel that can be read ({error}); delete it and try again.") from error
    missing = [name for name in _REQUIRED if not (folder / name).is_file()]
    if missing:
        raise ToolchainError(
            f"{wheel.name} holds no Apache-licensed {', '.join(missing)}; "
            "set EDGEMAT_AP_INCLUDE to a folder with the vendor's headers instead."
        )
    (folder / "NOTICE").write_text(f"{NOTICE}\nTaken from the wheel {WHEEL}.\n")


def _kept_name(member: str) -> str | None:
    """The path below the include folder that a wheel's member gets, or None if it stays behind."""
    path = PurePosixPath(member)
    if path.suffix != ".h" or ".." in path.parts or not path.is_relative_to(_PREFIX):
        return None
    below = path.relative_to(_PREFIX)
    wanted = (len(below.parts) == 1 and below.name.startswith("ap_")) or below.parts[0] == "etc"
    return str(below) if wanted and below.name not in _REFUSED else None


def _is_apache(text: bytes) -> bool:
    """True where a file's own header grants the Apache licence and nothing in it is called confidential."""
    return _LICENCE in text[:4096] and b"confidential" not in text[:8192].lower()
