"""Is the place for an output free? Asked before anything heavy is imported, and again before it is written."""

from __future__ import annotations

from pathlib import Path

from specdef_cli.errors import SpecDefError


def require_usable(final: Path, model: str) -> None:
    """Refuse an output directory that is taken, or lies in the input where that is a directory.

    Raises:
        SpecDefError: naming it.
    """
    source = Path(model).expanduser()
    if model and source.is_dir():
        require_outside(final, source)
    require_free(final)


def require_outside(final: Path, source: Path) -> None:
    """Refuse an output that lies in its own input.

    Raises:
        SpecDefError: naming both.
    """
    if final.resolve().is_relative_to(source.resolve()):
        raise SpecDefError(f"the output {final} lies in the input {source}", "Choose a directory outside the input.")


def require_free(final: Path) -> None:
    """Refuse an output directory that is taken.

    Raises:
        SpecDefError: naming it.
    """
    if is_taken(final):
        raise SpecDefError(f"the output {final} exists already", "Choose another --out, or remove it first.")


def is_taken(final: Path) -> bool:
    """Whether ``final`` is anything but absent or an empty directory that publishing may replace."""
    if final.is_symlink() or final.name in {"", ".."}:
        return True
    return final.exists() and not (final.is_dir() and not any(final.iterdir()))
