"""Small files that are on disk whole, or not at all."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

UNFINISHED_SUFFIX = ".partial"
"""What a write that was killed leaves is a hidden file of this suffix."""


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary sibling's name, flush it, and rename it into place.

    Any number of processes may write the same file: whichever comes last wins, and no reader sees a part.

    Args:
        content: Text is written in UTF-8.

    Raises:
        OSError: The disk; an earlier file of that name is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sibling = path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED_SUFFIX}")
    try:
        with sibling.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        sibling.replace(path)
    finally:
        sibling.unlink(missing_ok=True)


def takes_files(directory: Path) -> bool:
    """Whether a file can be made in a directory. Permissions do not tell: a file system may refuse all the same."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False


def remove_unfinished(directory: Path) -> None:
    """Remove the files that killed writes have left. The caller must be the only writer there."""
    for path in directory.glob(f".*{UNFINISHED_SUFFIX}"):
        path.unlink(missing_ok=True)
