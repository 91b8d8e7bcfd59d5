"""Read a checkpoint directory lazily: headers at once, tensors one by one, nothing mapped into memory.

A checkpoint is somebody else's data. Before a byte of it is used, its index may only name files next to it, its
headers must describe exactly the bytes that are there, and a tensor may exist only once.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from specdef_cli.checkpoint.companions import companion_files
from specdef_cli.checkpoint.library import DIFFUSERS, TRANSFORMERS, Library, library_of
from specdef_cli.checkpoint.links import require_inside
from specdef_cli.errors import SpecDefError

SINGLE_FILE = TRANSFORMERS.single_file
INDEX_FILE = TRANSFORMERS.index_file
# The format's own limit on its JSON header; a larger length is a corrupt file.
MAX_HEADER_BYTES = 100_000_000
# What json.loads raises on data made to be refused (deep nesting is a RecursionError), and what a wrong type then does.
INVALID_JSON = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
PICKLED_WEIGHTS = ("*pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "U16": torch.uint16,
        "U32": torch.uint32,
        "U64": torch.uint64,
        "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "C64": torch.complex64,
    }
)
SAFETENSORS_DTYPES: Mapping[torch.dtype, str] = MappingProxyType({v: k for k, v in TORCH_DTYPES.items()})
FLOATING_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


class ResumableError(SpecDefError):
    """Neither the input nor an option is at fault (the disk is): what is finished is kept for ``--resume``."""


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as its shard's header describes it.

    Attributes:
        name: Name in the file.
        dtype: As safetensors names it, e.g. ``BF16``.
        shape: Its dimensions.
        shard: Name of the file.
        begin, end: Its bytes, counted from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.end - self.begin


class Arriving(Protocol):
    """Shards that are on their way into the directory.

    Attributes:
        nbytes: What they take there.
    """

    nbytes: int

    def __contains__(self, name: str) -> bool:
        """Whether this shard is, or was, among them."""

    def headers(self, name: str) -> Mapping[str, TensorHeader]:
        """Its tensor headers, checked as :func:`read_headers` does."""

    def part(self, name: str, begin: int, end: int) -> bytes | None:
        """A few of its bytes from where it comes from; ``None`` if they have to be read in the directory."""

    def wait(self, name: str) -> None:
        """Return once it is in the directory, as any other shard is."""

    def wait_for_all(self) -> None:
        """Return once all are."""

    def stop(self) -> None:
        """Have whoever waits wait no longer."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory whose headers have been read and checked.

    Attributes:
        directory: Where it lies.
        config: ``config.json``.
        tensors: Headers by tensor name, in the order of the shards and of the data within them.
        arriving: The shards that are not there yet; ``None`` if all are.
    """

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorHeader]
    arriving: Arriving | None = None

    @property
    def library(self) -> Library:
        """Who can load it."""
        return library_of(self.config)

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the safetensors files, in order."""
        return tuple(dict.fromkeys(header.shard for header in self.tensors.values()))

    @property
    def nbytes(self) -> int:
        """Size of all tensors together in bytes."""
        return sum(header.nbytes for header in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """Read one tensor into memory of its own, on the CPU, in its stored dtype.

        Raises:
            SpecDefError: The file ended early.
            ResumableError: It could not be read.
        """
        header = self.tensors[name]
        return self._read_bytes(header, 0, header.nbytes).view(TORCH_DTYPES[header.dtype]).view(header.shape)

    def read_rows(self, name: str, rows: range) -> Tensor:
        """Read consecutive rows of one tensor, shape [rows, columns]; every dimension but the last counts rows.

        Rows of a shard that is still on its way are read from where it comes from.

        Raises:
            SpecDefError: The file ended early.
            ResumableError: It could not be read.
        """
        header = self.tensors[name]
        width = header.shape[-1] * TORCH_DTYPES[header.dtype].itemsize
        offset, count = rows.start * width, len(rows) * width
        part = None
        if self.arriving is not None and count:
            part = self.arriving.part(header.shard, header.begin + offset, header.begin + offset + count)
        data = (
            self._read_bytes(header, offset, count)
            if part is None
            else torch.frombuffer(bytearray(part), dtype=torch.uint8)
        )
        return data.view(TORCH_DTYPES[header.dtype]).view(len(rows), header.shape[-1])

    def chunks(self, name: str, buffer: bytearray) -> Iterator[memoryview]:
        """The bytes of one tensor, as much at a time as ``buffer`` holds; the next chunk overwrites the one before.

        Raises:
            SpecDefError: The file ended early.
            ResumableError: It could not be read.
        """
        header = self.tensors[name]
        remaining = header.nbytes
        view = memoryview(buffer)
        while remaining:
            with self._reading(header, header.nbytes - remaining) as file:
                count = file.readinto(view[:remaining])
            if not count:
                raise _truncated(header)
            remaining -= count
            yield view[:count]

    def _read_bytes(self, header: TensorHeader, offset: int, count: int) -> Tensor:
        buffer = torch.empty(count, dtype=torch.uint8)
        view = buffer.numpy().data
        done = 0
        with self._reading(header, offset) as file:
            while done < count:
                read = file.readinto(view[done:])
                if not read:
                    raise _truncated(header)
                done += read
        return buffer

    @contextlib.contextmanager
    def _reading(self, header: TensorHeader, offset: int = 0) -> Iterator[io.FileIO]:
        if self.arriving is not None:
            self.arriving.wait(header.shard)
        try:
            with (self.directory / header.shard).open("rb", buffering=0) as file:
                file.seek(header.begin + offset)
                yield file
        except OSError as error:
            raise ResumableError(
                f"{header.shard} cannot be read: {error.strerror or error}",
                "Check the disk and the file, then run the same command with --resume.",
            ) from error


def open_checkpoint(directory: Path, arriving: Arriving | None = None) -> Checkpoint:
    """Read ``config.json`` and the headers of every shard of a checkpoint directory.

    Args:
        directory: Where it lies.
        arriving: Shards that are not there yet.

    Raises:
        SpecDefError: Something is missing, corrupt, or unsafe to read.
    """
    for name in ("config.json", INDEX_FILE, DIFFUSERS.index_file, "README.md", "specdef.json"):
        if (directory / name).exists():
            require_inside(directory, directory / name)
    for companion in companion_files(directory):
        require_inside(directory, directory / companion)
    config = _read_config(directory)
    library = library_of(config)
    index_path, single = directory / library.index_file, directory / library.single_file
    tensors: Mapping[str, TensorHeader]
    if index_path.is_file():
        tensors = _read_sharded(directory, index_path, arriving)
    elif single.is_file() or (arriving is not None and single.name in arriving):
        tensors = _shard_headers(directory, single.name, library.index_file, arriving)
    else:
        raise _no_weights(directory, library)
    if not tensors:
        raise SpecDefError(f"{directory} holds no tensors", "Fetch the checkpoint again.")
    return Checkpoint(directory, MappingProxyType(config), MappingProxyType(dict(tensors)), arriving)


def weight_files(directory: Path) -> tuple[str, ...]:
    """The weight files that a checkpoint directory names, in the order in which they are read.

    Raises:
        SpecDefError: ``config.json`` is missing or broken, or the index is.
    """
    library = library_of(_read_config(directory))
    index_path = directory / library.index_file
    if not index_path.is_file():
        return (library.single_file,)
    return tuple(name for name in _ordered_shards(_weight_map(index_path)) if isinstance(name, str))


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """Read and check the header of one safetensors file: tensor headers in the order of their data.

    Raises:
        SpecDefError: The header is not valid JSON, or does not describe exactly the file's bytes.
    """
    try:
        with path.open("rb") as file:
            return parse_headers(file.read, path.name, path.stat().st_size)
    except OSError as error:
        raise SpecDefError(f"{path.name} cannot be read: {error}", "Check the disk and the file.") from error


def parse_headers(read: Callable[[int], bytes], shard: str, size: int) -> dict[str, TensorHeader]:
    """Check the header of a safetensors file that is read from its start.

    Args:
        read: Reads the next so many bytes.
        shard: The file's name.
        size: Its size in bytes.

    Raises:
        SpecDefError: As :func:`read_headers`.
    """
    corrupt = functools.partial(_corrupt_file, shard)
    if size < 8:
        raise corrupt("it is shorter than a header")
    (length,) = struct.unpack("<Q", read(8))
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise corrupt(f"its header claims {length} bytes")
    text = read(length)
    try:
        entries = json.loads(text, object_pairs_hook=_unique_keys)
        headers = [
            _tensor_header(name, entry, shard, 8 + length) for name, entry in entries.items() if name != "__metadata__"
        ]
    except INVALID_JSON as error:
        raise corrupt(f"its header is invalid: {error}") from error
    headers.sort(key=lambda header: (header.begin, header.end))
    position = 8 + length
    for header in headers:
        if header.begin != position:
            raise corrupt(f"the data of {header.name} does not follow the tensor before it")
        position = header.end
    if position != size:
        raise corrupt(f"its header describes {position} bytes and the file has {size}")
    return {header.name: header for header in headers}


def _tensor_header(name: str, entry: dict[str, Any], shard: str, data_start: int) -> TensorHeader:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    dtype = entry["dtype"]
    if not all(isinstance(value, int) and value >= 0 for value in (begin, end, *shape)):
        raise ValueError(f"{name} has an invalid shape or offset")
    if dtype not in TORCH_DTYPES:
        raise SpecDefError(
            f"{name} in {shard} is stored as {dtype}, which is not read here",
            "Give the checkpoint in an ordinary dtype, such as the unquantized one.",
        )
    expected = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
    if end - begin != expected:
        raise ValueError(f"{name} is {dtype} {list(shape)}, which is {expected} bytes and not {end - begin}")
    return TensorHeader(name, dtype, shape, shard, data_start + begin, data_start + end)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} appears twice")
    return result


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        hint = "Give a directory that transformers can load."
        if (directory / "model_index.json").is_file():
            hint = f"It is a pipeline of diffusers; give one of its models, such as {directory / 'unet'}."
        raise SpecDefError(f"{directory} has no config.json", hint)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResumableError(f"{path} cannot be read: {error.strerror or error}", "Check the file.") from error
    except INVALID_JSON as error:
        raise SpecDefError(f"{path} is not valid JSON: {error}", "Fetch the file again.") from error
    if not isinstance(config, dict):
        raise SpecDefError(f"{path} is not a JSON object", "Fetch the file again.")
    return config


