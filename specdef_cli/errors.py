"""Errors for people to read: one line says what is wrong, one what to do, and neither holds a secret."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


REDACTED = "***"
SHORTEST = 8
"""A shorter secret is not looked for: it would be found in ordinary words."""

_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{8,}"  # the Hub's tokens
    r"|(?<=Bearer )[^\s'\"]{8,}"
    r"|(?<=://)[^\s/@:'\"]+:[^\s/@'\"]+(?=@)"  # a user and a password in an address
)
_ENVIRONMENT = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
_given: set[str] = set()


def clean_token(token: str | None) -> str | None:
    """A token without the white space that a file or a shell puts around it; ``None`` if nothing is left.

    It is remembered, and :func:`redact` takes it out of any text from then on.
    """
    token = (token or "").strip() or None
    if token is not None:
        _given.add(token)
    return token


def redact(text: str) -> str:
    """``text`` with ``***`` in the place of every token: those that were given, and what looks like one."""
    secrets = {part for secret in (*_given, *map(os.environ.get, _ENVIRONMENT)) if secret for part in secret.split()}
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= SHORTEST:
            text = text.replace(secret, REDACTED)
    return _SHAPES.sub(REDACTED, text)


class SpecDefError(Exception):
    """A problem with what the user gave, and the way out of it."""

    def __init__(self, problem: str, hint: str) -> None:
        super().__init__(problem, hint)  # both: worker processes send these home, and exceptions pickle by `args`
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.problem} ({self.hint})"


class WrongUsage(SpecDefError):
    """A value or options that are wrong by themselves, whatever the files and the Hub hold: exit code 2."""


class ResumableError(SpecDefError):
    """Neither the input nor an option is at fault (the disk is): what is finished is kept for ``--resume``."""


def first_line(error: BaseException) -> str:
    """The first line with text of another library's exception, else its type.

    Without the token that an HTTP client may quote.
    """
    lines = (line.strip() for line in str(error).splitlines())
    return redact(next(filter(None, lines), type(error).__name__))


def first_violation(error: ValidationError) -> str:
    """Pydantic's first violation in one line: where, what is expected, and what was found."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    if not where:  # not JSON at all: what is there is the whole text
        return first["msg"]
    found = first["input"]
    there = f", not {found!r:.100}" if found is None or isinstance(found, str | int | float) else ""
    return f"{where}: {first['msg']}{there}"


def dtype_name(dtype: object) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def printable(text: str) -> str:
    """Spell out control characters, which a terminal would obey."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the machine."""
    said = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and ("can't allocate memory" in said or "out of memory" in said))
    )


EXTRA_MODULES: Mapping[str, tuple[str, ...]] = {
    "attack": ("datasets", "peft", "PIL", "pytorch_optimizer"),
    "cluster": ("distributed",),
    "deploy": ("bitsandbytes", "torchao"),
    "diffusion": ("diffusers",),
    "eval": ("lm_eval",),
    "report": ("jinja2", "matplotlib"),
}
"""Names as they are imported, by extra."""

INSTALLATION = "`pip install .` in a clone of the specdef repository"
"""Installation in the words of a model card: the package is on no package index."""


class MissingExtraError(SpecDefError, ImportError):
    """Something that is asked for needs an extra that is not installed."""


def missing_modules(extra: str) -> tuple[str, ...]:
    """List the modules of an extra that are not installed, without importing them."""
    return tuple(name for name in EXTRA_MODULES[extra] if importlib.util.find_spec(name) is None)


def require_extra(extra: str, purpose: str) -> None:
    """Refuse work that needs an extra, before any of it is done.

    Raises:
        MissingExtraError: A module of the extra is not installed.
    """
    missing = missing_modules(extra)
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise MissingExtraError(
            f"{purpose} need {', '.join(missing)}, which {verb} not installed", f"pip install 'specdef-cli[{extra}]'"
        )
