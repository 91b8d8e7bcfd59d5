"""stdout and stderr as a command needs them: no secret passes, and what cannot be shown never ends the work.

A terminal may lack a character, a reader may have gone (``| head``), a log's disk may be full. Whether a command has
done its work is not decided there.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

from specdef_cli.redact import redact


class SafeStream:
    """A text stream that takes secrets out, replaces what it cannot encode, and falls silent where it cannot write.

    Args:
        stream: What it writes to.

    Attributes:
        lost: Why something was not written, other than that the reader has gone; ``None`` if all was.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._silent = False
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Write ``text``; the number of characters that the caller gave."""
        if not self._silent:
            shown = redact(text)
            try:
                self._write(shown)
            except OSError as error:
                self._fall_silent(error)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write one text after the other."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Have everything written."""
        if not self._silent:
            try:
                self._stream.flush()
            except OSError as error:
                self._fall_silent(error)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self._stream.write(text.encode(encoding, "replace").decode(encoding))

    def _fall_silent(self, error: OSError) -> None:
        self._silent = True
        if not isinstance(error, BrokenPipeError):
            self.lost = error
        # What is still in the buffer would be written, and fail, when the interpreter ends.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Let everything that the block prints pass through a :class:`SafeStream`."""
    before = sys.stdout, sys.stderr
    _occupy_descriptors()
    # A closed descriptor is None, and print and rich know what to do with it.
    sys.stdout, sys.stderr = (cast(TextIO, SafeStream(stream)) if stream else stream for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream:
                stream.flush()
        sys.stdout, sys.stderr = before


def _occupy_descriptors() -> None:
    """Put something under 0, 1 and 2 where the shell closed them: else a file that is opened would be printed into."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
