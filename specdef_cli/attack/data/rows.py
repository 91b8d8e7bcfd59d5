"""Rows of a data set: a file, a directory or a Hub id, read as they are needed."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import datasets

from specdef_cli.attack.options import AttackOptions
from specdef_cli.errors import SpecDefError

_FILE_FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".parquet": "parquet",
}

_SHUFFLE_SEED = 0
_SHUFFLE_BUFFER = 1000  # rows of a streamed data set that are drawn from


def rows(options: AttackOptions, *, shuffle: bool = False) -> Iterator[dict[str, Any]]:
    """Rows of the named data set. Images come as they are stored, not decoded.

    Args:
        options: Which data set.
        shuffle: Draw them in a random order, always the same. Labelled data is often stored class by class, and a short
            run would see one of them.

    Raises:
        SpecDefError: There is no such data set, it cannot be read, or it is empty.
    """
    assert options.dataset is not None
    arguments = _arguments(options)
    path = Path(options.dataset).expanduser()
    local = path.exists()
    if path.is_file() and not path.stat().st_size:
        raise _no_rows(options.dataset)
    try:
        # Files on this disk are small or mapped into memory; a Hub data set is streamed, because a short run reads
        # little of it.
        data = datasets.load_dataset(**arguments, streaming=not local)
        for column, feature in (data.features or {}).items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(column, datasets.Image(decode=False))
        if shuffle:
            data = data.shuffle(seed=_SHUFFLE_SEED, **({} if local else {"buffer_size": _SHUFFLE_BUFFER}))
        iterator = iter(data)
        first = next(iterator, None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # `datasets` wraps what went wrong in "An error occurred while generating the dataset".
        reason = (str(error.__cause__ or error).splitlines() or ["no reason given"])[0]
        raise SpecDefError(
            f"{options.dataset} cannot be read as a data set: {reason}",
            "Check its name, its split and the network; a local JSONL, text or parquet file needs none.",
        ) from error
    if first is None:
        raise _no_rows(options.dataset)
    return chain([first], iterator)


def _no_rows(dataset: str) -> SpecDefError:
    return SpecDefError(f"{dataset} has no rows", "Give a data set with something in it.")


def field(row: dict[str, Any], column: str, dataset: str) -> Any:
    """One column of a row.

    Raises:
        SpecDefError: There is none of that name.
    """
    if column not in row:
        raise SpecDefError(
            f"{dataset} has no column {column!r}",
            f"It has {', '.join(map(str, row))}; name one with --text-column, --image-column or --label-column.",
        )
    return row[column]


def as_text(value: Any, column: str, dataset: str) -> str:
    """What a column of text holds; a row without any counts as empty.

    Raises:
        SpecDefError: It holds something else.
    """
    if not isinstance(value, str | None):
        raise SpecDefError(
            f"column {column!r} of {dataset} holds {type(value).__name__}, not text",
            "Name a column of text with --text-column.",
        )
    return value or ""


def _arguments(options: AttackOptions) -> dict[str, Any]:
    """What ``datasets.load_dataset`` is called with."""
    assert options.dataset is not None
    path = Path(options.dataset).expanduser()
    arguments: dict[str, Any] = {"split": options.dataset_split or "train", "token": options.token}
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix not in _FILE_FORMATS:
            raise SpecDefError(
                f"{path} is of a kind that is not read: {suffix or 'no suffix'}",
                f"Give one of {', '.join(_FILE_FORMATS)}, or a Hub id.",
            )
        kind = _FILE_FORMATS[suffix]
        arguments |= {"path": kind, "data_files": glob.escape(str(path)), "split": "train"}
        if kind == "text":
            arguments["sample_by"] = "paragraph"
        return arguments
    if path.exists() and not path.is_dir():
        raise SpecDefError(f"{path} is not a file", "Give a file, a directory or a Hub id.")
    if not path.exists() and (
        path.suffix.lower() in _FILE_FORMATS or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", options.dataset)
    ):
        raise SpecDefError(f"there is no data file {path}", "Check the path, or give a Hub id.")
    return arguments | {"path": options.dataset, "name": options.dataset_config}
