"""The generator that reads docs/tables/consumers-*.md, which is a script of the documentation and not of a package."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from tests.commands import REPOSITORY
from tests.scripts import by_path

TABLES = REPOSITORY / "docs" / "tables"


def generator(name: str) -> ModuleType:
    """A module of docs/generators."""
    return by_path(REPOSITORY / "docs/generators" / f"{name}.py")


def measured_tables() -> list[Path]:
    """The tables of this checkout that say what harden says of each column."""
    return [path for path in sorted(TABLES.glob("consumers-*.md")) if "What `harden` says" in path.read_text()]
