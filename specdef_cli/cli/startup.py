"""Settings of the command's process, made before anything heavy is imported; importing the package makes none."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Mapping

from specdef_cli.cli.output import Output
from specdef_cli.errors import SpecDefError
from specdef_cli.model.launcher import forget_stale_launcher

COLLECT_AFTER = (20_000, 20, 100)
"""Python's thresholds of the three generations."""

PRECISION, PRECISIONS = "ACCELERATE_MIXED_PRECISION", ("no", "fp16", "bf16", "fp8")


def collect_less_garbage() -> None:
    """Look for garbage rarely: importing torch and transformers makes a million objects that live to the end."""
    gc.set_threshold(*COLLECT_AFTER)
    atexit.register(gc.freeze)


def prefer_huge_pages() -> None:
    """Have torch ask for pages of 2 MiB, for commands that stream weights; training gains nothing."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def require_surroundings(environ: Mapping[str, str] = os.environ) -> None:
    """Refuse what no command can work in, before anything is imported that would fail in words of its own."""
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


def settle(output: Output) -> None:
    """Ignore what a launch that is over has left in the environment, and keep downloads as quiet as the command."""
    note = forget_stale_launcher()
    if note is not None:
        output.note(f"note: {note}")
    if output.quiet or output.as_json:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
