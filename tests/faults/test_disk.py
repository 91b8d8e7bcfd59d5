"""A disk that is really full: a file system of a few kilobytes, mounted for the test."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from specdef_cli.checkpoint.output import RECORD_SUFFIX, work_directory
from tests.commands import assert_refused, call_cli, snapshot, succeed
from tests.faults.small_attack import RUNS, SMALL, finished_runs, identities, visible


class SmallDisk:
    """A mounted file system whose size can be changed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mount(self, options: str) -> None:
        """Mount it, or fail the way ``mount`` does."""
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)], check=True, capture_output=True
        )

    def enlarge(self) -> None:
        """Room for everything, from now on."""
        self.mount("remount,size=50m,nr_inodes=1000")

    def fill(self, leave: int) -> None:
        """Write a file that leaves so many bytes free."""
        status = os.statvfs(self.path)
        (self.path / "filling").write_bytes(bytes(status.f_bavail * status.f_frsize - leave))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    small = SmallDisk(tmp_path / "disk")
    small.path.mkdir()
    try:
        small.mount("size=1m")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting a file system is not permitted here: {error}")
    try:
        yield small
    finally:
        subprocess.run(["umount", str(small.path)], check=True)


@pytest.mark.parametrize("limit", ["size=1m,nr_inodes=12", "size=180k,nr_inodes=100"], ids=["shards", "last files"])
def test_harden_goes_on_when_there_is_room_again(limit: str, llama: Path, disk: SmallDisk, tmp_path: Path) -> None:
    """Full while shards are made (no room for another file), and after them (no room for another page)."""
    arguments = ("harden", llama, "--method", "factors", "--top-k", "4", "--max-shard-size", "20KB", "--quiet", "--out")
    succeed(*arguments, tmp_path / "whole")
    disk.mount(f"remount,{limit}")
    out = disk.path / "out"
    assert_refused(call_cli(*arguments, out), "No space left on device", "--resume")
    assert not out.exists()
    finished = {path.name: path.stat().st_ino for path in work_directory(out).glob("*.safetensors")}
    recorded = {path.name.removesuffix(RECORD_SUFFIX) for path in work_directory(out).glob(f"*{RECORD_SUFFIX}")}
    disk.enlarge()
    succeed(*arguments, out, "--resume")
    assert snapshot(out) == snapshot(tmp_path / "whole")
    kept = {name for name, inode in finished.items() if (out / name).stat().st_ino == inode}
    assert recorded
    assert recorded <= kept


@pytest.mark.parametrize("leave", [8_192, 40_960], ids=["runs", "report"])
def test_attack_goes_on_when_there_is_room_again(
    leave: int, hardened: Path, tiny_model: Callable[..., Path], disk: SmallDisk
) -> None:
    arguments = ("attack", hardened, "--control", tiny_model("llama"), *SMALL, "--out", disk.path / "out")
    disk.fill(leave)
    assert_refused(call_cli(*arguments), "No space left on device")
    assert len(finished_runs(disk.path / "out")) <= RUNS  # and every one is whole
    before = identities(disk.path / "out")
    disk.enlarge()
    succeed(*arguments)
    assert len(finished_runs(disk.path / "out")) == RUNS
    after = identities(disk.path / "out")
    assert {name: after[name] for name in before} == before
    assert visible(disk.path / "out") == {"runs", "report.html", "report.json", "curves.csv", "curves.png"}
