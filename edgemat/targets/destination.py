"""Where a project may be written: what an export would replace has to be an earlier export."""

from __future__ import annotations

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
