"""Is what a command names there, and may its output be written? Asked before anything heavy is imported."""

from __future__ import annotations

import os
import re
from pathlib import Path

from specdef_cli.checkpoint.durable import takes_files
from specdef_cli.checkpoint.manifest import MANIFEST_NAME, base_of, find_manifest, is_hardened, read_manifest
from specdef_cli.checkpoint.other_directories import no_config
from specdef_cli.errors import SpecDefError
from specdef_cli.option import Source

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@.+)?")


def require_model(source: Source) -> Path | None:
    """Refuse a model that is not there; its directory on this disk, or ``None`` for a Hub id."""
    model = str(source.model)
    path = Path(model).expanduser()
    if path.is_dir():
        find_manifest(path, source.manifest)
        if not (path / "config.json").is_file():
            raise no_config(path)
        return path
    if path.exists() or not _HUB_ID.fullmatch(model) or model.startswith("."):
        from specdef_cli.checkpoint.resolve import locate  # here: --help needs no huggingface_hub

        locate(model)  # raises with what is wrong, before anything is asked of the Hub
    return None


def require_hardened(source: Source) -> None:
    """Refuse a model that is not there, or that no manifest belongs to."""
    directory = require_model(source)
    if directory is not None:
        read_manifest(directory, source.manifest)


def require_directory(directory: Path) -> None:
    """Refuse what is no directory, where a Hub id will not do: its files are changed or uploaded."""
    if not directory.is_dir():
        raise SpecDefError(f"{directory} is not a directory", "Give one that `specdef harden` published.")


def require_card(source: Source) -> None:
    """Refuse a model whose card cannot be written to: a Hub id, what is not hardened, or a directory without one."""
    directory = Path(source.model).expanduser()
    card = directory / "README.md"
    if not directory.is_dir():
        raise SpecDefError(
            f"--card writes to a directory, and {source.model} is none", "Leave --card out, or download it."
        )
    read_manifest(directory, source.manifest)
    if not card.is_file() or not os.access(card, os.W_OK):
        raise SpecDefError(f"{card} is not a file that can be written to", "Leave --card out, or restore it.")


def require_not_hardened(source: Source) -> None:
    """Refuse a model that is not there, or whose manifest says that it is hardened."""
    directory = require_model(source)
    if directory is not None and is_hardened(directory):
        raise hardened_already(directory)


def hardened_already(directory: Path) -> SpecDefError:
    """What is said of a hardened model that is to be hardened."""
    return SpecDefError(f"{directory} is hardened already", "Give the base model, or run `specdef collapse` first.")


def require_models(source: Source, base: str | Path | None, option: str) -> None:
    """Refuse models that are not there; without ``base``, the undefended model is the one that the manifest names."""
    directory = require_model(source)
    if base is not None:
        found = require_model(Source(base))
        if found is not None:
            require_undefended(found, option)
    elif directory is not None:
        if find_manifest(directory, source.manifest) is None:
            raise no_base(source.model, option)
        name, _ = base_of(read_manifest(directory, source.manifest), directory)
        try:
            require_model(Source(name))
        except SpecDefError as error:
            raise SpecDefError(
                f"the base {name} that the manifest of {source.model} names is not available: {error.problem}",
                f"Give its directory or Hub id with {option}.",
            ) from error


def require_undefended(base: Path, option: str) -> None:
    """Refuse a base that is hardened itself: measured against it, any hardening would seem to do nothing."""
    if (base / MANIFEST_NAME).is_file():
        raise SpecDefError(
            f"{option} {base} is hardened itself: its {MANIFEST_NAME} says so",
            f"Name the undefended model with {option}, or leave it out where the manifest names that.",
        )


def no_base(model: str | Path, option: str) -> SpecDefError:
    """What is said of a model without a manifest where its base is not named either."""
    return SpecDefError(
        f"{model} has no manifest that names its base, so there is nothing to compare it with",
        f"Name the undefended model with {option}.",
    )


WORK_SUFFIX = ".specdef-unfinished"
LOCK_SUFFIX = ".specdef-lock"


def require_usable(final: Path, model: str | Path) -> None:
    """Refuse an output directory that is taken, or lies in the input where that is a directory."""
    source = Path(model).expanduser()
    if str(model) and source.is_dir():
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


def require_manifest_place(path: Path, out: Path, model: str | Path = "") -> None:
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
    if str(model) and source.is_dir() and path.resolve().is_relative_to(source.resolve()):
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
