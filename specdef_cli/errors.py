"""The one exception that users see, and what is quoted in it.

Everything a user can get wrong (a path, a value, a checkpoint) is reported as a :class:`SpecDefError`: one line that
names the value at fault, and one line that says what to do about it. Anything else that escapes is a defect of ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from specdef_cli.redact import redact

if TYPE_CHECKING:
    from pydantic import ValidationError


class SpecDefError(Exception):
    """A problem with what the user gave, and the way out of it.

    Args:
        problem: One line that names the offending value.
        hint: One line, in the imperative, that says what to do.
    """

    def __init__(self, problem: str, hint: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.problem} ({self.hint})"

    def __reduce__(self) -> tuple[type[SpecDefError], tuple[str, str]]:
        # Exceptions pickle by `args`, which holds one of our two arguments; worker processes send these home.
        return type(self), (self.problem, self.hint)


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
