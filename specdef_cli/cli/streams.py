"""stdout and stderr as a command needs them: no secret passes, and what cannot be shown never ends the work."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO, cast

from specdef_cli.errors import redact


class SafeStream:
    """A text stream that takes secrets out, and falls silent where it cannot write (``| head``, a full disk).

    ``lost`` is why something was not written, other than that the reader has gone.
    """

    def __init__(self, stream: TextIO) -> None:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack a character
        self._stream = stream
        self._silent = False
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Write ``text``; the number of characters that the caller gave."""
        self._unless_silent(self._stream.write, redact(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write one text after the other."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Have everything written."""
        self._unless_silent(self._stream.flush)

    def _unless_silent(self, act: Callable[..., Any], *arguments: str) -> None:
        if self._silent:
            return
        try:
            act(*arguments)
        except OSError as error:
            self._silent = True
            self.lost = None if isinstance(error, BrokenPipeError) else error
            # What is still in the buffer would be written, and fail, when the interpreter ends.
            with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Let everything that the block prints pass through a :class:`SafeStream`."""
    before = sys.stdout, sys.stderr
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by the shell: else a file that is opened would be printed into
            os.open(os.devnull, os.O_RDWR)
    # A closed stream is None, and print and rich know what to do with it.
    sys.stdout, sys.stderr = (cast(TextIO, SafeStream(stream)) if stream else stream for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream:
                stream.flush()
        sys.stdout, sys.stderr = before
