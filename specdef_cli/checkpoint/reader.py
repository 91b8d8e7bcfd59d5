"""A checkpoint directory: its configuration, the files that its weights are in, and reading from them."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from specdef_cli.checkpoint.check import no_config, no_weights, require_plain
from specdef_cli.checkpoint.files import (
    GIT_LFS,
    INVALID_JSON,
    OTHER_FORMATS,
    PICKLES,
    SAFETENSORS,
    Library,
    TensorHeader,
    is_no_weights,
    lfs_pointer,
    library_of,
    read_headers,
    require_inside,
    unique_keys,
)
from specdef_cli.checkpoint.manifest import MANIFEST_NAME
from specdef_cli.errors import ResumableError, SpecDefError, dtype_name


def read_config(directory: Path) -> dict[str, Any]:
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
        marked = "BOM" in str(error)  # transformers reads no such file either
        remedy = "Save it as UTF-8 without a byte order mark." if marked else "Fetch the file again."
        raise SpecDefError(f"{path} is not valid JSON: {error}", remedy) from error
    if not isinstance(config, dict):
        raise SpecDefError(f"{path} is not a JSON object", "Fetch the file again.")
    return config


DTYPES: Mapping[str, torch.dtype] = {
    dtype_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}
"""What ``--dtype`` takes."""
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}  # fmt: skip
"""By safetensors' names of :data:`~specdef_cli.checkpoint.files.DTYPE_BYTES`."""
SAFETENSORS_DTYPES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory whose headers have been read and checked.

    Attributes:
        tensors: Headers by tensor name, in the order of the shards and of the data within them.
    """

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorHeader]

    @property
    def library(self) -> Library:
        return library_of(self.config)

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the safetensors files, in order."""
        return tuple(dict.fromkeys(header.shard for header in self.tensors.values()))

    @functools.cached_property
    def companions(self) -> Companions:
        """The other files of the directory, carried over or left out."""
        index = {self.library.index_file} if self.shards != (self.library.single_file,) else set()
        shapes = {name: header.shape for name, header in self.tensors.items()}
        carried: list[Path] = []
        left_out: dict[str, list[Path]] = {}
        for relative in _entries(self.directory):
            if relative.as_posix() in {*self.shards, *index, *REWRITTEN}:
                continue
            reason = _by_name(self.directory, relative) or _by_content(self.directory, relative, shapes)
            (carried if reason is None else left_out.setdefault(reason, [])).append(relative)
        return Companions(tuple(carried), {reason: tuple(paths) for reason, paths in left_out.items()})

    @property
    def nbytes(self) -> int:
        return sum(header.nbytes for header in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """Read one tensor into memory of its own, on the CPU, in its stored dtype."""
        header = self.tensors[name]
        buffer = torch.empty(header.nbytes, dtype=torch.uint8)
        return self._read_into(buffer, header, 0).view(TORCH_DTYPES[header.dtype]).view(header.shape)

    def read_rows(self, name: str, rows: range, buffer: Tensor | None = None) -> Tensor:
        """Read consecutive rows of one tensor, shape [rows, columns]; every dimension but the last counts rows.

        Args:
            buffer: Bytes to read into; memory of its own by default.
        """
        header = self.tensors[name]
        dtype, columns = TORCH_DTYPES[header.dtype], math.prod(header.shape[-1:])
        width = columns * dtype.itemsize
        if buffer is None:
            buffer = torch.empty(len(rows) * width, dtype=torch.uint8)
        read = self._read_into(buffer[: len(rows) * width], header, rows.start * width)
        return read.view(dtype).view(len(rows), columns)

    def row_blocks(self, name: str, nbytes: int) -> Iterator[tuple[int, Tensor]]:
        """All rows of one tensor, at most ``nbytes`` (or one row) at a time: the index of the first, and the rows.

        All pass through one buffer, as fresh memory costs as much as a read: rows are valid until the next are read.
        """
        shape = self.tensors[name].shape
        rows, width = math.prod(shape[:-1]), math.prod(shape[-1:]) * TORCH_DTYPES[self.tensors[name].dtype].itemsize
        step = max(1, min(rows, nbytes // max(1, width)))
        buffer = torch.empty(step * width, dtype=torch.uint8)
        for first in range(0, rows, step):
            yield first, self.read_rows(name, range(first, min(first + step, rows)), buffer)

    def _read_into(self, buffer: Tensor, header: TensorHeader, offset: int) -> Tensor:
        view, done = buffer.numpy().data, 0
        try:
            with (self.directory / header.shard).open("rb", buffering=0) as file:
                file.seek(header.begin + offset)
                while done < len(view):
                    read = file.readinto(view[done:])
                    if not read:
                        raise SpecDefError(
                            f"{header.shard} ends inside {header.name}", "The file is truncated: fetch it again."
                        )
                    done += read
        except OSError as error:
            raise ResumableError(
                f"{header.shard} cannot be read: {error.strerror or error}",
                "Check the disk and the file, then run the same command with --resume.",
            ) from error
        return buffer


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read ``config.json`` and the headers of every shard of a checkpoint directory."""
    for entry in _entries(directory):
        read = entry.as_posix() in REWRITTEN and (directory / entry).exists()
        if read or _by_name(directory, entry) is None:
            require_inside(directory, directory / entry)
    config = read_config(directory)
    library = library_of(config)
    require_plain(directory, config, library)
    order = (library.single_file, library.index_file)[:: 1 if library.is_transformers else -1]
    named = next((name for name in order if (directory / name).is_file()), None)
    if named == library.index_file:
        tensors = _read_sharded(directory, directory / named)
    elif named == library.single_file:
        tensors = read_headers(_inside(directory, named, library.index_file))
    else:
        raise no_weights(directory, library)
    if not tensors:
        raise SpecDefError(f"{directory} holds no tensors", "Fetch the checkpoint again.")
    return Checkpoint(directory, config, tensors)


def _read_sharded(directory: Path, index_path: Path) -> dict[str, TensorHeader]:
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)["weight_map"]
        shards = sorted(set(weight_map.values()), key=str)  # what a broken index names may be no text
    except (*INVALID_JSON, OSError) as error:
        raise SpecDefError(f"{index_path.name} is not a valid index: {error}", "Fetch the file again.") from error
    tensors: dict[str, TensorHeader] = {}
    for shard in shards:
        for name, header in read_headers(_inside(directory, shard, index_path.name)).items():
            if name in tensors:
                raise SpecDefError(
                    f"{name} is in {tensors[name].shard} and in {shard}", "Fetch the checkpoint again: it is mixed up."
                )
            if weight_map.get(name, shard) != shard:
                raise SpecDefError(
                    f"{index_path.name} puts {name} in {weight_map[name]}, but it is in {shard}",
                    "Fetch the index again.",
                )
            tensors[name] = header
    # What only the index names is missing if the model has a place for it, which is asked where the model is known.
    return tensors


def _inside(directory: Path, name: Any, index: str) -> Path:
    """The path of a shard, if its name is a plain file name and any link stays within the checkpoint or its cache."""
    if not isinstance(name, str) or name != os.path.basename(name) or name in {"", ".", ".."}:  # noqa: PTH119
        raise SpecDefError(f"{index} names the shard {name!r}", "A shard must be a file next to the index.")
    path = directory / name
    if not path.is_file():
        raise SpecDefError(f"{name} is missing from {directory}", "Fetch the checkpoint again.")
    if not path.name.endswith(".safetensors"):
        raise SpecDefError(f"{index} names the shard {name!r}", "Only safetensors files are read.")
    require_inside(directory, path)
    return path


# Written anew for every output.
REWRITTEN = frozenset({"config.json", "README.md", MANIFEST_NAME, "certificate.json"})
SHOWN = 8
"""Files that a note names one by one."""


@dataclass(frozen=True)
class Companions:
    """The files beside the weights, carried over or left out; paths relative to the directory."""

    carried: tuple[Path, ...]
    left_out: Mapping[str, tuple[Path, ...]]

    def note(self, done: str = "carried over") -> str | None:
        """Name what is left out, in one line; ``None`` if nothing is."""
        parts = []
        for reason, paths in self.left_out.items():
            names = [path.as_posix() for path in paths[:SHOWN]]
            more = [f"{len(paths) - SHOWN} more"] * (len(paths) > SHOWN)
            parts.append(f"{', '.join(names + more)} ({reason})")
        return f"Not {done}: {'; '.join(parts)}." if parts else None


def carry_over(source: Path, target: Path, files: Collection[Path]) -> None:
    for relative in files:
        require_inside(source, source / relative)
        destination = target / relative
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, destination)


def _entries(directory: Path) -> list[Path]:
    """List files; a hidden directory, or a link to one, counts as a file."""
    found: list[Path] = []
    waiting = [directory]
    while waiting:
        for path in waiting.pop().iterdir():
            if path.is_dir() and not path.is_symlink() and not _hidden(path):
                waiting.append(path)
            else:
                found.append(path.relative_to(directory))
    return sorted(found)


def _hidden(path: PurePath) -> bool:
    return path.name.startswith(".") or path.name == "__pycache__"


def _by_name(directory: Path, relative: Path) -> str | None:
    """Say why a file is left out, by its name and kind; ``None`` if it may be carried over."""
    path = directory / relative
    suffix = PurePath(path.name.removesuffix(".index.json")).suffix.lower()
    if _hidden(relative):
        return "hidden"
    if not path.is_file():
        return "a link to a directory" if path.is_dir() else "no file"
    if suffix in PICKLES:
        return "pickles are neither read nor copied"
    if suffix in OTHER_FORMATS:
        return "weights in another format, of the model as it was"
    if suffix != SAFETENSORS and not is_no_weights(path):
        return "a binary file that may hold weights of the model as it was"
    return None


def _by_content(directory: Path, relative: Path, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    folder = (directory / relative).parent
    if (folder / "adapter_config.json").is_file() and relative.stem.startswith("adapter_"):
        return "an adapter that was trained for the model as it was"
    if relative.name.endswith(f"{SAFETENSORS}.index.json"):
        belongs_here = relative.parent != Path() and any(
            not _is_copy(path, shapes) for path in folder.glob(f"*{SAFETENSORS}")
        )
        return None if belongs_here else "it names weights of the model as it was"
    if relative.suffix == SAFETENSORS and _is_copy(directory / relative, shapes):
        return "weights of the model as it was, which are not loaded"
    return None


def _is_copy(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a safetensors file holds tensors of the model once more: the same names, or much of the same shapes."""
    with contextlib.suppress(SpecDefError):  # a damaged file is carried over as it is
        headers = read_headers(path)
        if any(shapes.get(name) == header.shape for name, header in headers.items()):
            return True
        of_the_model = set(shapes.values())
        alike = sum(math.prod(header.shape) for header in headers.values() if header.shape in of_the_model)
        return 2 * alike > sum(map(math.prod, shapes.values()))
    return False
