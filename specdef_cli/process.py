"""The process of a command or a worker: what a launch left in its environment, what libraries log, how it waits.

Nothing here imports a library: it has to run before they are imported.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pkgutil import resolve_name
from types import ModuleType
from typing import Any, TypeVar

from specdef_cli.errors import SpecDefError

LOUD = "SPECDEF_DEBUG"
"""Environment variable that lets everything through: ``--verbose`` sets it, for the workers of ``--jobs`` too."""

NOISY = ("torchao", "torch.utils._pytree", "bitsandbytes")
"""They warn of kernels for other machines, of each other's interfaces, and of every cast."""


def quiet_engines(environ: Mapping[str, str] = os.environ) -> None:
    """Limit some libraries to errors; transformers' and the user's own warnings stay."""
    if not environ.get(LOUD):
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)


def start_worker(function: str, *arguments: Any) -> None:
    """Run ``package.module:name`` in a new process that has been made quiet; its module is imported only then."""
    quiet_engines()
    resolve_name(function)(*arguments)


LONGEST_SLEEP = 0.5
"""Seconds. The system may hand a signal to any thread, and Python acts on it in the main thread, once that wakes up."""

Result = TypeVar("Result")


def first_completed(futures: Iterable[Future[Result]]) -> tuple[set[Future[Result]], set[Future[Result]]]:
    """Return once one of some futures is done: those that are, and the others.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed, at most :data:`LONGEST_SLEEP` ago.
    """
    waited_for = set(futures)
    while True:
        done, others = wait(waited_for, timeout=LONGEST_SLEEP, return_when=FIRST_COMPLETED)
        if done or not others:
            return done, others


SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
LOCAL = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
ADDRESS = "MASTER_ADDR"


def forget_stale_launcher(environ: MutableMapping[str, str] = os.environ) -> str | None:
    """Remove the variables of a launch of one process that cannot be joined; a note for the user, if there were any."""
    found = {name: environ[name] for name in (*SIZES, *RANKS, *LOCAL) if name in environ}
    if not found:
        return None
    shown = " ".join(f"{name}={value}" for name, value in found.items())
    remedy = f"Run `unset {' '.join((*found, ADDRESS))}` to work alone, or start all processes with torchrun."
    try:
        size = max(int(found.get(name, "").strip() or 1) for name in SIZES)
        rank = max(int(found.get(name, "").strip() or 0) for name in RANKS)
    except ValueError as error:
        raise SpecDefError(f"{shown} in the environment is not a whole number of processes", remedy) from error
    if environ.get(ADDRESS) and all(value.strip() for value in found.values()):
        if rank >= size:
            raise SpecDefError(f"rank {rank} is outside 0 to {size - 1} ({shown} in the environment)", remedy)
        return None
    if size > 1:
        raise SpecDefError(f"{shown} is set, but {ADDRESS} is not", remedy)
    for name in found:
        del environ[name]
    return f"{shown} was ignored: {ADDRESS} is not set, so no other process can be joined"


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
    """Refuse surroundings in which no command works, before an import fails in its own words."""
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


class CallablePackage(ModuleType):
    """A package that is called like its function: importing ``specdef_cli.attack`` binds its name."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call the function of ``run`` that is named as the package is."""
        name = self.__name__.rpartition(".")[2]
        return resolve_name(f"{self.__name__}.run:{name}")(*arguments, **options)
