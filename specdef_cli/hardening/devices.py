"""Which devices compute, and how many workers feed them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import psutil
import torch
from accelerate import PartialState

from specdef_cli.errors import SpecDefError, WrongUsage

# A worker holds one layer: W, W~ and C as they are stored (in float32 at most), and the Krylov space of W.
LAYER_COPIES_PER_WORKER = 4


def compute_devices(device: str | None, state: PartialState) -> tuple[torch.device, ...]:
    """The devices of this process: the one asked for; under ``accelerate launch`` its own; else every GPU, or the CPU.

    They are ready for several threads.
    """
    devices = _chosen_devices(device, state)
    _load_linear_algebra(devices)
    return devices


def _chosen_devices(device: str | None, state: PartialState) -> tuple[torch.device, ...]:
    if device is not None:
        try:
            chosen = torch.device(device)
        except RuntimeError as error:
            raise WrongUsage(f"device {device!r} is unknown", f"Use --device {_there()}.") from error
        try:
            torch.empty(1, device=chosen).item()  # the meta device holds no values
        except (RuntimeError, AssertionError) as error:
            raise SpecDefError(f"device {device!r} is not available here", f"Use --device {_there()}.") from error
        return (chosen,)
    if state.num_processes > 1:
        return (state.device,)
    if torch.cuda.is_available():
        return tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    return (torch.device("cpu"),)


def _there() -> str:
    """The kinds of device that this machine has, for a hint."""
    return "cpu or cuda" if torch.cuda.is_available() else "cpu"


def _load_linear_algebra(devices: Sequence[torch.device]) -> None:
    """Use ``torch.linalg`` once on each accelerator, before there are threads.

    torch loads its CUDA solvers at their first use, and where two threads come first together, one of them fails with
    "lazy wrapper should be called at most once" (pytorch issue 90613).
    """
    for device in devices:
        if device.type != "cpu":
            torch.linalg.qr(torch.eye(2, device=device))


def worker_count(devices: Sequence[torch.device], processes: int, largest_tensor: int) -> int:
    """Threads of this process: one more than cores, but never more layers at once than half of the free memory holds.

    One waits for the disk while the others compute: with a thread more, factors take a sixth less on two cores.

    Args:
        devices: The devices of this process.
        processes: How many processes share this machine.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    by_cores = max(1, cores // processes) + 1
    if devices[0].type != "cpu":
        # Two threads a device: one reads and writes while the other computes.
        by_cores = min(by_cores, 2 * len(devices))
    by_memory = psutil.virtual_memory().available // (
        2 * processes * LAYER_COPIES_PER_WORKER * 4 * max(1, largest_tensor)
    )
    return max(1, min(by_cores, by_memory))
