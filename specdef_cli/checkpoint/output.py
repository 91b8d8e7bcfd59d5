"""An output directory that appears under its name only when it is complete.

Work happens in a hidden sibling; publishing is one rename. An empty directory that exists may be a mounted volume,
which nothing can replace: there, work happens in a hidden directory within, and publishing moves its files up, the
configuration last. A run that dies leaves its work behind, with the record of every finished shard, for ``--resume``.
A lock tells a second run to the same place that it is late.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from specdef_cli.checkpoint.files import remove_unfinished, takes_files, write_durably
from specdef_cli.errors import ResumableError, SpecDefError

WORK_SUFFIX = ".specdef-unfinished"
LOCK_SUFFIX = ".specdef-lock"
RECORD_SUFFIX = ".done.json"
FINGERPRINT = ".plan"
LOOKS = 0.2
"""Seconds in which a lock that is free is had."""


def work_directory(final: Path) -> Path:
    """Where the output is built: on the file system that it will be on, so that publishing only renames."""
    beside = final.parent / f".{final.name}{WORK_SUFFIX}"
    return final / f".{final.name}{WORK_SUFFIX}" if final.is_dir() and not beside.is_dir() else beside


def check_output(final: Path, source: Path, nbytes: int) -> None:
    """Refuse an output that is taken, lies in its own input, or does not fit on the disk."""
    require_usable(final, source)
    existing = writable_ancestor(work_directory(final).resolve().parent)
    free = shutil.disk_usage(existing).free
    for path in work_directory(final).rglob("*"):  # what an interrupted run left is either reused or removed
        with contextlib.suppress(FileNotFoundError):  # the run that it belongs to may be alive
            free += path.stat().st_blocks * 512
    if nbytes > free:
        raise SpecDefError(
            f"the output needs {nbytes / 1e9:.1f} GB and {existing} has {free / 1e9:.1f} GB free",
            "Free some space, or choose another --out.",
        )


@contextlib.contextmanager
def exclusive(final: Path) -> Iterator[None]:
    """Hold the lock of an output directory, which may come into being while it is held: it lies beside, if it can."""
    inside = final.is_mount() or (final.is_dir() and not os.access(final.parent, os.W_OK))
    place = final if inside else final.parent
    place.mkdir(parents=True, exist_ok=True)
    path = place / f".{final.name}{LOCK_SUFFIX}"
    # Whoever gets a lock on a file that was removed meanwhile tries again, so it takes more than one look.
    lock = FileLock(path, timeout=LOOKS, poll_interval=LOOKS / 4)
    try:
        lock.acquire()
    except Timeout as error:
        raise SpecDefError(
            f"another run is writing {final}", "Wait for it to finish, or choose another --out."
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: after that, the name may be another run's
        lock.release()


def prepare(final: Path, fingerprint: str, *, resume: bool) -> Path:
    """Make the work directory, keeping what an interrupted run of the same plan finished if ``resume``."""
    work = work_directory(final)
    plan_file = work / FINGERPRINT
    if resume and plan_file.is_file():
        if plan_file.read_text(encoding="utf-8") != fingerprint:
            raise ResumableError(
                f"the unfinished run of {final} had other options or another input",
                "Run with the same options to resume, or without --resume to start again.",
            )
        remove_unfinished(work)
        return work
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_durably(plan_file, fingerprint)
    return work


def publish(final: Path) -> None:
    """Flush the work directory and give it its name."""
    if is_taken(final):
        raise ResumableError(
            f"the output {final} came into being during this run", "Remove it, then run the same command with --resume."
        )
    work = work_directory(final)
    for record in work.glob(f"*{RECORD_SUFFIX}"):
        record.unlink()
    (work / FINGERPRINT).unlink(missing_ok=True)
    for path in work.rglob("*"):
        if path.is_file():
            _flush(path)
    _flush(work)
    if work.parent == final:
        for path in sorted(work.iterdir(), key=lambda path: path.name == "config.json"):
            path.rename(final / path.name)
        work.rmdir()
        _flush(final)
        return
    if final.is_dir():
        final.rmdir()
    work.rename(final)
    _flush(final.parent)


def discard(final: Path) -> None:
    """Remove the work directory: a later run could not use what is in it."""
    shutil.rmtree(work_directory(final), ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_usable(final: Path, model: str | Path) -> None:
    """Refuse an output directory that is taken, or lies in the input where that is a directory."""
    if str(model) and Path(model).expanduser().is_dir():
        require_outside(final, Path(model).expanduser())
    if is_taken(final):
        raise SpecDefError(f"the output {final} exists already", "Choose another --out, or remove it first.")


def require_outside(final: Path, source: Path) -> None:
    if final.resolve().is_relative_to(source.resolve()):
        raise SpecDefError(f"the output {final} lies in the input {source}", "Choose a directory outside the input.")


def is_taken(final: Path) -> bool:
    """Whether ``final`` is anything but absent or an empty directory; a new volume of ext4 has ``lost+found`` in it."""
    if final.is_symlink() or final.name in {"", ".."}:
        return True
    if not final.is_dir():
        return final.exists()
    ours = {f".{final.name}{suffix}" for suffix in (WORK_SUFFIX, LOCK_SUFFIX)}
    return not {path.name for path in final.iterdir()} <= {*ours, "lost+found"}


def require_manifest_place(path: Path, out: Path, model: str | Path = "") -> None:
    """Refuse a place for a manifest that is taken, in the published directory or the model, or not writable."""
    if path.exists() or path.is_symlink():
        raise SpecDefError(f"--manifest-out {path} exists already", "Choose another file, or remove it first.")
    source = Path(model).expanduser()
    taken = {"the directory that is published": out}
    taken |= {f"the model {source}, which is not hardened": source} if str(model) and source.is_dir() else {}
    for place, directory in taken.items():
        if path.resolve().is_relative_to(directory.resolve()):
            raise SpecDefError(
                f"--manifest-out {path} lies in {place}", "Choose a file outside of it, or leave the option out."
            )
    if out.resolve().is_relative_to(path.resolve()):
        raise SpecDefError(
            f"--manifest-out {path} is a directory that --out {out} lies in", "Choose a file outside of --out."
        )
    try:
        writable_ancestor(path.resolve().parent)
    except SpecDefError as error:
        raise SpecDefError(
            f"--manifest-out {path} cannot be written: {error.problem}", "Choose another file."
        ) from error


def writable_ancestor(directory: Path) -> Path:
    """The directory itself, or the nearest one above it that exists."""
    existing = directory.resolve()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not takes_files(existing):
        raise SpecDefError(f"{existing} is not a directory that can be written to", "Choose another --out.")
    return existing
