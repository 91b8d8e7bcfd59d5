"""Where a model's files may lie: in its directory or a folder of it; no link may pull in other files of the machine."""

from __future__ import annotations

from pathlib import Path

from specdef_cli.errors import SpecDefError


def require_inside(directory: Path, path: Path) -> None:
    """Check that ``path`` lies in ``directory``, or in the blobs of the Hub cache that ``directory`` is part of."""
    root = directory.resolve()
    # In the Hub cache, snapshots/<commit>/<file> links to blobs/<hash>; the directory may be a folder of the snapshot.
    caches = (place.parent.parent for place in (root, *root.parents) if place.parent.name == "snapshots")
    allowed = (root, *(cache / "blobs" for cache in caches))
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise SpecDefError(
            f"{path.relative_to(directory)} is a link that leaves {directory}", "Replace the link by the file itself."
        )
