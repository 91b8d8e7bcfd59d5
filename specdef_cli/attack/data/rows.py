"""Rows of a data set: a file, a directory or a Hub id, read by ``datasets`` as they are needed."""

from __future__ import annotations

import errno
import glob
import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import get_data_patterns
from transformers import PreTrainedTokenizerBase

from specdef_cli.attack.options import COMPRESSIONS, AttackOptions
from specdef_cli.checkpoint.files import takes_files
from specdef_cli.errors import SpecDefError

_FILE_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".txt": ("text", {"sample_by": "paragraph"}),
    ".text": ("text", {"sample_by": "paragraph"}),
    ".md": ("text", {"sample_by": "paragraph"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
"""The builder of `datasets` for a file's suffix, and its arguments."""

_COMPRESS_THEMSELVES = ("parquet", "arrow")
"""Builders that read no file that was compressed once more."""

_UNPACKED_BY = {".gz": "gunzip", ".zst": "unzstd", ".bz2": "bunzip2", ".xz": "unxz"}

_CARD = "README.md"
"""Not data, and where it is there it may say which files belong to which configuration."""

_REMARKS = (_CARD, "config.json", "dataset_info.json", "dataset_infos.json")
"""What lies beside data and is none."""

_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Files by which a directory that ``save_to_disk`` wrote is known."""

_SHUFFLE_SEED = 0
_SHUFFLE_BUFFER = 1000  # rows of a streamed data set that are drawn from


def rows(
    options: AttackOptions, *, shuffle: bool = False, classes: Mapping[str, int] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of the named data set; at least one. Images and sound come as they are stored, not decoded.

    Args:
        classes: The numbers of classes by name: a data set that knows its classes' names is numbered so.
        shuffle: Draw them in a random order, always the same. Labelled data is often stored class by class, and a short
            run would see one of them.
    """
    assert options.dataset is not None
    path = Path(options.dataset).expanduser()
    if path.is_file() and not path.stat().st_size:
        raise _no_rows(options.dataset)
    try:
        # Files on this disk are small or mapped into memory; a Hub data set is streamed, because a short run reads
        # little of it.
        local = path.exists()
        data = _load(options, path)
        for column, feature in (data.features or {}).items():
            if isinstance(feature, datasets.Image | datasets.Audio | datasets.Video):
                data = data.cast_column(column, type(feature)(decode=False))
        if shuffle:
            data = data.shuffle(seed=_SHUFFLE_SEED, **({} if local else {"buffer_size": _SHUFFLE_BUFFER}))
        iterator = iter(data)
        renumbered = _renumbering((data.features or {}).get(options.label_column), classes or {})
        if renumbered:
            column = options.label_column
            iterator = ({**row, column: _renumber(row[column], renumbered)} for row in iterator)
        first = next(iterator, None)
    except (OSError, ValueError, RuntimeError, ImportError, StopIteration, datasets.exceptions.DatasetsError) as error:
        raise _cannot_be_read(options, path, error) from error
    if first is None:
        raise _no_rows(options.dataset)
    return chain([first], iterator)


def _renumbering(feature: Any, classes: Mapping[str, int]) -> dict[int, int]:
    """Map a class label's numbers to those in ``classes``; empty unless ``classes`` has all of its names."""
    feature = getattr(feature, "feature", feature)  # of a list of labels
    names = feature.names if isinstance(feature, datasets.ClassLabel) else []
    return dict(enumerate(class_numbers(names, classes).values()))


def class_numbers(labels: Collection[Any], classes: Mapping[str, int]) -> dict[Any, int]:
    """Number labels by name, ignoring case; empty unless ``classes`` has all of the names."""

    def plain(name: Any) -> Any:
        return name.strip().casefold() if isinstance(name, str) else name

    for spelled in (lambda name: name, plain):
        known = {spelled(name): number for name, number in classes.items()}
        if len(known) == len(classes) and all(spelled(label) in known for label in labels):
            return {label: known[spelled(label)] for label in labels}
    return {}


def _renumber(label: Any, numbers: Mapping[int, int]) -> Any:
    return [numbers.get(one, one) for one in label] if isinstance(label, list) else numbers.get(label, label)


def _load(options: AttackOptions, path: Path) -> Any:
    """Load the requested split with `datasets`."""
    split = options.dataset_split or "train"
    if path.is_file():
        _require_no_choice(options, path)
        kind, arguments = _file_format(path)
        files = glob.escape(os.path.abspath(path))  # noqa: PTH100 (resolve() would lose the name of a link)
        _require_cache()
        return datasets.load_dataset(kind, data_files=files, split="train", **arguments)
    if path.is_dir():
        if (path / _SAVED).is_file():
            _require_no_choice(options, path)
            return datasets.load_from_disk(str(path))
        if (path / _SAVED_SPLITS).is_file():
            splits = datasets.load_from_disk(str(path))
            if split not in splits:
                raise ValueError(f'Unknown split "{split}". Should be one of {list(splits)}.')
            return splits[split]
        inside = [file for file in path.rglob("[!.]*") if file.is_file()]
        _require_one_kind(path, inside)
        _require_cache()
        if _holds_text(path, inside):  # which `datasets` would read by line, and Markdown not at all
            kind, arguments = _FILE_FORMATS[".txt"]
            return datasets.load_dataset(kind, data_files=_splits(path), split=split, **arguments)
        return datasets.load_dataset(
            str(path), options.dataset_config, split=split, data_files=_patterns(path), token=options.token
        )
    if path.exists():
        raise SpecDefError(f"{path} is not a file", "Give a file, a directory or a Hub id.")
    return datasets.load_dataset(
        options.dataset, options.dataset_config, split=split, streaming=True, token=options.token
    )


def _require_no_choice(options: AttackOptions, path: Path) -> None:
    """Refuse to choose a configuration or split where there is only one."""
    chosen = {"--dataset-config": options.dataset_config, "--dataset-split": options.dataset_split}
    for flag, value in chosen.items():
        if value not in (None, "train", "default"):
            raise SpecDefError(f"{path} has no choice of {flag} {value!r}", f"Leave {flag} out.")


def _suffixes(path: Path) -> tuple[str, str]:
    """Return the suffixes for format and compression; empty where there is none."""
    other, last = ["", "", *(suffix.lower() for suffix in path.suffixes)][-2:]
    return (other, last) if last in COMPRESSIONS else (last, "")


def _file_format(path: Path) -> tuple[str, dict[str, Any]]:
    suffix, compression = _suffixes(path)
    if suffix not in _FILE_FORMATS:
        raise SpecDefError(
            f"{path} is of a kind that is not read: {path.suffix or 'no suffix'}",
            f"Give a directory, a Hub id, or one of {', '.join(_FILE_FORMATS)}; all but the last two also with "
            f"{', '.join(COMPRESSIONS)}.",
        )
    kind, arguments = _FILE_FORMATS[suffix]
    if compression and kind in _COMPRESS_THEMSELVES:
        raise SpecDefError(
            f"{path} is a compressed {suffix} file, which `datasets` does not read",
            f"Unpack it first: {_UNPACKED_BY[compression]} {shlex.quote(str(path))}.",
        )
    return kind, arguments


def _holds_text(directory: Path, files: Sequence[Path]) -> bool:
    """Whether all files are text or Markdown, and no card says more of them."""
    return not (directory / _CARD).is_file() and all(
        _FILE_FORMATS.get(_suffixes(path)[0], ("",))[0] == "text" for path in files
    )


def _require_one_kind(directory: Path, files: Sequence[Path]) -> None:
    """Refuse a directory without data, and one with several kinds: `datasets` reads the commonest and drops the others.

    Text beside another kind is taken for remarks on it, and what `datasets` itself writes is no data. A card is left to
    `datasets`, since it may say what belongs together.
    """
    data = [path for path in files if path.name not in _REMARKS]
    if not data:
        raise SpecDefError(f"{directory} holds no data", "Name a file, or a directory with some in it.")
    kinds: dict[tuple[str, str], str] = {}
    for path in data:
        suffix = _suffixes(path)[0]
        builder, arguments = _FILE_FORMATS.get(suffix, ("", {}))
        if builder not in ("", "text"):
            kinds.setdefault((builder, str(arguments)), suffix)
    if len(kinds) > 1 and not (directory / _CARD).is_file():
        raise SpecDefError(
            f"{directory} holds data of several kinds: {', '.join(sorted(kinds.values()))}",
            "Name one of its files, or a directory of one kind.",
        )


def _splits(directory: Path) -> dict[str, list[str]]:
    """The files of each split, by their names as `datasets` takes them."""
    escaped = glob.escape(str(directory.resolve()))
    found = get_data_patterns(escaped)
    return {str(split): [f"{escaped}/{pattern}" for pattern in patterns] for split, patterns in found.items()}


def _patterns(directory: Path) -> dict[str, list[str]] | None:
    """The files of each split, if the directory's name has a character that `datasets` takes for a wildcard."""
    absolute = str(directory.resolve())
    return None if glob.escape(absolute) == absolute else _splits(directory)


def _require_cache() -> None:
    """Check that `datasets` can write to its cache."""
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not takes_files(cache):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise SpecDefError(
            f"the cache of datasets, {cache}, cannot be written to: {error.strerror}",
            "Set HF_DATASETS_CACHE to a directory that can.",
        ) from error


def _cannot_be_read(options: AttackOptions, path: Path, error: BaseException) -> SpecDefError:
    name = str(options.dataset)
    cause = error.__cause__ or error  # `datasets` wraps what went wrong in "An error occurred while generating …"
    text = str(cause)
    listed = re.search(r"(?:available configs|Available|Should be one of):? (\[.*?\])", text)
    choices = re.findall(r"'([^']+)'", listed.group(1)) if listed else []
    if choices and "config" in text.lower():
        asked = f"no configuration {options.dataset_config!r}" if options.dataset_config else "several configurations"
        return SpecDefError(f"{name} has {asked}: {', '.join(choices)}", f"Choose one: --dataset-config {choices[0]}.")
    if choices and "split" in text:
        return SpecDefError(
            f"{name} has no split {options.dataset_split or 'train'!r}: {', '.join(choices)}",
            f"Choose one: --dataset-split {choices[0]}.",
        )
    if (isinstance(cause, ImportError) and "zstandard" in text) or ("compression" in text and ".zst" in name):
        return SpecDefError(f"{name} is compressed with Zstandard, which is not installed", "pip install zstandard")
    if isinstance(error, StopIteration):
        return _no_rows(name)
    reason = (text.splitlines() or ["no reason given"])[0]
    remedy = (
        "Check that it is what its suffix says, and encoded in UTF-8."
        if path.exists()
        else "Check its name, its split and the network; a local file or directory needs none."
    )
    return SpecDefError(f"{name} cannot be read as a data set: {reason}", remedy)


def _no_rows(dataset: str) -> SpecDefError:
    return SpecDefError(f"{dataset} has no rows", "Give a data set with something in it.")


def column_of(row: Any, column: str, dataset: str) -> Any:
    if column not in row:
        raise SpecDefError(
            f"{dataset} has no column {column!r}",
            f"It has {', '.join(map(str, row))}; name one with --text-column, --text-pair-column, --image-column or "
            "--label-column.",
        )
    return row[column]


def as_text(value: Any, column: str, dataset: str) -> str:
    """Check that a column holds text, and strip a file's byte order mark; no text counts as empty."""
    if not isinstance(value, str | None):
        raise SpecDefError(
            f"column {column!r} of {dataset} holds {type(value).__name__}, not text",
            "Name a column of text with --text-column.",
        )
    return (value or "").removeprefix("\ufeff")


def padding_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the padding token; a tokenizer without one gets its end of text, as in most recipes."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer.pad_token_id
