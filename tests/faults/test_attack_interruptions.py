"""Attacks that die: run files are whole or absent, and the same command goes on without repeating one."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from specdef_cli.checkpoint.files import write_durably
from specdef_cli.checkpoint.output import exclusive
from tests.commands import Die, assert_refused, call_cli, command, death, environment, succeed
from tests.faults.small_attack import RUNS, SMALL, finished_runs, identities, visible

REPORT = {"report.html", "report.json", "curves.csv", "curves.png"}
# Where an attack can die, in order: before a run, while it is kept (before and within the write), in the report.
POINTS = [
    ("specdef_cli.attack.train.make_trainer", 3),
    ("specdef_cli.attack.one_run.write_durably", 1),
    ("os.replace", 2),
    ("specdef_cli.report.files.write_durably", 3),
]


@pytest.fixture(scope="module")
def arguments(hardened: Path, tiny_model: Callable[..., Path]) -> tuple[str, ...]:
    return ("attack", str(hardened), "--control", str(tiny_model("llama")), *SMALL, "--out")


@pytest.fixture(scope="module")
def expected(arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What an undisturbed attack finds."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    succeed(*arguments, out)
    assert len(finished_runs(out)) == RUNS
    return finished_runs(out)


def go_on(arguments: tuple[str, ...], out: Path, expected: dict[str, Any]) -> int:
    """Check what a dead attack left, start it again, and say how many runs it did not repeat."""
    assert visible(out) <= {"runs", *REPORT}
    assert finished_runs(out).items() <= expected.items()
    for name in visible(out) & {"report.json"}:
        json.loads((out / name).read_text())
    before = identities(out)
    succeed(*arguments, out)
    assert finished_runs(out) == expected
    assert visible(out) == {"runs", *REPORT}
    after = identities(out)
    assert {name: after[name] for name in before} == before
    assert {path.name for path in (out / "runs").iterdir()} == set(after)  # nothing hidden either
    return len(before)


def test_killed_at_every_stage(die: Die, arguments: tuple[str, ...], expected: dict[str, Any], tmp_path: Path) -> None:
    outs = [tmp_path / str(number) / "out" for number in range(len(POINTS))]
    fates = die([death(arguments, out, *point, signal.SIGKILL) for out, point in zip(outs, POINTS, strict=True)])
    kept = 0
    for point, out, fate in zip(POINTS, outs, fates, strict=True):
        assert fate["killed"] == signal.SIGKILL, (point, fate)
        kept += go_on(arguments, out, expected)
        # The lock of the dead attack is gone with it.
        assert [path.name for path in out.parent.iterdir()] == ["out"], point
    assert kept >= 2 + 1 + RUNS


def test_interrupted_from_the_keyboard(
    die: Die, arguments: tuple[str, ...], expected: dict[str, Any], tmp_path: Path
) -> None:
    (fate,) = die([death(arguments, tmp_path / "out", *POINTS[0], signal.SIGINT)])
    assert fate["code"] == 130, fate
    assert "Traceback" not in fate["said"]
    assert "interrupted" in fate["said"]
    go_on(arguments, tmp_path / "out", expected)


@pytest.mark.parametrize(
    "writes", ["specdef_cli.attack.one_run.write_durably", "specdef_cli.report.files.write_durably"]
)
def test_it_goes_on_when_the_disk_has_room_again(
    writes: str, arguments: tuple[str, ...], expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full at the second run file, and at the second file of the report."""
    written: list[Path] = []

    def write(path: Path, data: str | bytes) -> None:
        written.append(path)
        if len(written) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_durably(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(writes, write)
        assert_refused(call_cli(*arguments, tmp_path / "out"), "No space left on device")
    assert go_on(arguments, tmp_path / "out", expected) == (1 if "one_run" in writes else RUNS)


def test_a_second_attack_on_the_same_directory_is_told(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """An attack makes its directory while it holds the lock: it is the same before and afterwards."""
    out = tmp_path / "out"
    with exclusive(out):
        assert_refused(call_cli(*arguments, out), f"another run is writing {out}")
        assert not out.exists()
        out.mkdir()
        assert_refused(call_cli(*arguments, out), f"another run is writing {out}", empty=out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_another_attack_may_be_writing_is_not_removed(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Half a run file is removed by whoever holds the lock of its directory; from shared runs, by nobody."""
    half = tmp_path / "out" / "runs" / ".0123.json.4567.partial"
    half.parent.mkdir(parents=True)
    half.write_text("{")
    with exclusive(tmp_path / "out"):
        assert call_cli(*arguments, tmp_path / "out").code == 1
    assert half.exists()
    succeed(*arguments, tmp_path / "other", "--runs", half.parent)
    assert half.exists()
    succeed(*arguments, tmp_path / "out")
    assert not half.exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_no_worker_outlives_its_attack(
    number: signal.Signals, arguments: tuple[str, ...], expected: dict[str, Any], tmp_path: Path
) -> None:
    """With --jobs 2: the main process dies after the first run; its workers follow, and the rest can be run again."""
    out = tmp_path / "out"
    longer = (*arguments[:-1], "--jobs", "2", "--out")
    process = subprocess.Popen(
        command(*longer, out), env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        workers = wait_for_workers(process, out)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.kill()
        _, said = process.communicate(timeout=60)
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert alive == []
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in said
        assert "interrupted" in said
    assert go_on(longer, out, expected) < RUNS


def wait_for_workers(process: subprocess.Popen[str], out: Path) -> list[psutil.Process]:
    """Wait for the first finished run, and return the processes that the attack has started."""
    main = psutil.Process(process.pid)
    for _ in range(3000):
        assert process.poll() is None, process.communicate()[1]
        if finished_runs(out):
            return main.children(recursive=True)
        time.sleep(0.05)
    raise AssertionError("no run was finished")
