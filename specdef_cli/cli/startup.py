"""Settings of the command's process, made before anything heavy is imported; importing the package makes none."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
from collections.abc import Mapping

from specdef_cli.cli.output import Output
from specdef_cli.errors import SpecDefError
from specdef_cli.runtime.launcher import forget_stale_launcher

COLLECT_AFTER = (20_000, 20, 100)
"""Objects made before a garbage collection, and collections before one that looks at older objects, and at all."""

PRECISION, PRECISIONS = "ACCELERATE_MIXED_PRECISION", ("no", "fp16", "bf16", "fp8")


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


def require_surroundings(environ: Mapping[str, str] = os.environ) -> None:
    """Refuse what no command can work in: asked before anything is imported, which would fail in words of its own.

    Raises:
        SpecDefError: The current directory is gone, Python strips the docstrings that transformers reads, or accelerate
            is told of a precision that it has not.
    """
    try:
        os.getcwd()  # noqa: PTH109 (asked for its error)
    except FileNotFoundError as error:
        raise SpecDefError("the current directory has been removed", "Change to one that exists (cd).") from error
    if sys.flags.optimize > 1:
        raise SpecDefError(
            "Python strips docstrings (PYTHONOPTIMIZE=2 or -OO), which transformers cannot do without",
            "Run `unset PYTHONOPTIMIZE`, or leave -OO out.",
        )
    precision = environ.get(PRECISION)
    if precision is not None and precision.lower() not in PRECISIONS:
        raise SpecDefError(
            f"{PRECISION} is {precision!r} in the environment, which accelerate does not know",
            f"Run `unset {PRECISION}`, or set it to one of {', '.join(PRECISIONS)}.",
        )


def work_alone_if_stale(output: Output) -> None:
    """Ignore what a launch that is over has left in the environment, and say so.

    Raises:
        SpecDefError: It speaks of other processes, which cannot be found.
    """
    note = forget_stale_launcher()
    if note is not None:
        output.note(f"note: {note}")
