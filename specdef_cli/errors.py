"""The exceptions that users see, and what is quoted in them.

Everything a user can get wrong (a path, a value, a checkpoint) is reported as a :class:`SpecDefError`: one line that
names the value at fault, and one line that says what to do about it. Anything else that escapes is a defect of ours.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from specdef_cli.redact import redact

if TYPE_CHECKING:
    from pydantic import ValidationError


class SpecDefError(Exception):
    """A problem with what the user gave, and the way out of it."""

    def __init__(self, problem: str, hint: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.problem} ({self.hint})"

    def __reduce__(self) -> tuple[type[SpecDefError], tuple[str, str]]:
        # Exceptions pickle by `args`, which holds one of our two arguments; worker processes send these home.
        return type(self), (self.problem, self.hint)


class WrongUsage(SpecDefError):
    """Options that come to nothing together."""


class ResumableError(SpecDefError):
    """Neither the input nor an option is at fault (the disk is): what is finished is kept for ``--resume``."""


def first_line(error: BaseException) -> str:
    """What another library's exception says, in one line: its first with text in it, else its type.

    Without the token that an HTTP client may quote.
    """
    lines = (line.strip() for line in str(error).splitlines())
    return redact(next(filter(None, lines), type(error).__name__))


def first_violation(error: ValidationError) -> str:
    """The first thing that pydantic found wrong with a document, in one line: where, what is expected and found."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    if not where:  # not JSON at all: what is there is the whole text
        return first["msg"]
    found = first["input"]
    there = f", not {found!r:.100}" if found is None or isinstance(found, str | int | float) else ""
    return f"{where}: {first['msg']}{there}"


def printable(text: str) -> str:
    """Text with the control characters spelled out that a name of a file may hold and a terminal would obey."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there is not enough memory: torch says it of a GPU and of the machine apart."""
    said = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and ("can't allocate memory" in said or "out of memory" in said))
    )
