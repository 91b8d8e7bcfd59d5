"""Where a model's files may lie: in its directory or a folder of it; no link may pull in other files of the machine."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from specdef_cli.errors import SpecDefError, WrongUsage


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


def in_subfolder(model: str, subfolder: str | None) -> tuple[str, str | None]:
    """A model and the folder of its repository that it is in; of a directory on this disk, that folder itself."""
    if subfolder is None:
        return model, None
    parts = PurePosixPath(subfolder).parts
    if not parts or ".." in parts or parts[0] == "/" or "\\" in subfolder:
        raise WrongUsage(f"the subfolder {subfolder!r} does not lie in {model}", "Name a folder of it, such as unet.")
    inside = "/".join(parts)
    if not (model and Path(model).expanduser().is_dir()):
        return model, inside
    folder = Path(model).expanduser() / inside
    if not folder.is_dir():
        raise SpecDefError(f"{model} has no folder {inside}", "Check --subfolder, or leave it out.")
    return str(folder), None
