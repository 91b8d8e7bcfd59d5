"""Are there the models that a command names? Asked before anything heavy is imported: a wrong path is told in a moment.

What lies on the Hub is asked for later, when it is downloaded.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from specdef_cli.checkpoint.manifest import MANIFEST_NAME, base_of, find_manifest, is_hardened, read_manifest
from specdef_cli.checkpoint.other_directories import no_config
from specdef_cli.errors import SpecDefError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@.+)?")


def require_model(model: str, manifest: Path | None = None) -> Path | None:
    """Refuse a model that is not there.

    Args:
        manifest: What ``--manifest`` names.

    Returns:
        Its directory on this disk; ``None`` for a Hub id.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        find_manifest(path, manifest)
        if not (path / "config.json").is_file():
            raise no_config(path)
        return path
    if path.exists() or not _HUB_ID.fullmatch(model) or model.startswith("."):
        from specdef_cli.checkpoint.resolve import locate  # here: --help needs no huggingface_hub

        locate(model, None, None)  # raises with what is wrong, before anything is asked of the Hub
    return None


def require_hardened(model: str, manifest: Path | None = None) -> None:
    """Refuse a model that is not there, or that no manifest belongs to."""
    directory = require_model(model, manifest)
    if directory is not None:
        read_manifest(directory, manifest)


def require_directory(directory: Path) -> None:
    """Refuse what is no directory, where a Hub id will not do: its files are changed or uploaded."""
    if not directory.is_dir():
        raise SpecDefError(f"{directory} is not a directory", "Give one that `specdef harden` published.")


def require_card(model: str) -> None:
    """Refuse a model whose card cannot be written to: a Hub id, what is not hardened, or a directory without one."""
    directory = Path(model).expanduser()
    card = directory / "README.md"
    if not directory.is_dir():
        raise SpecDefError(f"--card writes to a directory, and {model} is none", "Leave --card out, or download it.")
    read_manifest(directory)
    if not card.is_file() or not os.access(card, os.W_OK):
        raise SpecDefError(f"{card} is not a file that can be written to", "Leave --card out, or restore it.")


def require_not_hardened(model: str) -> None:
    """Refuse a model that is not there, or whose manifest says that it is hardened."""
    directory = require_model(model)
    if directory is not None and is_hardened(directory):
        raise hardened_already(directory)


def hardened_already(directory: Path) -> SpecDefError:
    """What is said of a hardened model that is to be hardened."""
    return SpecDefError(f"{directory} is hardened already", "Give the base model, or run `specdef collapse` first.")


def require_models(model: str, base: str | None, option: str, manifest: Path | None = None) -> None:
    """Refuse models that are not there.

    Args:
        base: The undefended model; ``None`` is the one that the manifest names.
        manifest: What ``--manifest`` names.
    """
    directory = require_model(model, manifest)
    if base is not None:
        found = require_model(base)
        if found is not None:
            require_undefended(found, option)
    elif directory is not None:
        if find_manifest(directory, manifest) is None:
            raise no_base(model, option)
        name, _ = base_of(read_manifest(directory, manifest), directory)
        try:
            require_model(name)
        except SpecDefError as error:
            raise SpecDefError(
                f"the base {name} that the manifest of {model} names is not available: {error.problem}",
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
