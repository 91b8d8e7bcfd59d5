"""Commands that download their model first: what they fetch, what they ask of the disk, and how they end early.

The Hub is a server on this machine.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants, file_download, snapshot_download

from specdef_cli.checkpoint.resolve import resolve
from specdef_cli.model.opened import open_base, open_model
from tests.checkpoint.test_resolve import base_at
from tests.commands import Result, assert_refused, call_cli, run_two_processes, snapshot, succeed
from tests.hub_server import COMMITS, Hub, eventually, model_files, online, serving, variables

TinyModel = Callable[..., Path]
OPTIONS = {
    "factors": ("--method", "factors", "--top-k", "4", "--max-shard-size", "15KB", "--quiet"),
    "fold": ("--method", "fold", "--max-shard-size", "15KB", "--quiet"),
}


@pytest.fixture
def base(tiny_model: TinyModel) -> Path:
    """A tiny Llama in several shards."""
    directory = tiny_model("llama", max_shard_size="25KB")
    assert len(shards(directory)) > 3
    return directory


def shards(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.safetensors"))


def offline(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory / "cache"))


def harden(method: str, out: Path, *more: str, model: str | Path = "org/name") -> Result:
    return call_cli("harden", model, "--out", out, *OPTIONS[method], *more)


def assert_as_from_a_directory(method: str, out: Path, base: Path, other: Path) -> None:
    """The same bytes but for where the base came from."""
    result = harden(method, other, model=base)
    assert result.code == 0, result.stderr
    ours, theirs = dict(snapshot(out)), dict(snapshot(other))
    named = {"specdef.json", "README.md"}
    assert {name: data for name, data in ours.items() if name not in named} == {
        name: data for name, data in theirs.items() if name not in named
    }
    manifest, expected = (json.loads((place / "specdef.json").read_text()) for place in (out, other))
    assert manifest.pop("base") == base_at("main")
    expected.pop("base")
    assert manifest == expected


@pytest.mark.parametrize("method", ["factors", "fold"])
def test_from_the_hub_as_from_disk(method: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard is fetched once, and the cache then serves offline."""
    out = tmp_path / "out"
    with online(Hub(model_files(base)), tmp_path) as hub:
        succeed("inspect", "org/name", "--quiet")
        result = harden(method, out)
    assert result.code == 0, result.stderr
    assert sorted(name for name in hub.downloaded() if name.endswith(".safetensors")) == shards(base)
    card = (out / "README.md").read_text()
    assert "base_model: org/name" in card
    assert COMMITS["main"] in card
    assert_as_from_a_directory(method, out, base, tmp_path / "other")
    offline(tmp_path, monkeypatch)
    assert harden(method, tmp_path / "again").code == 0
    assert snapshot(tmp_path / "again") == snapshot(out)


def test_a_model_in_a_folder_of_its_repository(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That folder alone is fetched, the result is that of the directory, and the manifest's base is found again."""
    inside = {f"parts/tiny/{name}": data for name, data in model_files(base).items()}
    others = {"config.json": b"{}", "parts/model.safetensors": b"x" * 99, "notes.gguf": b"GGUF"}
    out = tmp_path / "out"
    with online(Hub({**others, **inside}), tmp_path) as hub:
        result = harden("fold", out, "--subfolder", "parts/tiny/")
        assert result.code == 0, result.stderr
        assert {path for _, path, _ in hub.seen if "/resolve/" in path} == {
            f"/org/name/resolve/{COMMITS['main']}/{name}" for name in inside
        }
        for folder, problem in {"absent": "in absent", "parts": "parts", "../x": "does not lie in org/name"}.items():
            refused = call_cli("harden", "org/name", "--subfolder", folder, "--out", tmp_path / "no")
            assert_refused(refused, problem, code=2 if ".." in folder else 1)
    offline(tmp_path, monkeypatch)
    succeed("inspect", "org/name", "--subfolder", "parts/tiny", "--quiet")
    assert harden("fold", tmp_path / "other", model=base).code == 0
    ours, theirs = (snapshot(made) for made in (out, tmp_path / "other"))
    assert all(theirs[name] == data for name, data in ours.items() if "safetensors" in name)
    hardened = open_model(out, hardened=True)
    assert hardened.hardening.base.subfolder == "parts/tiny"
    for found in (
        open_base(hardened, None, "--control"),
        open_base(hardened, "org/name", "--control", subfolder="parts/tiny"),
        open_base(hardened, base.parent, "--control", subfolder=base.name),
    ):
        assert found.checkpoint.shards == tuple(shards(base))
    monkeypatch.setattr("specdef_cli.certify.run.is_causal_lm", lambda config: False)  # the tiny base has no tokenizer
    inside = {f"parts/hard/{name}": data for name, data in model_files(out).items()}
    certify = ("--subfolder", "parts/hard", "--base", base, "--dry-run", "--out", tmp_path / "certificate")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "hard").symlink_to(out)
    with online(Hub({**others, **inside}), tmp_path / "second"):
        for model in ("org/name", tmp_path):
            result = call_cli("certify", model, *certify)
            assert "measured: function, spectrum" in result.stdout, result.stderr


