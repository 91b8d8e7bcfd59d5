"""How the command's process gets its memory."""

from __future__ import annotations

import os


def prefer_huge_pages() -> None:
    """Have torch ask for 2 MiB pages, where the operating system gives them on request.

    Weights pass through fresh memory by the gigabyte, and handing it out in pages of 4 KiB takes the kernel about a
    sixth of the time that a fold takes. Torch reads the variable at its first allocation, so this comes before.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
