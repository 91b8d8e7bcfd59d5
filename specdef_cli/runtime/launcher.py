"""The variables by which launchers tell a process of its siblings, and what is left of them when there are none.

A shell, a container or a notebook often keeps ``RANK`` and ``WORLD_SIZE`` of a launch that is long over. torch then
waits for processes that never come, or fails on a variable that the user never set.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from specdef_cli.errors import SpecDefError

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
LOCAL = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
ADDRESS = "MASTER_ADDR"


def forget_stale_launcher(environ: MutableMapping[str, str] = os.environ) -> str | None:
    """Take the variables of a launch of one process away, where they do not say how to reach it.

    Args:
        environ: The environment, which is changed.

    Returns:
        What was done, as a note for the user; ``None`` if nothing was.

    Raises:
        SpecDefError: They speak of several processes that cannot be found, or are no numbers.
    """
    found = {name: environ[name] for name in (*SIZES, *RANKS, *LOCAL) if name in environ}
    shown = " ".join(f"{name}={value}" for name, value in found.items())
    remedy = f"Run `unset {' '.join((*found, ADDRESS))}` to work alone, or start all processes with torchrun."
    numbers: dict[str, int] = {}
    for name, value in found.items():
        if value.strip():
            try:
                numbers[name] = int(value)
            except ValueError as error:
                raise SpecDefError(f"{name} is {value!r} in the environment, which is no number", remedy) from error
    size = max((numbers[name] for name in SIZES if name in numbers), default=1)
    rank = max((numbers[name] for name in RANKS if name in numbers), default=0)
    addressed = bool(environ.get(ADDRESS))
    if size > 1 and not addressed:
        raise SpecDefError(f"the environment speaks of {size} processes ({shown}), and {ADDRESS} is not set", remedy)
    if addressed and rank >= size:
        raise SpecDefError(f"the environment makes this process number {rank} of {size} ({shown})", remedy)
    empty = any(not value.strip() for value in found.values())
    if not empty and (addressed or not any(name in numbers for name in LOCAL)):
        return None
    for name in found:
        del environ[name]
    return f"{shown}: left over from another launch, and ignored; this process works alone"
