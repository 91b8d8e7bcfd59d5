"""Runs that die: nothing is ever seen under the final name, and ``--resume`` finishes with the same bytes."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from specdef_cli.checkpoint.output import RECORD_SUFFIX, work_directory
from tests.commands import Die, Result, death, snapshot, succeed

TinyModel = Callable[..., Path]
WRITE = "specdef_cli.checkpoint.stream._write_group"
# Where a harden can die, in order: while shards are written, recorded, completed, verified and published.
POINTS = [
    (WRITE, 1),
    (WRITE, 21),
    ("specdef_cli.checkpoint.stream.write_durably", 5),
    ("specdef_cli.checkpoint.output.write_durably", 1),
    ("specdef_cli.hardening.execute.write_durably", 1),
    ("specdef_cli.hardening.run.write_durably", 3),
    ("specdef_cli.hardening.run.carry_over", 1),
    ("specdef_cli.hardening.run.verify", 1),
    ("specdef_cli.hardening.execute.publish", 1),
    ("specdef_cli.checkpoint.output._flush", 5),
    ("os.fsync", 9),  # within a write, whose partial file may not be published
]


@pytest.fixture(scope="module")
def arguments(tiny_model: TinyModel) -> tuple[str, ...]:
    base = tiny_model("llama")
    return ("harden", str(base), "--method", "factors", "--top-k", "4", "--quiet", "--max-shard-size", "15KB", "--out")


@pytest.fixture(scope="module")
def expected(arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an undisturbed run writes."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    succeed(*arguments, out)
    return dict(snapshot(out))


def resume(arguments: tuple[str, ...], out: Path, expected: dict[str, str]) -> Result:
    """Check that nothing was published, resume, and check that no finished shard was written again."""
    assert not out.exists()
    work = work_directory(out)
    finished = {
        path.name.removesuffix(RECORD_SUFFIX): identity(path.with_name(path.name.removesuffix(RECORD_SUFFIX)))
        for path in work.glob(f"*{RECORD_SUFFIX}")
    }
    planned = (work / ".plan").is_file()
    result = succeed(*arguments, out, "--resume")
    assert dict(snapshot(out)) == expected
    assert not work.exists()
    if planned:
        assert {name: identity(out / name) for name in finished} == finished
    return result


def identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def test_killed_at_every_stage(die: Die, arguments: tuple[str, ...], expected: dict[str, str], tmp_path: Path) -> None:
    outs = [tmp_path / str(number) / "out" for number in range(len(POINTS))]
    died = die([death(arguments, out, *point, signal.SIGKILL) for out, point in zip(outs, POINTS, strict=True)])
    resumed = 0
    for point, out, fate in zip(POINTS, outs, died, strict=True):
        assert fate["killed"] == signal.SIGKILL, (point, fate)
        resumed += bool(list(work_directory(out).glob(f"*{RECORD_SUFFIX}")))
        resume(arguments, out, expected)
        # The lock of the dead run is gone with it.
        assert [path.name for path in out.parent.iterdir()] == ["out"], point
    assert resumed > len(POINTS) / 2


def test_interrupted_by_keyboard(
    die: Die, arguments: tuple[str, ...], expected: dict[str, str], tmp_path: Path
) -> None:
    points = [(WRITE, 12), ("specdef_cli.hardening.run.verify", 1)]
    for number, point in enumerate(points):
        out = tmp_path / str(number) / "out"
        (fate,) = die([death(arguments, out, *point, signal.SIGINT)])
        assert fate["code"] == 130, fate
        assert "Traceback" not in fate["said"]
        assert "interrupted" in fate["said"]
        assert "--resume" in fate["said"]
        resume(arguments, out, expected)


@pytest.mark.slow
def test_killed_at_random_moments(
    die: Die, arguments: tuple[str, ...], expected: dict[str, str], tmp_path: Path
) -> None:
    generator = random.Random(0)
    outs = [tmp_path / str(number) / "out" for number in range(30)]
    cases = [{**death(arguments, out, None, 0, signal.SIGKILL), "delay": generator.uniform(0, 0.9)} for out in outs]
    unfinished = 0
    for out, fate in zip(outs, die(cases), strict=True):
        if fate["killed"] is None:
            assert fate["code"] == 0
            assert dict(snapshot(out)) == expected
        elif out.exists():
            # Killed after the rename: then all of it is there.
            assert dict(snapshot(out)) == expected
        else:
            unfinished += 1
            out.parent.mkdir(exist_ok=True)
            resume(arguments, out, expected)
    assert unfinished > 5


@pytest.mark.slow
def test_a_run_that_dies_again_and_again_arrives(
    die: Die, arguments: tuple[str, ...], expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # Every attempt gets a few tensors further than the records of the one before.
    resuming = ("harden", "--resume", *arguments[1:])
    for fate in die([death(resuming, out, WRITE, 10, signal.SIGKILL)] * 20):
        if fate["killed"] is None:
            assert fate["code"] == 0, fate
            break
    else:
        pytest.fail("it did not arrive")
    assert dict(snapshot(out)) == expected
