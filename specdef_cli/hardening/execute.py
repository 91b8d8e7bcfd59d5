"""From planned tensor groups to a published directory, in one process or in many.

Every process plans the same shards and writes its part of them; the main process then completes the directory (index,
config, manifest, card), has it verified, and publishes it. Only the last step makes anything visible.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from specdef_cli.checkpoint.durable import write_durably
from specdef_cli.checkpoint.output import check_output, discard, exclusive, prepare, publish, work_directory
from specdef_cli.checkpoint.reader import Checkpoint
from specdef_cli.checkpoint.shards import (
    OutputShard,
    TensorGroup,
    assign_shards,
    plan_shards,
    shard_header,
    shard_index,
)
from specdef_cli.checkpoint.stream import Progress, read_record, write_shards
from specdef_cli.errors import ResumableError, SpecDefError
from specdef_cli.hardening.devices import compute_devices, worker_count
from specdef_cli.model.loading import process_state


@dataclass(frozen=True)
class Written:
    """What the shards turned out to be."""

    work: Path
    sha256: Mapping[str, str]
    figures: Mapping[str, Mapping[str, Any]]


@contextmanager
def published(
    checkpoint: Checkpoint,
    groups: Sequence[TensorGroup],
    out: Path,
    fingerprint: str,
    *,
    max_shard_size: int,
    device: str | None,
    resume: bool,
    on_progress: Callable[[Progress], None],
) -> Iterator[Written | None]:
    """Write ``groups`` as shards into a work directory, which is published as ``out`` when the block ends.

    In the block, the main process adds everything but weights and index, and verifies the result.

    Args:
        groups: What to write, in order.
        fingerprint: Identifies the plan for ``resume``.
        max_shard_size: Largest shard in bytes.

    Yields:
        What was written, in the main process; ``None`` in the others, which have nothing left to do.
    """
    state = process_state(device)
    shards = plan_shards(groups, max_shard_size, checkpoint.library)
    layout = [(shard.name, shard_header(shard)[0].decode("utf-8", "replace")) for shard in shards]
    fingerprint = hashlib.sha256(f"{fingerprint} {layout}".encode()).hexdigest()
    check_output(out, checkpoint.directory, sum(shard.nbytes for shard in shards))
    if not state.is_main_process:
        state.wait_for_everyone()  # until the main process has prepared the work directory
        _write(checkpoint, shards, work_directory(out), state, device, on_progress)
        state.wait_for_everyone()
        yield None
        return
    with exclusive(out):
        try:
            work = prepare(out, fingerprint, resume=resume)
            state.wait_for_everyone()
            _write(checkpoint, shards, work, state, device, on_progress)
            state.wait_for_everyone()
            index = shard_index(shards, checkpoint.library)
            if index is not None:
                write_durably(work / index[0], index[1])
            yield _collect(work, shards)
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


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file as Hugging Face libraries format theirs."""
    write_durably(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def _write(
    checkpoint: Checkpoint,
    shards: Sequence[OutputShard],
    work: Path,
    state: PartialState,
    device: str | None,
    on_progress: Callable[[Progress], None],
) -> None:
    mine = assign_shards(shards, state.num_processes)[state.process_index]
    devices = compute_devices(device, state)
    largest = max(
        (math.prod(spec.shape) for shard in mine for group in shard.groups for spec in group.computed), default=1
    )
    workers = worker_count(devices, state.num_processes, largest)
    write_shards(checkpoint, mine, work, devices=devices, workers=workers, on_progress=on_progress)


def _collect(work: Path, shards: Sequence[OutputShard]) -> Written:
    sha256: dict[str, str] = {}
    figures: dict[str, Mapping[str, Any]] = {}
    for shard in shards:
        record = read_record(work, shard.name)
        if record is None:
            raise ResumableError(f"{shard.name} was not finished", "Run the same command with --resume.")
        sha256[shard.name] = record.sha256
        figures |= record.figures
    return Written(work, sha256, figures)
