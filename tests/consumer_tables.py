"""The generator that reads docs/tables/consumers-*.md, which is a script of the documentation and not of a package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from tests.commands import REPOSITORY

TABLES = REPOSITORY / "docs" / "tables"


def generator(name: str) -> ModuleType:
    """A module of docs/generators."""
    spec = importlib.util.spec_from_file_location(f"generator_{name}", REPOSITORY / "docs/generators" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def measured_tables() -> list[Path]:
    """The tables of this checkout that say what harden says of each column."""
    return [path for path in sorted(TABLES.glob("consumers-*.md")) if "What `harden` says" in path.read_text()]
