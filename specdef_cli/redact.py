"""Tokens are taken out of every text before it is printed: other libraries put them into their messages."""

from __future__ import annotations

import os
import re

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
