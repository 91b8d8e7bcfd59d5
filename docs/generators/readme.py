"""Write a table that was measured into the README, between its markers: ``readme.py < table.md``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
TABLE = re.compile(r"(<!-- table: make readme -->\n).*?(\n<!-- end of table -->)", re.DOTALL)


def with_table(readme: str, table: str) -> str:
    """The README with another table.

    Raises:
        ValueError: It has no place for one, or there is none to put there.
    """
    if not table.strip().startswith("|") or not TABLE.search(readme):
        raise ValueError("there is no table, or README.md has no markers for it")
    return TABLE.sub(lambda found: found[1] + table.strip() + found[2], readme)


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8"), sys.stdin.read()), encoding="utf-8")
