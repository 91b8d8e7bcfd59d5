"""Write a table that was measured into the README, between its markers: ``readme.py TARGET < table.md``.

``TARGET`` is the target of the Makefile that measures it, which the markers name.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def with_table(readme: str, target: str, table: str) -> str:
    """The README with another table.

    Raises:
        ValueError: It has no place for one, or there is none to put there.
    """
    place = re.compile(rf"(<!-- table: make {re.escape(target)} -->\n).*?(\n<!-- end of table -->)", re.DOTALL)
    if not table.strip().startswith("|") or not place.search(readme):
        raise ValueError(f"there is no table, or README.md has no markers for that of make {target}")
    return place.sub(lambda found: found[1] + table.strip() + found[2], readme)


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8"), sys.argv[1], sys.stdin.read()), encoding="utf-8")
