"""Tables that are measured: a page includes ``tables/NAME.md``, which a target of the Makefile writes.

A table that nobody has measured in this checkout is replaced by a sentence, so that the pages build without it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig

INCLUDE = re.compile(r'^--8<-- "(tables/[\w.-]+\.md)"$', re.MULTILINE)


def on_page_markdown(markdown: str, config: MkDocsConfig, **_: Any) -> str:
    """Leave includes of tables that exist to pymdownx's snippets, and say of the others that they are missing."""

    def kept(include: re.Match[str]) -> str:
        if (Path(config.docs_dir) / include[1]).is_file():
            return include[0]
        return f"*The table `docs/{include[1]}` has not been measured in this checkout.*"

    return INCLUDE.sub(kept, markdown)
