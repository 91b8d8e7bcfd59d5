"""The one place where commands print: data on stdout; notes, bars and errors on stderr.

No secret passes, and what cannot be shown never ends the work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from specdef_cli.errors import SpecDefError, printable, redact
from specdef_cli.option import option
from specdef_cli.process import forget_stale_launcher

PIPED_WIDTH = 160


def table_of(names: str, *numbers: str, **options: Any) -> Table:
    """A table whose first column holds names, and the others numbers."""
    table = Table(**options)
    table.add_column(names, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


DAY = 24 * 3600
"""Seconds over which speed is averaged: a single step may take longer than the half minute that is usual."""


@dataclasses.dataclass(frozen=True)
class Output:
    """How a command talks. These are options of every command."""

    as_json: bool = option(False, "Print JSON on stdout, and nothing else there.", "--json", group="Output")
    quiet: bool = option(False, "No progress bars and no notes.", "--quiet", "-q", group="Output")
    verbose: bool = option(False, "Show every run, tracebacks and all warnings.", group="Output")

    def begin(self) -> None:
        """Ignore what a launch that is over has left in the environment, and keep downloads as quiet as the command."""
        note = forget_stale_launcher()
        if note is not None:
            self.note(f"note: {note}")
        if self.quiet or self.as_json:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    @property
    def _stderr(self) -> Console:
        return Console(stderr=True)

    def note(self, text: str) -> None:
        """Tell the user something that is not data."""
        if not self.quiet:
            console = self._stderr
            # A command between backticks is copied, so no line break may stand in it; a log is searched line by line.
            whole = "`" in text or not console.is_terminal
            console.print(escape(printable(text)), highlight=False, soft_wrap=whole)

    def data(self, result: Any, table: Any, *, written: Path | None = None) -> None:
        """The command's result: as JSON, or as a table (anything rich can render).

        Args:
            result: What ``--json`` prints.
            written: Where the result stands as well; ``None`` if what is printed is all there is of it.
        """
        if self.as_json:
            from pydantic_core import to_jsonable_python

            # Numbers that JSON has not (NaN, infinity) become null.
            print(json.dumps(to_jsonable_python(result, inf_nan_mode="null"), indent=2, allow_nan=False))
        else:
            # Piped output is for other programs and logs: nothing in it is cut to the width of a terminal.
            width = None if Console().is_terminal else PIPED_WIDTH
            # Names come from checkpoints: what looks like markup in them is text.
            Console(width=width, markup=False, emoji=False).print(table)
        if sys.stdout:
            sys.stdout.flush()
        lost = getattr(sys.stdout, "lost", None)
        if lost is not None:
            problem = f"the result could not be printed: {lost.strerror or lost}"
            if written is None:
                raise SpecDefError(problem, "Check where stdout goes, then run the same command again.")
            self._stderr.print(escape(f"note: {problem}; {written} is complete"), highlight=False)

    def show(self, table: Any) -> None:
        """Show something on stderr before the result is there: anything rich can render."""
        if not self.quiet:
            width = None if self._stderr.is_terminal else PIPED_WIDTH
            Console(stderr=True, width=width, markup=False, emoji=False).print(table)

    @contextmanager
    def progress(self, what: str) -> Iterator[Bar]:
        """A progress bar on stderr, shown once there is something to say.

        What is downloaded before has bars of its own, which would not show through this one.
        """
        columns = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[label]}"),
            console=self._stderr,
            disable=self.quiet or not self._stderr.is_terminal,
            transient=True,
            speed_estimate_period=DAY,
        )
        log = None if self.quiet or self._stderr.is_terminal else Console(stderr=True, width=PIPED_WIDTH, markup=False)
        try:
            yield Bar(columns, columns.add_task(what, total=None, label=""), log)
        finally:
            columns.stop()


@dataclasses.dataclass(frozen=True)
class Bar:
    """One line of progress; ``advance`` may be called from any thread."""

    columns: Progress
    task: TaskID
    log_to: Console | None = None

    def log(self, text: str) -> None:
        """A line with the time, where there is no terminal to draw a bar on (a batch job, a pipe)."""
        if self.log_to is not None:
            self.log_to.print(f"{time.strftime('%H:%M:%S')} {text}", highlight=False, soft_wrap=True)

    def reach(self, done: float, total: float, label: str = "") -> None:
        """Show that ``done`` of ``total`` is finished, and ``label`` under way."""
        self.columns.start()
        self.columns.update(self.task, completed=done, total=total, label=escape(label))

    def advance(self, label: str, amount: float = 1) -> None:
        """Add finished work; ``label`` names it."""
        self.columns.start()
        self.columns.update(self.task, advance=amount, label=escape(label))


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
        self._unless_silent(self._stream.write, redact(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
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
    """Pass everything that the block prints through a :class:`SafeStream`."""
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
