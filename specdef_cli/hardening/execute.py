"""From planned tensor groups to a published directory, in one process or in many.

Every process plans the same shards and writes its part of them; the main process then completes the directory (index,
config, manifest, card), has it verified, and publishes it. Only the last step makes anything visible.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState

from specdef_cli.checkpoint.files import write_durably
from specdef_cli.checkpoint.output import check_output, discard, exclusive, prepare, publish, work_directory
from specdef_cli.checkpoint.shards import TensorGroup, assign_shards, plan_shards, shard_index
from specdef_cli.checkpoint.stream import Progress, read_record, write_shards
from specdef_cli.errors import ResumableError, SpecDefError, WrongUsage
from specdef_cli.hardening.options import CollapseOptions, HardenOptions
from specdef_cli.model.loading import process_state
from specdef_cli.model.opened import OpenedModel

# A worker holds one layer: W, W~ and C as they are stored (in float32 at most), and the Krylov space of W.
LAYER_COPIES_PER_WORKER = 4


@dataclass(frozen=True)
class Written:
    """The finished shards: hashes and figures."""

    work: Path
    sha256: Mapping[str, str]
    figures: Mapping[str, Mapping[str, Any]]


@contextmanager
def published(
    model: OpenedModel,
    groups: Sequence[TensorGroup],
    options: HardenOptions | CollapseOptions,
    on_progress: Callable[[Progress], None],
) -> Iterator[Written | None]:
    """Write ``groups`` as shards into a work directory, which is published as ``options.out`` when the block ends.

    In the block, the main process adds everything but weights and index, and verifies the result.

    Yields:
        What was written, in the main process; ``None`` in the others, which have nothing left to do.
    """
    state, out, checkpoint = process_state(options.device), options.out, model.checkpoint
    shards = plan_shards(groups, options.max_shard_size, checkpoint.library)
    version = model.found.commit or [(checkpoint.directory / name).stat().st_mtime_ns for name in checkpoint.shards]
    # What --resume goes on with: these shards of this input.
    fingerprint = hashlib.sha256(f"{shards} {checkpoint.tensors} {version}".encode()).hexdigest()
    check_output(out, checkpoint.directory, sum(shard.nbytes for shard in shards))

    def write() -> None:
        state.wait_for_everyone()  # until the main process has prepared the work directory
        mine = assign_shards(shards, state.num_processes)[state.process_index]
        devices = compute_devices(options.device, state)
        computed = (spec for shard in mine for group in shard.groups for spec in group.computed)
        largest = max((math.prod(spec.shape) for spec in computed), default=1)
        workers = worker_count(devices, state.num_processes, largest)
        write_shards(checkpoint, mine, work_directory(out), devices=devices, workers=workers, on_progress=on_progress)
        state.wait_for_everyone()

    if not state.is_main_process:
        write()
        yield None
        return
    with exclusive(out):
        try:
            work = prepare(out, fingerprint, resume=options.resume)
            write()
            index = shard_index(shards, checkpoint.library)
            if index is not None:
                write_durably(work / index[0], index[1])
            records = {shard.name: read_record(work, shard.name) for shard in shards}
            done = {name: record for name, record in records.items() if record is not None}
            if len(done) < len(records):
                unfinished = next(name for name in records if name not in done)
                raise ResumableError(f"{unfinished} was not finished", "Run the same command with --resume.")
            figures = {label: made for record in done.values() for label, made in record.figures.items()}
            yield Written(work, {name: record.sha256 for name, record in done.items()}, figures)
            publish(out)
        except ResumableError:
            raise
        except SpecDefError:
            discard(out)
            raise
        except OSError as error:
            raise ResumableError(
                f"writing {out} failed: {error.strerror or error}",
                "Free some space or repair the disk, then run the same command with --resume.",
            ) from error


def compute_devices(device: str | None, state: PartialState) -> tuple[torch.device, ...]:
    """The devices of this process: the one asked for; under ``accelerate launch`` its own; else every GPU, or the CPU.

    They are ready for several threads.
    """
    devices: tuple[torch.device, ...]
    if device is not None:
        hint = f"Use --device {'cpu or cuda' if torch.cuda.is_available() else 'cpu'}."
        try:
            devices = (torch.device(device),)
        except RuntimeError as error:
            raise WrongUsage(f"device {device!r} is unknown", hint) from error
        try:
            torch.empty(1, device=devices[0]).item()  # the meta device holds no values
        except (RuntimeError, AssertionError) as error:
            raise SpecDefError(f"device {device!r} is not available here", hint) from error
    elif state.num_processes > 1:
        devices = (state.device,)
    elif torch.cuda.is_available():
        devices = tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    else:
        devices = (torch.device("cpu"),)
    # torch loads its CUDA solvers at their first use, and where two threads come first together, one of them fails with
    # "lazy wrapper should be called at most once" (pytorch issue 90613).
    for place in devices:
        if place.type != "cpu":
            torch.linalg.qr(torch.eye(2, device=place))
    return devices


def worker_count(devices: Sequence[torch.device], processes: int, largest_tensor: int) -> int:
    """Threads of this process: one more than cores, but never more layers at once than half of the free memory holds.

    One waits for the disk while the others compute: with a thread more, factors take a sixth less on two cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    by_cores = max(1, cores // processes) + 1
    if devices[0].type != "cpu":
        # Two threads a device: one reads and writes while the other computes.
        by_cores = min(by_cores, 2 * len(devices))
    layer = LAYER_COPIES_PER_WORKER * 4 * max(1, largest_tensor)
    return max(1, min(by_cores, psutil.virtual_memory().available // (2 * processes * layer)))
