"""The header of a safetensors file: read, and checked to describe exactly the bytes that are there."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from specdef_cli.errors import SpecDefError, dtype_name

# The format's own limit on its JSON header; a larger length is a corrupt file.
MAX_HEADER_BYTES = 100_000_000
# What json.loads raises on data made to be refused (deep nesting is a RecursionError), and what a wrong type then does.
INVALID_JSON = (ValueError, KeyError, TypeError, AttributeError, RecursionError)

DTYPES: Mapping[str, torch.dtype] = {
    dtype_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}
"""What ``--dtype`` takes."""

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
        "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
        "C64": torch.complex64,
    }
)  # fmt: skip
SAFETENSORS_DTYPES: Mapping[torch.dtype, str] = MappingProxyType({v: k for k, v in TORCH_DTYPES.items()})
FLOATING_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as its shard's header describes it.

    Attributes:
        dtype: As safetensors names it, e.g. ``BF16``.
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


GIT_LFS = b"version https://git-lfs.github.com/"
"""First bytes of a Git LFS pointer."""


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """Read and check the header of one safetensors file: tensor headers in the order of their data."""
    try:
        with path.open("rb") as file:
            return parse_headers(file.read, path.name, path.stat().st_size)
    except OSError as error:
        raise SpecDefError(f"{path.name} cannot be read: {error}", "Check the disk and the file.") from error


def parse_headers(read: Callable[[int], bytes], shard: str, size: int) -> dict[str, TensorHeader]:
    """Check the header of a safetensors file that is read from its start."""

    def corrupt(reason: str) -> SpecDefError:
        return SpecDefError(f"{shard} is not a valid safetensors file: {reason}", "Fetch the file again.")

    if size < 8:
        raise corrupt("it is shorter than a header")
    start = read(8)
    if start == GIT_LFS[:8]:
        raise lfs_pointer(shard)
    (length,) = struct.unpack("<Q", start)
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise corrupt(f"its header claims {length} bytes")
    text = read(length)
    try:
        entries = json.loads(text, object_pairs_hook=unique_keys)
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


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} appears twice")
    return result


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is there, and is such a pointer."""
    try:
        with path.open("rb") as file:
            return file.read(len(GIT_LFS)) == GIT_LFS
    except OSError:
        return False


def lfs_pointer(name: str) -> SpecDefError:
    """What is said of a file that was cloned without Git LFS."""
    return SpecDefError(
        f"{name} is a pointer of Git LFS, which stands for the file",
        "Run `git lfs pull` in the clone, or fetch the model with `hf download`.",
    )
