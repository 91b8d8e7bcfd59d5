"""What a launch that is over left in the environment: torch would wait for processes that never come."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from specdef_cli.errors import SpecDefError

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
