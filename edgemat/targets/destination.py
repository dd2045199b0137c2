"""Where a project may be written, and how: whole or not at all.

What an export would replace has to be an earlier export; it goes only when its successor stands complete beside it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from edgemat.errors import EdgematError

SIGNATURE = b"enerated by edgemat"
"""Stands in the first lines of every generated source."""


def check_destination(output: Path, target: str, marker: str) -> None:
    """Refuses to replace what edgemat did not write.

    Args:
        output: Folder an export is to write.
        target: Name of the target, for the message.
        marker: Name of a file at the top of every project of that target.

    Raises:
        EdgematError: `output` is a file, the current folder or one above it, or a folder with other contents.
    """
    here = Path.cwd()
    if output.resolve() in (here, *here.parents):
        raise EdgematError(
            f"{output} holds the current folder and is not an edgemat {target} project that could be replaced from "
            "here; name a new folder"
        )
    if not output.exists():
        return
    if not output.is_dir() or (any(output.iterdir()) and not _signed(output / marker)):
        raise EdgematError(
            f"{output} exists and is not an edgemat {target} project; choose another folder or remove it"
        )


def _signed(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return SIGNATURE in file.read(1024)


def write_files(files: Mapping[str, str | bytes], folder: Path) -> None:
    """Writes files below a folder; texts as UTF-8 with Unix line ends."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def write_project(files: Mapping[str, str | bytes], output: Path, target: str, marker: str) -> Path:
    """Writes a project; an earlier one at that place is replaced when the new one is complete.

    Args:
        files: Contents by relative path.
        output: Folder to write.
        target: Name of the target, for messages.
        marker: Name of a file at the top of every project of that target.

    Returns:
        The folder.

    Raises:
        EdgematError: it cannot be written; what was there is still there, and nothing else.
    """
    check_destination(output, target, marker)
    staging = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        write_files(files, staging / "new")
        if output.exists():
            output.rename(staging / "old")
        try:
            (staging / "new").rename(output)
        except BaseException:
            if (staging / "old").exists():
                (staging / "old").rename(output)
            raise
    except OSError as error:
        raise EdgematError(
            f"folder {output} cannot be written ({error.strerror}); make room or choose another"
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return output
