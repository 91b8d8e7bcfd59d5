"""Is there what an attack names? Asked before anything heavy is imported: a wrong path is told in a moment.

What lies on the Hub is asked for later, when it is downloaded.
"""

from __future__ import annotations

import re
from pathlib import Path

from specdef_cli.checkpoint.manifest import base_of, is_hardened, keep_elsewhere, read_manifest
from specdef_cli.checkpoint.resolve import locate
from specdef_cli.errors import SpecDefError

FILE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".text", ".md", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
"""Suffixes that may stand behind these; `datasets` unpacks them."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@.+)?")


def require_models(model: str, control: str | None, option: str, manifest: Path | None = None) -> None:
    """Refuse models that are not there.

    Args:
        model: What is attacked or certified.
        control: The undefended model; ``None`` is the one that the manifest names.
        option: What names the control.
        manifest: What ``--manifest`` names.

    Raises:
        SpecDefError: naming the one that is missing.
    """
    directory = _local(model)
    if directory is not None:
        keep_elsewhere(directory, manifest)
    if control is not None:
        _local(control)
    elif directory is not None and is_hardened(directory):
        name, _ = base_of(read_manifest(directory), directory)
        try:
            _local(name)
        except SpecDefError as error:
            raise SpecDefError(
                f"the base {name} that the manifest of {model} names is not available: {error.problem}",
                f"Give its directory or Hub id with {option}.",
            ) from error


def _local(model: str) -> Path | None:
    """The directory of a model on this disk; ``None`` for a Hub id."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not _HUB_ID.fullmatch(model) or model.startswith("."):
        locate(model, None, None)  # which says what is wrong with it, and asks nobody
    return None


def require_data(dataset: str | None) -> None:
    """Refuse a data set that is a path to nothing.

    Raises:
        SpecDefError: naming it.
    """
    if dataset is None:
        return
    path = Path(dataset).expanduser()
    like_a_file = path.suffix.lower() in (*FILE_SUFFIXES, *COMPRESSIONS)
    if not path.exists() and (like_a_file or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset)):
        raise SpecDefError(f"there is no data file {path}", "Check the path, or give a Hub id.")
