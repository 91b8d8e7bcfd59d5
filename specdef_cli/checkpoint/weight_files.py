"""What a checkpoint directory names: its configuration, and the files that its weights are in.

Nothing here opens a weight file, so that it serves what is still arriving too.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from specdef_cli.checkpoint.headers import GIT_LFS, INVALID_JSON, lfs_pointer, unique_keys
from specdef_cli.checkpoint.library import Library, library_of
from specdef_cli.checkpoint.other_directories import no_config
from specdef_cli.errors import ResumableError, SpecDefError


def weight_files(directory: Path, arriving: Collection[str] = ()) -> tuple[str, ...]:
    """The weight files that a checkpoint directory names, in the order in which they are read."""
    library = library_of(read_config(directory))
    index_path = directory / library.index_file
    present = {path.name for path in (directory / library.single_file, index_path) if path.is_file()}
    if entry_file(library, {*present, *arriving}) != library.index_file:
        return (library.single_file,)
    return tuple(name for name in ordered_shards(weight_map_of(index_path)) if isinstance(name, str))


def read_config(directory: Path) -> dict[str, Any]:
    """A directory's ``config.json``."""
    path = directory / "config.json"
    if not path.is_file():
        raise no_config(directory)
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith(GIT_LFS.decode()):
            raise lfs_pointer("config.json")
        config = json.loads(text)
    except OSError as error:
        raise ResumableError(f"{path} cannot be read: {error.strerror or error}", "Check the file.") from error
    except INVALID_JSON as error:
        raise SpecDefError(f"{path} is not valid JSON: {error}", "Fetch the file again.") from error
    if not isinstance(config, dict):
        raise SpecDefError(f"{path} is not a JSON object", "Fetch the file again.")
    return config


def entry_file(library: Library, present: Collection[str]) -> str | None:
    """The file that the library starts from, the single one or the index, where it would find both."""
    order = (library.single_file, library.index_file)
    return next((name for name in (order if library.single_file_first else order[::-1]) if name in present), None)


def weight_map_of(index_path: Path) -> dict[str, Any]:
    """Tensor name → shard, as an index has them."""
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)["weight_map"]
        set(weight_map.values())
    except (*INVALID_JSON, OSError) as error:
        raise SpecDefError(f"{index_path.name} is not a valid index: {error}", "Fetch the file again.") from error
    return dict(weight_map)


def ordered_shards(weight_map: Mapping[str, Any]) -> list[Any]:
    """The shards of an index, in the order in which they are read. What a broken index names may be no text."""
    return sorted(set(weight_map.values()), key=str)
