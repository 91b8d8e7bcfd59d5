"""Outputs are there whole or not at all, small files are replaced whole, and one run at a time makes them."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Event
from pathlib import Path
from types import SimpleNamespace

import pytest

from specdef_cli.checkpoint.files import remove_unfinished, write_durably
from specdef_cli.checkpoint.output import (
    RECORD_SUFFIX,
    check_output,
    discard,
    exclusive,
    prepare,
    publish,
    require_manifest_place,
    work_directory,
)
from specdef_cli.errors import ResumableError, SpecDefError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def refused(final: Path, source: Path, nbytes: int = 10) -> str:
    before = sorted(path for path in final.absolute().parent.rglob("*"))
    with pytest.raises(SpecDefError) as raised:
        check_output(final, source, nbytes)
    assert sorted(path for path in final.absolute().parent.rglob("*")) == before
    return raised.value.problem


def test_a_new_name_and_an_empty_directory_are_fine(source: Path, tmp_path: Path) -> None:
    check_output(tmp_path / "out", source, 10)
    check_output(tmp_path / "a" / "b" / "out", source, 10)
    assert not (tmp_path / "a").exists()
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", source, 10)
    check_output(tmp_path / "source-hardened", source, 10)  # it only begins as the input does


def test_an_output_in_its_input_is_refused(source: Path, tmp_path: Path) -> None:
    for final in (source, source / "out", source / "a" / "out", tmp_path / "elsewhere" / ".." / "source" / "out"):
        assert "lies in the input" in refused(final, source)
    (tmp_path / "alias").symlink_to(source)
    assert "lies in the input" in refused(tmp_path / "alias" / "out", source)


def test_what_exists_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".hidden").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    os.mkfifo(tmp_path / "fifo")
    for name in ("file", "full", "dangling", "link", "fifo"):
        assert f"{tmp_path / name} exists already" in refused(tmp_path / name, source)
    assert str(tmp_path / "file") in refused(tmp_path / "file" / "a" / "out", source)


def test_the_working_directory_is_no_output(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(SpecDefError, match=r"the output \. exists"):
        check_output(Path("."), source, 10)  # noqa: PTH201
    check_output(Path("out"), source, 10)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_without_write_permission_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot be written to" in refused(tmp_path / "locked" / "out", source)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that only looks as if it took files")
def test_a_parent_whose_file_system_takes_no_files_is_refused(source: Path) -> None:
    with pytest.raises(SpecDefError, match="/proc is not a directory that can be written to"):
        check_output(Path("/proc/out"), source, 10)
    with pytest.raises(SpecDefError, match=r"--manifest-out /proc/m\.json cannot be written"):
        require_manifest_place(Path("/proc/m.json"), source.parent / "out")


def test_a_disk_too_small_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 10**9))
    check_output(tmp_path / "out", source, 3 * 10**9)
    assert "needs 4.0 GB" in refused(tmp_path / "deep" / "er" / "out", source, 4 * 10**9)


def test_what_a_dead_run_wrote_is_not_counted_twice(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = work_directory(tmp_path / "out")
    work.mkdir()
    (work / "shard").write_bytes(bytes(10**6))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=500_000))
    check_output(tmp_path / "out", source, 1_200_000)
    assert "needs" in refused(tmp_path / "out", source, 2_000_000)


@pytest.mark.parametrize("empty", [False, True])
def test_publishing_is_one_rename_of_everything_but_the_bookkeeping(empty: bool, tmp_path: Path) -> None:
    """It takes the place of an empty directory."""
    final = tmp_path / "out"
    if empty:
        final.mkdir()
    work = prepare(final, "plan", resume=False)
    assert work.parent == (final if empty else final.parent)
    assert work.name.startswith(".")
    (work / "model.safetensors").write_bytes(b"weights")
    (work / f"model.safetensors{RECORD_SUFFIX}").write_text("{}")
    (work / "sub").mkdir()
    (work / "sub" / "pooling.json").write_text("{}")
    inode = (work / "model.safetensors").stat().st_ino
    publish(final)
    assert names(final) == ["model.safetensors", "sub"]
    assert names(final / "sub") == ["pooling.json"]
    assert (final / "model.safetensors").stat().st_ino == inode
    assert names(tmp_path) == ["out"]


def test_publishing_overwrites_nothing(tmp_path: Path) -> None:
    final = tmp_path / "out"
    work = prepare(final, "plan", resume=False)
    (work / f"model.safetensors{RECORD_SUFFIX}").write_text("{}")
    final.mkdir()
    (final / "precious").write_text("x")
    with pytest.raises(ResumableError, match="came into being"):
        publish(final)
    assert (final / "precious").read_text() == "x"
    assert (work / f"model.safetensors{RECORD_SUFFIX}").is_file()


def test_resume_keeps_the_work_of_the_same_plan_only(tmp_path: Path) -> None:
    final = tmp_path / "out"
    work = prepare(final, "plan A", resume=False)
    (work / "shard").write_text("x")
    assert prepare(final, "plan A", resume=True) == work
    assert (work / "shard").is_file()
    with pytest.raises(ResumableError, match="other options or another input"):
        prepare(final, "plan B", resume=True)
    assert (work / "shard").is_file()
    prepare(final, "plan B", resume=False)
    assert not (work / "shard").exists()
    discard(final)
    discard(final)
    assert list(tmp_path.iterdir()) == []
    work.mkdir()
    (work / "shard").write_text("of an unknown plan")
    assert prepare(final, "plan", resume=True) == work
    assert not (work / "shard").exists()


def test_a_mounted_volume_is_filled_from_within(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is mounted can be neither removed nor renamed, and only it may be writable."""
    final = tmp_path / "volume"
    (final / "lost+found").mkdir(parents=True)
    check_output(final, source, 10)

    def rmdir(path: Path) -> None:
        if path == final:
            raise OSError(errno.EBUSY, "Device or resource busy")
        os.rmdir(path)  # noqa: PTH106 - it stands for the method

    monkeypatch.setattr(Path, "rmdir", rmdir)
    with exclusive(final):
        work = prepare(final, "plan", resume=False)
        (work / "config.json").write_text("{}")
        (work / "sub").mkdir()
        (work / "sub" / "pooling.json").write_text("{}")
        check_output(final, source, 10)  # as another process, or a resumed run, asks
        assert prepare(final, "plan", resume=True) == work
        publish(final)
    assert names(final) == ["config.json", "lost+found", "sub"]
    assert names(tmp_path) == ["source", "volume"]
    assert "exists already" in refused(final, source)


