"""Small files are replaced whole, by any number of writers, and an earlier one outlives a failure."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from specdef_cli.checkpoint.files import remove_unfinished, write_durably


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


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