def test_a_pipeline_is_refused_before_it_is_downloaded(base: Path, tmp_path: Path) -> None:
    """The hint names a folder that can be given."""
    folders = [
        {f"{name}/{file}": data for file, data in model_files(base).items()} for name in ("text_encoder", "unet")
    ]
    files = {"model_index.json": b"{}", **folders[0], **folders[1]}
    with online(Hub(files), tmp_path) as hub:
        refused = harden("fold", tmp_path / "out")
        assert_refused(refused, "org/name has no config.json at its root", "--subfolder unet.")
        assert hub.downloaded() == []
        assert harden("fold", tmp_path / "out", "--subfolder", "unet").code == 0


def test_a_cache_that_huggingface_hub_has_filled(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, it serves offline; with one shard gone, it does not, and that one alone is fetched."""
    last = shards(base)[-1]
    with online(Hub(model_files(base)), tmp_path) as hub:
        directory = Path(snapshot_download("org/name", cache_dir=tmp_path / "cache"))
    hub.seen.clear()
    with monkeypatch.context() as patch:
        offline(tmp_path, patch)
        assert harden("factors", tmp_path / "b").code == 0
        (directory / last).resolve().unlink()
        (directory / last).unlink()
        assert_refused(harden("factors", tmp_path / "c"), "org/name is not in the local cache")
    with online(hub, tmp_path):
        assert harden("factors", tmp_path / "d").code == 0
        assert hub.downloaded() == [last]
    assert snapshot(tmp_path / "d") == snapshot(tmp_path / "b")


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ({"denied": "LAST"}, "org/name is gated"),
        ({"broken": "LAST"}, "org/name could not be fetched"),
        ({}, f"org/name could not be fetched: {os.strerror(errno.ENOSPC)}"),
    ],
)
def test_a_shard_that_does_not_arrive(
    fault: dict[str, str], problem: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two lines and nothing written; what has arrived serves the next run."""
    out, last, get = tmp_path / "out", shards(base)[-1], file_download.http_get

    def full_disk(url: str, *arguments: Any, **options: Any) -> None:
        if url.endswith(last):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        get(url, *arguments, **options)

    hub = Hub(model_files(base), **dict.fromkeys(fault, last))  # type: ignore[arg-type]
    with online(hub, tmp_path), monkeypatch.context() as patch:
        if not fault:
            patch.setattr(file_download, "http_get", full_disk)
        assert_refused(harden("factors", out), problem)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
        missing = [name for name in shards(base) if not list((tmp_path / "cache").rglob(name))]
        assert last in missing
    hub.denied = hub.broken = ""
    with online(hub, tmp_path):
        hub.seen.clear()
        assert harden("factors", out).code == 0
        assert sorted(name for name in hub.downloaded() if name.endswith(".safetensors")) == missing
    assert_as_from_a_directory("factors", out, base, tmp_path / "other")


def test_interrupted_while_a_shard_is_downloaded(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends it in the midst of a file, which huggingface_hub would finish first."""
    last = shards(base)[-1]
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)

    def interrupt() -> None:
        assert eventually(lambda: last in hub.downloaded())
        os.kill(os.getpid(), signal.SIGINT)

    with online(Hub(model_files(base), seconds=60.0), tmp_path) as hub:
        before = set(threading.enumerate())
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            resolve("org/name")
        ours = [thread for thread in set(threading.enumerate()) - before if "process_request" not in thread.name]
        assert ours
        began = time.monotonic()
        for thread in ours:
            thread.join(60)
        assert time.monotonic() - began < 20
    assert last not in {path.name for path in (tmp_path / "cache").rglob("*.safetensors")}


def test_a_model_larger_than_the_disk(base: Path, tmp_path: Path) -> None:
    """Refused by every command before any file is asked for."""
    hub = Hub(model_files(base), sizes={shards(base)[0]: 10**18})
    with online(hub, tmp_path):
        for arguments in (
            ("inspect", "org/name"),
            ("harden", "org/name", "--out", tmp_path / "out"),
            ("collapse", "org/name", "--out", tmp_path / "out"),
        ):
            assert_refused(call_cli(*arguments), "org/name", "000000000.0 GB and", str(tmp_path), "HF_HOME")
    assert hub.downloaded() == []
    assert not list(tmp_path.rglob("blobs"))
    assert not list(tmp_path.glob(".out*"))


def free(nbytes: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every disk hold so much more."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(nbytes)))


def weights_of(base: Path) -> int:
    return sum((base / name).stat().st_size for name in shards(base))


def test_what_is_in_the_cache_needs_no_space(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with online(Hub(model_files(base)), tmp_path):
        snapshot_download("org/name", cache_dir=tmp_path / "cache")
        free(0, monkeypatch)
        succeed("inspect", "org/name")
        # The same contents under another commit: links, and no bytes.
        succeed("inspect", "org/name@v1")


def test_a_disk_that_cannot_hold_both(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the download and room for the output, but not for the two: refused before a shard is downloaded."""
    with online(Hub(model_files(base)), tmp_path) as hub:
        free(1.7 * weights_of(base), monkeypatch)
        assert_refused(
            harden("fold", tmp_path / "out"), f"org/name and the output {tmp_path / 'out'} need", "HF_HOME", "--out"
        )
        assert not any(name.endswith(".safetensors") for name in hub.downloaded())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
        free(2.3 * weights_of(base), monkeypatch)
        assert harden("fold", tmp_path / "out").code == 0


def test_two_disks_are_not_added(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system here")
    free(1.7 * weights_of(base), monkeypatch)
    with online(Hub(model_files(base)), tmp_path):
        resolve("org/name", output=other / "out")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["factors", "fold"])
def test_two_processes_download_each_shard_once(method: str, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving(Hub(model_files(base), seconds=1.0)) as hub:
        changes = {**variables(hub, tmp_path), "HF_HUB_DISABLE_XET": "1"}
        result = run_two_processes("harden", "org/name", "--out", out, *OPTIONS[method], home=tmp_path, **changes)
    assert result.code == 0, result.stderr[-3000:]
    assert result.stdout.count("parameters added") == 1
    sent = [path for verb, path, _ in hub.seen if verb == "GET" and path.endswith(".safetensors")]
    assert sorted(path.rsplit("/", 1)[-1] for path in sent) == shards(base)
    assert_as_from_a_directory(method, out, base, tmp_path / "other")


@pytest.mark.slow
def test_a_refusal_ends_both_processes(base: Path, tmp_path: Path) -> None:
    options = ("--method", "factors", "--top-k", "33")
    result = run_two_processes("harden", base, "--out", tmp_path / "out", *options, home=tmp_path)
    assert result.code != 0
    assert "top-k 33 is more than the rank" in result.stderr
    assert not (tmp_path / "out").exists()