def _take_turns(final: Path, seconds: float, findings: multiprocessing.Queue[tuple[int, int]]) -> None:
    """Hold the lock as often as can be, and count how often another process held it too."""
    held = shared = 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(SpecDefError), exclusive(final):
            held += 1
            try:
                (final.parent / "held").touch(exist_ok=False)
            except FileExistsError:
                shared += 1
                continue
            time.sleep(0.0005)
            (final.parent / "held").unlink()
    findings.put((held, shared))


def test_of_three_processes_one_holds_the_lock(tmp_path: Path) -> None:
    """While a second waits for the file that the first removes, a third makes a new one."""
    context = multiprocessing.get_context("fork")
    findings = context.Queue()
    processes = [context.Process(target=_take_turns, args=(tmp_path / "out", 1.0, findings)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [findings.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert sum(held for held, _ in found) > 10
    assert [shared for _, shared in found] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


def _hold(final: Path, held: Event) -> None:
    with exclusive(final):
        held.set()
        time.sleep(300)


def test_a_second_run_is_told_and_a_dead_run_holds_nothing(tmp_path: Path) -> None:
    final, context = tmp_path / "deep" / "out", multiprocessing.get_context("fork")
    held = context.Event()
    holder = context.Process(target=_hold, args=(final, held))
    holder.start()
    try:
        assert held.wait(60)
        with pytest.raises(SpecDefError, match="another run is writing"), exclusive(final):
            pass
        with exclusive(tmp_path / "deep" / "other"):
            pass
    finally:
        holder.kill()
        holder.join()
    with exclusive(final):
        pass
    assert names(tmp_path / "deep") == []


def test_text_and_bytes_replace_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.json"
    write_durably(path, "a much longer text than the next")
    write_durably(path, "ε")
    assert path.read_bytes() == "ε".encode()
    write_durably(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert names(path.parent) == ["record.json"]


def test_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    contents = [str(number) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: write_durably(tmp_path / "x", content), contents * 4))
    assert (tmp_path / "x").read_text() in contents
    assert names(tmp_path) == ["x"]


def test_a_disk_that_fails_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_durably(tmp_path / "x", "earlier")

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_durably(tmp_path / "x", "later")
    assert (tmp_path / "x").read_text() == "earlier"
    assert names(tmp_path) == ["x"]


def test_what_a_killed_write_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    monkeypatch.setattr(Path, "replace", lambda *_: None)
    write_durably(tmp_path / "x", "half")  # as if the process had ended before the rename
    monkeypatch.undo()
    (left,) = names(tmp_path)
    assert left.startswith(".x.")
    (tmp_path / ".keep").touch()
    remove_unfinished(tmp_path)
    assert names(tmp_path) == [".keep"]
