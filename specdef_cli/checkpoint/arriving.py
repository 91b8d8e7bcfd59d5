"""Weights that are on their way from the Hub while work on the first of them has begun.

What decides a plan is small: the headers of the shards, and a few rows of some tensors. Both are read from the Hub in
pieces, so that nothing waits for a shard but what reads all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from huggingface_hub import DryRunFileInfo
from huggingface_hub.utils import tqdm

from specdef_cli.checkpoint.downloads import Downloads
from specdef_cli.checkpoint.headers import TensorHeader, parse_headers, read_headers
from specdef_cli.checkpoint.links import require_inside
from specdef_cli.checkpoint.reader import weight_files
from specdef_cli.checkpoint.resolve import (
    Commit,
    NoPartsError,
    Resolved,
    bytes_to_download,
    download_all,
    locate,
    not_available,
    resolved,
)
from specdef_cli.errors import ResumableError, SpecDefError

DownloadHook = Callable[[int, int], None]
"""Called from any thread with the bytes that have arrived and those that will have."""

HEADER_READERS = 8
# The first shard is needed first, so few share the bandwidth. More than one, because a connection may not fill it.
WORKERS = 2


@contextmanager
def resolving(
    model: str, *, revision: str | None = None, token: str | None = None, on_download: DownloadHook | None = None
) -> Iterator[tuple[Resolved, ArrivingWeights | None]]:
    """Find ``model`` as :func:`resolve` does, but let its weights arrive while the block runs, and no longer.

    Nothing of the weights is downloaded before the block waits for one of them.

    Args:
        on_download: Told of the weights that have arrived; ``None`` shows huggingface_hub's bars instead.

    Yields:
        The model, and its weight files that are not there yet; ``None`` if all are.
    """
    where = locate(model, revision, token)
    if isinstance(where, Resolved):
        yield where, None
        return
    commit, missing = where
    weights = {file.filename: file for file in missing if _is_weight(file.filename)}
    download_all(commit, [file.filename for file in missing if file.filename not in weights])
    try:
        named = weight_files(commit.directory, weights)
    except SpecDefError:
        named = ()  # open_checkpoint will say what is wrong with the directory
    first = {name: weights[name] for name in named if name in weights}
    arriving = ArrivingWeights(commit, tuple((first | weights).values()), named=len(first), on_download=on_download)
    try:
        yield resolved(commit), arriving
    finally:
        arriving.close()


class ArrivingWeights:
    """Weight files that are on their way into the cache.

    Args:
        files: Those that the checkpoint names, in the order in which they are read, and then any others.
    """

    def __init__(
        self, commit: Commit, files: Sequence[DryRunFileInfo], named: int, on_download: DownloadHook | None = None
    ) -> None:
        names = [file.filename for file in files]
        self._commit = commit
        self._on_download = on_download
        self._received = 0
        self._downloads = Downloads(names, self._fetch, WORKERS, None if on_download is None else self._receive)
        self._on_their_way = set(names)
        self.nbytes = bytes_to_download(files)
        with ThreadPoolExecutor(HEADER_READERS) as pool:
            headers = pool.map(self._read_headers, files[:named])
            self._headers = dict(zip(names[:named], headers, strict=True))

    def __contains__(self, name: str) -> bool:
        return name in self._headers

    def headers(self, name: str) -> Mapping[str, TensorHeader]:
        """The tensor headers of a weight file, without waiting for it where the Hub lets them be read."""
        headers = self._headers[name]
        if headers is None:
            self.wait(name)
            headers = read_headers(self._commit.directory / name)
        return headers

    def part(self, name: str, begin: int, end: int) -> bytes | None:
        """Bytes ``begin`` to ``end`` of a file, from the Hub; ``None`` if they have to be read from the disk."""
        if name not in self._on_their_way:
            return None
        try:
            return self._commit.read(name, begin, end)
        except NoPartsError:
            return None
        except Exception as error:
            raise _resumable(self._failure(error)) from error

    def wait(self, name: str) -> None:
        """Return once a file is in the cache."""
        try:
            self._downloads.wait(name)
        except SpecDefError as error:
            raise _resumable(error) from error

    def wait_for_all(self) -> None:
        """Return once every file is in the cache."""
        try:
            self._downloads.wait_for_all()
        except SpecDefError as error:
            raise _resumable(error) from error

    def stop(self) -> None:
        """Wake up the threads that wait: nothing more will arrive."""
        self._downloads.stop()

    def close(self) -> None:
        """End the downloads that are running."""
        self._downloads.close()

    def _fetch(self, name: str, bar: type[tqdm]) -> None:
        try:
            self._commit.fetch(name, bar)
        except Exception as error:
            raise self._failure(error) from error
        path = self._commit.directory / name
        require_inside(self._commit.directory, path)
        headers = self._headers.get(name)
        if headers is not None and read_headers(path) != headers:
            raise SpecDefError(
                f"{name} is not the file whose header the Hub has shown", "Remove it from the cache and try again."
            )
        self._on_their_way.discard(name)

    def _receive(self, count: int) -> None:
        self._received += count
        if self._on_download is not None:
            self._on_download(self._received, self.nbytes)

    def _read_headers(self, file: DryRunFileInfo) -> Mapping[str, TensorHeader] | None:
        if file.file_size is None:
            return None
        position = 0

        def read(count: int) -> bytes:
            nonlocal position
            position += count
            return self._commit.read(file.filename, position - count, position)

        try:
            return parse_headers(read, file.filename, file.file_size)
        except NoPartsError:
            return None
        except SpecDefError:
            raise
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> SpecDefError:
        return not_available(self._commit.repository, self._commit.revision, error)


def _is_weight(name: str) -> bool:
    return "/" not in name and name.endswith(".safetensors")


def _resumable(error: SpecDefError) -> ResumableError:
    """Work that was finished when the connection broke is kept."""
    return ResumableError(error.problem, f"{error.hint} Afterwards the same command with --resume goes on from here.")
