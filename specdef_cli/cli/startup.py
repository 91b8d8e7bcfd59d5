"""Settings of the command's process, made before anything heavy is imported; importing the package makes none."""

from __future__ import annotations

import atexit
import gc
import logging
import os

from specdef_cli.cli.output import Output
from specdef_cli.runtime.launcher import forget_stale_launcher

COLLECT_AFTER = (20_000, 20, 100)
"""Objects made before a garbage collection, and collections before one that looks at older objects, and at all."""


def collect_less_garbage() -> None:
    """Start and end in two thirds of the time.

    torch and transformers make a million objects that live as long as the process. Looking for garbage among them
    while they are imported, and again on the way out, takes a third of a command that does nothing else.
    """
    gc.set_threshold(*COLLECT_AFTER)
    atexit.register(gc.freeze)


def quiet_engines() -> None:
    """Keep torchao (imported by transformers) from warning of other machines' kernels, bitsandbytes of every cast."""
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def prefer_huge_pages() -> None:
    """Have torch ask for pages of 2 MiB, from its first allocation on: for commands that stream weights.

    They pass through fresh memory by the gigabyte, and handing it out in pages of 4 KiB takes the kernel about a sixth
    of the time that a fold takes. Training gains nothing, and with second-order optimizers loses.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def work_alone_if_stale(output: Output) -> None:
    """Ignore what a launch that is over has left in the environment, and say so.

    Raises:
        SpecDefError: It speaks of other processes, which cannot be found.
    """
    note = forget_stale_launcher()
    if note is not None:
        output.note(f"note: {note}")
