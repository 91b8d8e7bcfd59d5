"""Write output shards as a stream: no tensor waits in memory for another.

Every group of tensors knows its place in its file beforehand, so each worker reads, computes and writes on its own, and
what is in memory at any time is what the workers hold. A shard is hashed as it grows, from what was written, and goes
to the disk while the rest of it is computed. Once it is whole there it is recorded, and a later run that finds the
record does not write it again.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdef_cli.checkpoint.files import write_durably
from specdef_cli.checkpoint.output import RECORD_SUFFIX
from specdef_cli.checkpoint.reader import SAFETENSORS_DTYPES, Checkpoint
from specdef_cli.checkpoint.shards import OutputShard, TensorGroup, shard_header
from specdef_cli.errors import ResumableError
from specdef_cli.process import first_completed

# What is copied or hashed passes through the processor's cache in pieces that fit there. Written in one call, a tensor
# of 32 MiB takes the kernel several times as long as in such pieces.
CHUNK = 2**20


@dataclass(frozen=True)
class ShardRecord:
    sha256: str
    figures: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Progress:
    """One group of tensors was written."""

    label: str
    nbytes: int


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch compute with one thread: small tensors only make the others spin, and no sum depends on a split."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def write_shards(
    checkpoint: Checkpoint,
    shards: Sequence[OutputShard],
    directory: Path,
    *,
    devices: Sequence[torch.device],
    workers: int,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> None:
    """Write ``shards`` into ``directory``, skipping those with a record there; the same for any number of workers.

    Args:
        directory: A work directory; a shard there is complete exactly when its record exists.
        on_progress: Called from worker threads after each group.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="specdef")
    opened: list[_ShardFile] = []
    try:
        pending: set[Future[None]] = set()
        places = itertools.cycle(devices)
        for shard in shards:
            if read_record(directory, shard.name) is not None:
                for group in shard.groups:
                    on_progress(Progress(group.label, group.nbytes))
                continue
            writing = _ShardFile(directory / shard.name, shard)
            opened.append(writing)
            for group in shard.groups:
                if len(pending) > 2 * workers:  # a 405B model has 10⁵ tensors: keep the queue short
                    pending = _drain(pending)
                pending.add(pool.submit(_write_group, checkpoint, group, writing, next(places), on_progress))
        while pending:
            pending = _drain(pending)
    except OSError as error:
        raise ResumableError(
            f"writing to {directory.parent} failed: {error.strerror or error}",
            "Give a smaller --max-shard-size, or raise the limit on files (ulimit -f)."
            if error.errno == errno.EFBIG
            else "Free some space or repair the disk, then run the same command with --resume.",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for writing in opened:
            writing.close()


def read_record(directory: Path, shard: str) -> ShardRecord | None:
    """The record of a finished shard, or ``None`` if it is not finished."""
    path = directory / (shard + RECORD_SUFFIX)
    if not path.is_file() or not (directory / shard).is_file():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    return ShardRecord(data["sha256"], data["figures"])


def file_sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed_files(directory: Path, hashes: Mapping[str, str]) -> tuple[str, ...]:
    """The files of a directory that are not there, or whose sha256 is another one."""
    files = {name: directory / name for name in hashes}
    return tuple(name for name, path in files.items() if not path.is_file() or file_sha256(path) != hashes[name])


class _ShardFile:
    """A shard while its groups are being written, in any order and from any thread.

    Tensors are written out of order and hashed in file order. The worker that extends the contiguous prefix hashes it,
    one worker at a time.
    """

    def __init__(self, path: Path, shard: OutputShard) -> None:
        header, self.offsets = shard_header(shard)
        self.path = path
        self.figures: dict[str, Mapping[str, Any]] = {}
        self._unfinished = len(shard.groups)
        self._ends: dict[int, int] = {}  # start → end of tensors written beyond the contiguous prefix
        self._gapless = len(header)
        self._hash, self._hashed = hashlib.sha256(), 0
        self._hashing = False
        self._state = threading.Lock()
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        _write_all(self.descriptor, memoryview(header), 0)
        os.truncate(self.descriptor, len(header) + shard.nbytes)

    def group_done(self, group: TensorGroup) -> None:
        """Count a group as written, hash what can be hashed by now, and record the shard if that is all of it."""
        written = [(self.offsets[spec.name], spec.nbytes) for spec in group.outputs if spec.nbytes]
        with self._state:
            self._ends |= {begin: begin + nbytes for begin, nbytes in written}
            self._unfinished -= 1
            if self._hashing:
                return
            self._hashing = True
        while True:
            with self._state:
                while self._gapless in self._ends:
                    self._gapless = self._ends.pop(self._gapless)
                whole = not self._unfinished
                if self._hashed == self._gapless:
                    self._hashing = False
                    break
            self._hash_until(self._gapless)
        if whole:
            self._finish()

    def _hash_until(self, end: int) -> None:
        begin = self._hashed
        while self._hashed < end:
            chunk = os.pread(self.descriptor, min(CHUNK, end - self._hashed), self._hashed)
            if not chunk:
                raise OSError(errno.EIO, f"{self.path.name} was cut off while it was being written")
            self._hash.update(chunk)
            self._hashed += len(chunk)
        if sys.platform == "linux":
            # Nothing needs these pages any more, and to say so has the kernel write them out without being waited for.
            # By itself it lets gigabytes gather, for which the flush at the end would then wait.
            os.posix_fadvise(self.descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)

    def _finish(self) -> None:
        os.fsync(self.descriptor)
        self.close()
        record = {"sha256": self._hash.hexdigest(), "figures": self.figures}
        write_durably(self.path.with_name(self.path.name + RECORD_SUFFIX), json.dumps(record))

    def close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _drain(pending: set[Future[None]]) -> set[Future[None]]:
    done, rest = first_completed(pending)
    for future in done:
        future.result()
    return rest


def _write_group(
    checkpoint: Checkpoint,
    group: TensorGroup,
    writing: _ShardFile,
    device: torch.device,
    on_progress: Callable[[Progress], None],
) -> None:
    for spec in group.outputs:
        if spec.name not in group.streamed:
            continue
        begin = position = writing.offsets[spec.name]
        for block in group.streamed[spec.name].blocks(checkpoint):
            position = _write_all(writing.descriptor, _raw_bytes(block), position)
        if position != begin + spec.nbytes:
            raise AssertionError(f"{spec.name}: planned {spec}, made {position - begin} bytes")
    if group.computed:
        assert group.transform is not None
        produced = group.transform(checkpoint, device)
        for spec in group.computed:
            tensor = produced.tensors[spec.name]
            if (SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape)) != (spec.dtype, spec.shape):
                raise AssertionError(f"{spec.name}: planned {spec}, made {tensor.dtype} {tuple(tensor.shape)}")
            _write_all(writing.descriptor, _raw_bytes(tensor), writing.offsets[spec.name])
        if produced.figures:
            writing.figures[group.label] = produced.figures
    writing.group_done(group)
    on_progress(Progress(group.label, group.nbytes))


def _raw_bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_all(descriptor: int, data: memoryview, position: int) -> int:
    """Write ``data`` at a position; return its end."""
    while data:
        written = os.pwrite(descriptor, data[:CHUNK], position)
        data, position = data[written:], position + written
    return position
