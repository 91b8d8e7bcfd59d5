"""The processes that share the work: one alone, or as many as ``accelerate launch`` or ``torchrun`` started."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState

from specdef_cli.errors import SpecDefError, first_line
from specdef_cli.runtime.launcher import forget_stale_launcher

# A process that has written its shards waits for the slowest one: for a large model, longer than any default.
LONGEST_WAIT = timedelta(days=2)


def process_state(device: str | None = None) -> PartialState:
    """Accelerate's view of the processes.

    Accelerate looks for other processes on the CPU only where it is told that the CPU is what computes; without that,
    every process of a launch on a machine without an accelerator would believe that it is alone. ``accelerate launch``
    itself starts several processes on accelerators only; on the CPU, ``torchrun`` does.

    Args:
        device: Where to compute; ``None`` is an accelerator where there is one.
    """
    forget_stale_launcher()
    try:
        return PartialState(cpu=device == "cpu" or not torch.accelerator.is_available(), timeout=LONGEST_WAIT)
    except (RuntimeError, ValueError) as error:
        raise SpecDefError(
            f"the processes that the environment speaks of cannot be joined: {first_line(error)}",
            "Run `unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT` to work alone, or start all processes "
            "with torchrun.",
        ) from error
