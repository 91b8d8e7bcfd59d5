"""``python -m tests.faults``: run the tests of the fault table alone, and print it. ``--all`` adds the slow ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.faults import table

TESTS = Path(__file__).parents[1]


class Selection:
    """A pytest plugin that keeps the tests of the table."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Deselect all others."""
        marked = [item for item in items if item.get_closest_marker("fault")]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(marked)])
        items[:] = marked


def main(arguments: list[str]) -> int:
    """Run the tests and print the table; pytest's own exit code."""
    files = sorted(path for path in TESTS.rglob("test_*.py") if "mark.fault" in path.read_text(encoding="utf-8"))
    selected = [] if "--all" in arguments else ["-m", "not slow"]
    return int(pytest.main([*map(str, files), *selected, "-q"], plugins=[Selection(), table]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
