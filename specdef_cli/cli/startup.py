"""What the command's process is told before anything heavy is imported. Nobody who imports the package is told so."""

from __future__ import annotations

import atexit
import gc
import os

COLLECT_AFTER = (20_000, 20, 100)
"""Objects made before a garbage collection, and collections before one that looks at older objects, and at all."""


def prepare_process() -> None:
    """Start and end in two thirds of the time, and pass weights through memory in large pages.

    torch and transformers make a million objects that live as long as the process. Looking for garbage among them
    while they are imported, and again on the way out, takes a third of a command that does nothing else.

    Weights pass through fresh memory by the gigabyte, and handing it out in pages of 4 KiB takes the kernel about a
    sixth of the time that a fold takes. Torch asks for pages of 2 MiB where this variable says so, from its first
    allocation on.
    """
    gc.set_threshold(*COLLECT_AFTER)
    atexit.register(gc.freeze)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
