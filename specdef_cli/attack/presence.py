"""Is there the data that an attack names? Asked before anything heavy is imported: a wrong path is told in a moment.

What lies on the Hub is asked for later, when it is downloaded.
"""

from __future__ import annotations

import re
from pathlib import Path

from specdef_cli.errors import SpecDefError

FILE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".text", ".md", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
"""Suffixes that may stand behind these; `datasets` unpacks them."""


def require_data(dataset: str | None) -> None:
    """Refuse a data set that is a path to nothing.

    Raises:
        SpecDefError: naming it.
    """
    if dataset is None:
        return
    path = Path(dataset).expanduser()
    like_a_file = path.suffix.lower() in (*FILE_SUFFIXES, *COMPRESSIONS)
    if not path.exists() and (like_a_file or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset)):
        raise SpecDefError(f"there is no data file {path}", "Check the path, or give a Hub id.")
