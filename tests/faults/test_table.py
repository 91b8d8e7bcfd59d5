"""Every test of the table names one of its rows: a plugin that only ``make faults`` loads would tell too late."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.faults.table import FAULTS

TESTS = Path(__file__).parents[1]


def marks(path: Path) -> list[str]:
    """What the tests of a file are marked with."""
    calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    found = (call.args[0] for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "fault")
    return [str(argument.value) for argument in found if isinstance(argument, ast.Constant)]


def test_marks_are_rows_and_no_row_is_empty() -> None:
    marked = {mark for path in TESTS.rglob("test_*.py") for mark in marks(path)}
    assert marked == set(FAULTS)
