"""Shards written as a stream: the same bytes however many workers, and no shard twice."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from specdef_cli.checkpoint import stream
from specdef_cli.checkpoint.changes import ScaledSlice
from specdef_cli.checkpoint.reader import TORCH_DTYPES, Checkpoint, open_checkpoint
from specdef_cli.checkpoint.shards import (
    OutputShard,
    Produced,
    Rows,
    TensorGroup,
    TensorSpec,
    plan_shards,
    scale_slice,
    streamed,
)
from specdef_cli.checkpoint.stream import Progress, file_sha256, read_record, write_shards
from specdef_cli.errors import ResumableError, SpecDefError
from tests.commands import refusal, snapshot

CPU = torch.device("cpu")
LAYERS = 6
WIDTH = 96


@dataclass(frozen=True)
class Gram:
    """A transform whose last digits depend on how many threads a sum is split over."""

    name: str
    calls: list[str] = field(default_factory=list, compare=False)

    def group(self) -> TensorGroup:
        outputs = (
            TensorSpec(f"{self.name}.gram", "F32", (WIDTH, WIDTH)),
            TensorSpec(f"{self.name}.sum", "F32", (1,)),
        )
        return TensorGroup(self.name, outputs, self)

    def __call__(self, checkpoint: Checkpoint, device: torch.device) -> Produced:
        self.calls.append(self.name)
        weight = checkpoint.read(self.name).to(device).float()
        return Produced(
            {f"{self.name}.gram": weight.mT @ weight, f"{self.name}.sum": weight.sum()[None]},
            {"squares": float(weight.square().sum())},
        )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("stream")
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layer{number}": torch.randn(700, WIDTH, generator=generator) for number in range(LAYERS)}
    tensors |= {f"norm{number}": torch.randn(WIDTH, generator=generator).bfloat16() for number in range(LAYERS)}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(3.0), "flags": torch.tensor([True, False])}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return open_checkpoint(directory)


def plan(checkpoint: Checkpoint, calls: list[str], max_shard_size: int = 80_000) -> tuple[OutputShard, ...]:
    groups = [
        Gram(name, calls).group() if name.startswith("layer") else streamed(Rows(name, header.dtype), header.shape)
        for name, header in checkpoint.tensors.items()
    ]
    return plan_shards(groups, max_shard_size)


def write(checkpoint: Checkpoint, shards: Sequence[OutputShard], directory: Path, workers: int = 1) -> list[Progress]:
    directory.mkdir(exist_ok=True)
    events: list[Progress] = []
    write_shards(checkpoint, shards, directory, devices=[CPU], workers=workers, on_progress=events.append)
    return events


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes this advice")
def test_what_is_written_is_sent_to_the_disk_piece_by_piece(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[int, list[tuple[int, int]]] = {}
    at_flush: dict[int, int] = {}
    flush = os.fsync

    def advise(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        assert len(os.pread(descriptor, length, offset)) == length
        sent.setdefault(os.fstat(descriptor).st_ino, []).append((offset, offset + length))

    def fsync(descriptor: int) -> None:
        number = os.fstat(descriptor).st_ino
        at_flush[number] = len(sent.get(number, ()))
        flush(descriptor)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(os, "fsync", fsync)
    (shard,) = plan(checkpoint, [], max_shard_size=10**9)
    write(checkpoint, [shard], tmp_path, workers=2)
    written = (tmp_path / shard.name).stat()
    pieces = sent[written.st_ino]
    # Each follows the one before, and none is left for the flush.
    assert [begin for begin, _ in pieces] == [0, *(end for _, end in pieces[:-1])]
    assert pieces[-1][1] == written.st_size
    assert 1 < len(pieces) == at_flush[written.st_ino]


def test_safetensors_reads_what_was_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shards = plan(checkpoint, [])
    assert len(shards) > 2
    events = write(checkpoint, shards, tmp_path)
    found: dict[str, torch.Tensor] = {}
    for shard in shards:
        with safe_open(tmp_path / shard.name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in checkpoint.tensors:
        original = checkpoint.read(name)
        if name.startswith("layer"):
            torch.testing.assert_close(found[f"{name}.gram"], original.mT @ original)
        else:
            assert found[name].dtype == original.dtype
            assert torch.equal(found[name], original)
    assert sum(event.nbytes for event in events) == sum(shard.nbytes for shard in shards)
    assert {event.label for event in events} == set(checkpoint.tensors)


@pytest.mark.parametrize("max_shard_size", [80_000, 10**9])
def test_bytes_and_records_do_not_depend_on_workers_or_on_torchs_threads(
    max_shard_size: int, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The hash follows a file that is written out of order: dtypes are sorted, and workers overtake each other."""
    before, shards = torch.get_num_threads(), plan(checkpoint, [], max_shard_size)
    written = []
    try:
        for number, (workers, threads) in enumerate([(1, 1), (2, 1), (4, 1), (1, 4), (3, 2)]):
            torch.set_num_threads(threads)
            directory = tmp_path / str(number)
            write(checkpoint, shards, directory, workers)
            assert torch.get_num_threads() == threads  # as it was
            records: dict[str, Any] = {shard.name: read_record(directory, shard.name) for shard in shards}
            assert all(record.sha256 == file_sha256(directory / name) for name, record in records.items())
            written.append([record.sha256 for record in records.values()])
    finally:
        torch.set_num_threads(before)
    assert all(hashes == written[0] for hashes in written)
    figures = {label: data["squares"] for record in records.values() for label, data in record.figures.items()}
    assert figures.keys() == {f"layer{number}" for number in range(LAYERS)}
    assert figures["layer0"] == pytest.approx(float(checkpoint.read("layer0").square().sum()), rel=1e-5)


