"""Is the place for an output free? Asked before anything heavy is imported, and again before it is written."""

from __future__ import annotations

from pathlib import Path

from specdef_cli.checkpoint.durable import takes_files
from specdef_cli.errors import SpecDefError

WORK_SUFFIX = ".specdef-unfinished"
LOCK_SUFFIX = ".specdef-lock"


def require_usable(final: Path, model: str) -> None:
    """Refuse an output directory that is taken, or lies in the input where that is a directory."""
    source = Path(model).expanduser()
    if model and source.is_dir():
        require_outside(final, source)
    require_free(final)


def require_outside(final: Path, source: Path) -> None:
    """Refuse an output that lies in its own input."""
    if final.resolve().is_relative_to(source.resolve()):
        raise SpecDefError(f"the output {final} lies in the input {source}", "Choose a directory outside the input.")


def require_free(final: Path) -> None:
    """Refuse an output directory that is taken."""
    if is_taken(final):
        raise SpecDefError(f"the output {final} exists already", "Choose another --out, or remove it first.")


def is_taken(final: Path) -> bool:
    """Whether ``final`` is anything but absent or an empty directory; a new volume of ext4 has ``lost+found`` in it."""
    if final.is_symlink() or final.name in {"", ".."}:
        return True
    if not final.is_dir():
        return final.exists()
    ours = {f".{final.name}{suffix}" for suffix in (WORK_SUFFIX, LOCK_SUFFIX)}
    return not {path.name for path in final.iterdir()} <= {*ours, "lost+found"}


def require_manifest_place(path: Path, out: Path, model: str = "") -> None:
    """Refuse a place for a manifest that is taken, in the published directory or the model, or not writable."""
    if path.exists() or path.is_symlink():
        raise SpecDefError(f"--manifest-out {path} exists already", "Choose another file, or remove it first.")
    if path.resolve().is_relative_to(out.resolve()):
        raise SpecDefError(
            f"--manifest-out {path} lies in the directory that is published",
            "Choose a file outside of it, or leave the option out.",
        )
    if out.resolve().is_relative_to(path.resolve()):
        raise SpecDefError(
            f"--manifest-out {path} is a directory that --out {out} lies in", "Choose a file outside of --out."
        )
    source = Path(model).expanduser()
    if model and source.is_dir() and path.resolve().is_relative_to(source.resolve()):
        raise SpecDefError(
            f"--manifest-out {path} lies in the model {source}, which is not hardened", "Choose a file outside of it."
        )
    try:
        writable_ancestor(path.resolve().parent)
    except SpecDefError as error:
        raise SpecDefError(
            f"--manifest-out {path} cannot be written: {error.problem}", "Choose another file."
        ) from error


def writable_ancestor(directory: Path) -> Path:
    """The directory itself, or the nearest one above it that exists."""
    existing = directory.resolve()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not takes_files(existing):
        raise SpecDefError(f"{existing} is not a directory that can be written to", "Choose another --out.")
    return existing
