"""A loaded model that a format changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Subject:
    """A loaded checkpoint on its way through a format.

    Attributes:
        directory: Where it came from.
        model: The model, or what a format made of it. A format may change it in place.
        note: What the format did otherwise than its name says.
    """

    directory: Path
    model: Any
    note: str = ""


Change = Callable[[Subject], Subject]


def unchanged(subject: Subject) -> Subject:
    """The checkpoint as it was loaded."""
    return subject