def test_a_resumed_run_repeats_no_finished_shard(checkpoint: Checkpoint, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    calls: list[str] = []
    shards = plan(checkpoint, calls)
    write(checkpoint, shards, whole)
    expected = snapshot(whole)

    resumed = tmp_path / "resumed"
    write(checkpoint, shards[:2], resumed)
    (resumed / shards[1].name).unlink()  # a record without its shard counts for nothing
    # A shard that was begun, without a record.
    (resumed / shards[2].name).write_bytes(b"\xff" * 10**6)
    inode = (resumed / shards[0].name).stat().st_ino, (resumed / shards[0].name).stat().st_mtime_ns
    calls.clear()
    events = write(checkpoint, shards, resumed)
    assert snapshot(resumed) == expected
    finished = {group.label for shard in shards[:1] for group in shard.groups}
    assert not finished & set(calls)
    layers = {name for name in checkpoint.tensors if name.startswith("layer")}
    assert sorted(calls) == sorted(layers - finished)
    assert ((resumed / shards[0].name).stat().st_ino, (resumed / shards[0].name).stat().st_mtime_ns) == inode
    # The bar runs to its end all the same.
    assert sum(event.nbytes for event in events) == sum(shard.nbytes for shard in shards)


class Refusing:
    def __call__(self, checkpoint: Checkpoint, device: torch.device) -> Produced:
        raise SpecDefError("layer3 holds NaN", "Exclude it.")


@pytest.mark.parametrize("workers", [1, 3])
def test_a_refusal_stops_the_run_and_leaves_no_record(workers: int, checkpoint: Checkpoint, tmp_path: Path) -> None:
    shards = plan(checkpoint, [])
    bad = next(number for number, shard in enumerate(shards) if any(group.label == "layer3" for group in shard.groups))
    groups = tuple(
        TensorGroup(group.label, group.outputs, Refusing()) if group.label == "layer3" else group
        for group in shards[bad].groups
    )
    broken = (*shards[:bad], OutputShard(shards[bad].name, groups), *shards[bad + 1 :])
    with pytest.raises(SpecDefError, match="layer3 holds NaN"):
        write(checkpoint, broken, tmp_path, workers)
    assert read_record(tmp_path, shards[bad].name) is None
    write(checkpoint, shards, tmp_path, workers)
    assert all(read_record(tmp_path, shard.name) for shard in shards)


def test_no_descriptor_stays_open(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def descriptors() -> set[str]:
        return {str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}

    shards = plan(checkpoint, [])
    (tmp_path / "a").mkdir()
    write(checkpoint, shards, tmp_path / "a")
    broken = [OutputShard("model.safetensors", (TensorGroup("x", (TensorSpec("x", "F32", (1,)),), Refusing()),))]
    with pytest.raises(SpecDefError):
        write(checkpoint, broken, tmp_path / "b")
    assert not [path for path in descriptors() if str(tmp_path) in path]


def assert_goes_on(checkpoint: Checkpoint, root: Path) -> None:
    """The same bytes as without a fault, from what it left in ``work``."""
    for name in ("work", "undisturbed"):
        write(checkpoint, plan(checkpoint, []), root / name)
    assert snapshot(root / "work") == snapshot(root / "undisturbed")


def test_a_full_disk_is_worth_a_resume(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = plan(checkpoint, [])
    written = 0
    pwrite = os.pwrite

    def fill_up(descriptor: int, data: memoryview, position: int) -> int:
        nonlocal written
        if written > 200_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # Short writes are legal, and the rest must be written too.
        count = pwrite(descriptor, data[:1000], position)
        written += count
        return count

    monkeypatch.setattr(stream.os, "pwrite", fill_up)
    with refusal("No space left on device", "--resume"):
        write(checkpoint, shards, tmp_path / "work")
    monkeypatch.undo()
    assert any(read_record(tmp_path / "work", shard.name) for shard in shards)
    assert_goes_on(checkpoint, tmp_path)


def test_a_read_error_is_worth_a_resume(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, reads = Path.open, []

    def failing(self: Path, *arguments: Any, **options: Any) -> Any:
        reads.append(self.suffix == ".safetensors")
        if reads[-1] and sum(reads) == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(ResumableError, match=r"model\.safetensors cannot be read: Input/output error"):
        write(checkpoint, plan(checkpoint, []), tmp_path / "work")
    monkeypatch.undo()
    assert_goes_on(checkpoint, tmp_path)


def test_a_shard_that_is_cut_off_while_it_is_written_is_not_recorded(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream.os, "pread", lambda descriptor, count, position: b"")
    with pytest.raises(ResumableError, match="was cut off while it was being written"):
        write(checkpoint, plan(checkpoint, []), tmp_path / "work")
    assert not list((tmp_path / "work").glob("*.done.json"))


def test_a_transform_that_makes_what_was_not_planned_is_our_defect(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def wrong(checkpoint: Checkpoint, device: torch.device) -> Produced:
        return Produced({"x": torch.zeros(3)})

    shard = OutputShard("model.safetensors", (TensorGroup("x", (TensorSpec("x", "F32", (2,)),), wrong),))
    with pytest.raises(AssertionError, match="x: planned"):
        write(checkpoint, [shard], tmp_path)


@pytest.mark.parametrize("nbytes", [1, 100, 2**22])
@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_a_tensor_scaled_by_blocks_of_rows_is_what_it_is_in_one_piece(tmp_path: Path, nbytes: int, dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"vector": (7,), "matrix": (11, 6), "experts": (3, 4, 5), "kernel": (4, 3, 2, 2)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    slices = {
        "vector": [ScaledSlice("vector", 0, None, (6, 2), (-3, 5))],
        "matrix": [ScaledSlice("matrix", 0, None, (9, 0), (2, -4)), ScaledSlice("matrix", 1, None, (5,), (7,))],
        "experts": [ScaledSlice("experts", 1, 2, (3, 1), (4, -2)), ScaledSlice("experts", 2, 1, (0,), (-6,))],
        "kernel": [ScaledSlice("kernel", axis, None, (1,), (axis + 1,)) for axis in range(4)],
    }
    for name, tensor in tensors.items():
        expected = tensor.to(TORCH_DTYPES[dtype], copy=True)
        for part in slices[name]:
            scale_slice(expected, part)
        rows = Rows(name, dtype, tuple(slices[name]))
        blocks = [block.clone() for block in rows.blocks(checkpoint, nbytes)]
        assert len(blocks) > 1 or nbytes > tensor.nbytes or name == "vector"
        assert torch.equal(torch.cat(blocks).view(tensor.shape), expected)
        assert torch.equal(rows.whole(checkpoint), expected)
        assert not torch.equal(expected, tensor.to(expected.dtype))


def test_a_number_in_a_later_block_that_leaves_the_range_is_refused_by_name(tmp_path: Path) -> None:
    weight = torch.ones(50, 4)
    weight[40, 1] = 3e38
    save_file({"w": weight}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    blocks = Rows("w", "F32", (ScaledSlice("w", 1, None, (1,), (2,)),)).blocks(open_checkpoint(tmp_path), 160)
    for _ in range(4):
        next(blocks)
    with pytest.raises(SpecDefError, match=r"w holds numbers from 1 to 3e\+38"):
        next(blocks)