def _weight_map(index_path: Path) -> dict[str, Any]:
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)["weight_map"]
        set(weight_map.values())
    except (*INVALID_JSON, OSError) as error:
        raise SpecDefError(f"{index_path.name} is not a valid index: {error}", "Fetch the file again.") from error
    return dict(weight_map)


def _ordered_shards(weight_map: Mapping[str, Any]) -> list[Any]:
    return sorted(set(weight_map.values()), key=str)


def _shard_headers(directory: Path, shard: Any, index: str, arriving: Arriving | None) -> Mapping[str, TensorHeader]:
    if arriving is not None and shard in arriving:
        return arriving.headers(shard)
    return read_headers(_inside(directory, shard, index))


def _read_sharded(directory: Path, index_path: Path, arriving: Arriving | None) -> dict[str, TensorHeader]:
    weight_map = _weight_map(index_path)
    tensors: dict[str, TensorHeader] = {}
    for shard in _ordered_shards(weight_map):
        for name, header in _shard_headers(directory, shard, index_path.name, arriving).items():
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
    missing = [name for name in weight_map if name not in tensors]
    if missing:
        raise SpecDefError(f"{missing[0]} is in {index_path.name} but in no shard", "Fetch the checkpoint again.")
    return tensors


def _inside(directory: Path, name: Any, index: str = INDEX_FILE) -> Path:
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


def _no_weights(directory: Path, library: Library) -> SpecDefError:
    if any(match for pattern in PICKLED_WEIGHTS for match in directory.glob(pattern)):
        return SpecDefError(
            f"{directory} has only pickled weights, which are never loaded",
            f"Convert it first: in {library.name}, from_pretrained(...).save_pretrained(...) writes safetensors.",
        )
    return SpecDefError(
        f"{directory} has no safetensors weights", f"It needs {library.single_file} or {library.index_file}."
    )


def _truncated(header: TensorHeader) -> SpecDefError:
    return SpecDefError(f"{header.shard} ends inside {header.name}", "The file is truncated: fetch it again.")


def _corrupt_file(shard: str, reason: str) -> SpecDefError:
    return SpecDefError(f"{shard} is not a valid safetensors file: {reason}", "Fetch the file again.")
