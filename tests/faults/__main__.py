"""``python -m tests.faults``: run the tests of the fault table alone, and print it. ``--all`` adds the slow ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.faults import table

TESTS = Path(__file__).parents[1]


class Selection:
    """A pytest plugin that keeps the tests of the table."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Deselect all others.

        Raises:
            pytest.UsageError: A name in the table is no test's: the row would be empty, or claim too little.
        """
        names = [item.nodeid.removeprefix("tests/") for item in items]
        for beginning in (beginning for beginnings in table.FAULTS.values() for beginning in beginnings):
            if not any(name.startswith(beginning) for name in names):
                raise pytest.UsageError(f"no test's name begins with {beginning}")
        named = [item for item in items if table.faults_of(item.nodeid)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(named)])
        items[:] = named


def main(arguments: list[str]) -> int:
    """Run the tests and print the table; pytest's own exit code."""
    files = sorted({beginning.split("::")[0] for beginnings in table.FAULTS.values() for beginning in beginnings})
    selected = [] if "--all" in arguments else ["-m", "not slow"]
    return int(pytest.main([*(str(TESTS / file) for file in files), *selected, "-q"], plugins=[Selection(), table]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
