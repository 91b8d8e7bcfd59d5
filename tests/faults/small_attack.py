"""An attack of three runs that takes a fraction of a second, and what may lie in its directory at any moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SMALL = (
    "--recipe", "full", "--lr", "1e-3", "--steps", "2", "--batch-size", "2", "--sequence-length", "8",
    "--eval-sequences", "2", "--retained", "none", "--quiet",
)  # fmt: skip
RUNS = 3
"""The control, the hardened model, the collapsed model."""


def finished_runs(out: Path) -> dict[str, dict[str, Any]]:
    """Every run file under ``out``, by name, without times; each must be whole."""
    found = {}
    for path in out.glob("runs/*"):
        if not path.name.startswith("."):
            found[path.name] = _without_time(json.loads(path.read_text()))
    return found


def visible(out: Path) -> set[str]:
    """Names in ``out`` that a user sees."""
    return {path.name for path in out.glob("*") if not path.name.startswith(".")}


def identities(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every run file: they change if it is written again."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in out.glob("runs/*")
        if not path.name.startswith(".")
    }


def _without_time(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_time(item) for key, item in value.items() if key != "seconds"}
    return [_without_time(item) for item in value] if isinstance(value, list) else value
