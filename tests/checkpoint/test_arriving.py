"""``harden`` from the Hub begins with the first shard: what it waits for, what it does not, and how it ends early.

The Hub is a server on this machine. It withholds a shard until what must not wait for that shard has happened, so a
command that waits for too much never finishes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from specdef_cli.checkpoint import arriving as arriving_weights
from specdef_cli.checkpoint.output import check_output, work_directory
from specdef_cli.checkpoint.reader import open_checkpoint
from specdef_cli.checkpoint.stream import RECORD_SUFFIX
from specdef_cli.errors import SpecDefError
from tests.commands import TWO_PROCESSES, Result, assert_refused, call_cli, command, environment, snapshot
from tests.hub_server import COMMITS, Hub, eventually, model_files, serving, variables

Usage = namedtuple("Usage", "total used free")
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


@contextmanager
def online(hub: Hub, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Have huggingface_hub take ``hub`` for the Hub in this process, with its cache in ``directory``."""
    with serving(hub), monkeypatch.context() as patch:
        # It reads the environment when it is imported, and these whenever it needs them.
        patch.setattr(constants, "ENDPOINT", hub.address)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(directory / "cache"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield hub


def offline(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory / "cache"))


def harden(method: str, out: Path, *more: str, model: str | Path = "org/name") -> Result:
    return call_cli("harden", model, "--out", out, *OPTIONS[method], *more)


def finished(out: Path) -> list[str]:
    """Output shards that are finished, while nothing is published."""
    return [path.name.removesuffix(RECORD_SUFFIX) for path in work_directory(out).glob(f"*{RECORD_SUFFIX}")]


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
    assert manifest.pop("base") == {"name": "org/name", "revision": "main", "commit": COMMITS["main"], "hub_id": None}
    expected.pop("base")
    assert manifest == expected


@pytest.mark.parametrize("method", ["factors", "fold"])
def test_the_last_shard_is_not_waited_for(
    method: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is sent when an output shard is finished. The cache then serves offline."""
    out, last = tmp_path / "out", shards(base)[-1]
    hub = Hub(model_files(base), withheld={last: lambda: bool(finished(out))})
    with online(hub, tmp_path, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 90)
        result = harden(method, out)
    assert result.code == 0, result.stderr
    assert last in hub.parts
    assert sorted(name for name in hub.downloaded() if name.endswith(".safetensors")) == shards(base)
    assert_as_from_a_directory(method, out, base, tmp_path / "other")
    offline(tmp_path, monkeypatch)
    assert harden(method, tmp_path / "again").code == 0
    assert snapshot(tmp_path / "again") == snapshot(out)


def test_inspect_does_not_wait_either(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = shards(base)[-1]
    wanted: list[str] = []
    hub = Hub(model_files(base), withheld={last: lambda: len(wanted) > 2})
    original = arriving_weights.ArrivingWeights.wait

    def wait(self: arriving_weights.ArrivingWeights, name: str) -> None:
        original(self, name)
        wanted.append(name)

    monkeypatch.setattr(arriving_weights.ArrivingWeights, "wait", wait)
    with online(hub, tmp_path, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 90)
        result = call_cli("inspect", "org/name", "--json")
    assert result.code == 0, result.stderr
    assert json.loads(result.stdout)["layers"] == json.loads(call_cli("inspect", base, "--json").stdout)["layers"]


def test_a_server_that_sends_whole_files_only(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with online(Hub(model_files(base), ranges=False), tmp_path, monkeypatch) as hub:
        result = harden("fold", tmp_path / "out")
    assert result.code == 0, result.stderr
    assert hub.parts == []
    assert_as_from_a_directory("fold", tmp_path / "out", base, tmp_path / "other")


def test_a_cache_that_huggingface_hub_has_filled(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, it serves offline; with one shard gone, it does not, and that one alone is fetched."""
    last = shards(base)[-1]
    with online(Hub(model_files(base)), tmp_path, monkeypatch) as hub:
        directory = Path(snapshot_download("org/name", cache_dir=tmp_path / "cache"))
        hub.seen.clear()
        assert harden("factors", tmp_path / "a").code == 0
        assert hub.downloaded() == []
    with monkeypatch.context() as patch:
        offline(tmp_path, patch)
        assert harden("factors", tmp_path / "b").code == 0
        (directory / last).resolve().unlink()
        (directory / last).unlink()
        assert_refused(harden("factors", tmp_path / "c"), "org/name is not in the local cache")
    with online(hub, tmp_path, monkeypatch):
        hub.seen.clear()
        assert harden("factors", tmp_path / "d").code == 0
        assert hub.downloaded() == [last]
    for name in "abd":
        assert snapshot(tmp_path / name) == snapshot(tmp_path / "a")


# --- what ends it early ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["denied", "broken", "disk full"])
def test_a_shard_that_does_not_arrive(fault: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lines, nothing published, no thread left; what has arrived and what was finished serve the next run."""
    out, last = tmp_path / "out", shards(base)[-1]
    problem = {
        "denied": "org/name is gated",
        "broken": "org/name could not be fetched",
        "disk full": f"org/name could not be fetched: {os.strerror(errno.ENOSPC)}",
    }[fault]
    hub = Hub(model_files(base), withheld={last: lambda: bool(finished(out))})
    with online(hub, tmp_path, monkeypatch), monkeypatch.context() as patch:
        if fault == "disk full":
            patch.setattr(arriving_weights.Commit, "fetch", full_disk(last))
        else:
            setattr(hub, fault, last)
        assert_refused(harden("factors", out), problem, "--resume")
        assert not out.exists()
        assert eventually(lambda: not downloading())
        kept = finished(out)
        assert kept
        # The one before it may have been on its way beside it.
        missing = [name for name in shards(base) if not list((tmp_path / "cache").rglob(name))]
        assert last in missing
        assert len(missing) <= 2
    hub.withheld.clear()
    hub.denied = hub.broken = ""
    with online(hub, tmp_path, monkeypatch):
        hub.seen.clear()
        identities = {name: (work_directory(out) / name).stat().st_ino for name in kept}
        assert harden("factors", out, "--resume").code == 0
        assert sorted(hub.downloaded()) == missing
    assert {name: (out / name).stat().st_ino for name in kept} == identities
    assert_as_from_a_directory("factors", out, base, tmp_path / "other")


def full_disk(name: str) -> Callable[..., None]:
    fetch = arriving_weights.Commit.fetch

    def fetch_or_fail(self: arriving_weights.Commit, wanted: str, bar: type) -> None:
        fetch(self, wanted, bar)
        if wanted == name:
            pointer = self.directory / name
            pointer.resolve().unlink()
            pointer.unlink()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fetch_or_fail


def downloading() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "specdef-download"]


def test_a_shard_whose_header_was_another(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plan was made of is checked when the shard is there."""
    last = shards(base)[-1]
    read = arriving_weights.parse_headers

    def other(*arguments: object) -> object:
        headers = read(*arguments)  # type: ignore[arg-type]
        if arguments[1] != last:
            return headers
        return {name: replace(header, begin=header.begin + 4, end=header.end + 4) for name, header in headers.items()}

    monkeypatch.setattr(arriving_weights, "parse_headers", other)
    with online(Hub(model_files(base)), tmp_path, monkeypatch):
        assert_refused(harden("factors", tmp_path / "out"), f"{last} is not the file")


@pytest.mark.parametrize("spoil", [lambda data: data[:-8], lambda data: data[:8] + b"!" + data[9:]])
def test_a_damaged_shard_is_refused_before_any_is_downloaded(
    spoil: Callable[[bytes], bytes], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = shards(base)[-1]
    files = model_files(base)
    with online(Hub(files | {last: spoil(files[last])}), tmp_path, monkeypatch) as hub:
        assert_refused(harden("fold", tmp_path / "out"), f"{last} is not a valid safetensors file")
        assert not any(name.endswith(".safetensors") for name in hub.downloaded())


def test_interrupted_while_a_shard_is_awaited(base: Path, tmp_path: Path) -> None:
    """Ctrl-C ends it although the server sends nothing; what is finished is kept."""
    out, last = tmp_path / "out", shards(base)[-1]
    asked: list[bool] = []
    with serving(Hub(model_files(base), withheld={last: lambda: bool(asked)})) as hub:
        process = subprocess.Popen(
            command("harden", "org/name", "--out", out, *OPTIONS["factors"]),
            env=environment(**variables(hub, tmp_path), HF_HUB_DISABLE_XET="1"),
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background job ignores Ctrl-C, and so do its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            assert eventually(lambda: (last in hub.downloaded() and bool(finished(out))) or process.poll() is not None)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=300)
        finally:
            process.kill()
            asked.append(True)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "interrupted" in said
    assert not out.exists()
    assert finished(out)


# --- disks that are too small ----------------------------------------------------------------------------------------


def test_a_model_larger_than_the_disk(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by every command before any file is asked for."""
    hub = Hub(model_files(base), sizes={shards(base)[0]: 10**18})
    with online(hub, tmp_path, monkeypatch):
        for arguments in (
            ("inspect", "org/name"),
            ("harden", "org/name", "--out", tmp_path / "out"),
            ("collapse", "org/name", "--out", tmp_path / "out"),
        ):
            assert_refused(call_cli(*arguments), "org/name needs 1000000000.0 GB", str(tmp_path), "HF_HOME")
    assert hub.downloaded() == []
    assert hub.parts == []
    assert not list(tmp_path.rglob("blobs"))
    assert not list(tmp_path.glob(".out*"))


def test_what_is_in_the_cache_needs_no_space(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(model_files(base))
    with online(hub, tmp_path, monkeypatch):
        snapshot_download("org/name", cache_dir=tmp_path / "cache")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 0))
        assert call_cli("inspect", "org/name").code == 0
        # The same contents under another commit: links, and no bytes.
        assert call_cli("inspect", "org/name@v1").code == 0


def test_a_disk_that_cannot_hold_both(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the download and room for the output, but not for the two: refused before a shard is downloaded."""
    weights = sum((base / name).stat().st_size for name in shards(base))
    hub = Hub(model_files(base))
    with online(hub, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, int(1.7 * weights)))
        assert_refused(harden("fold", tmp_path / "out"), "the output and the download need", "HF_HOME", "--out")
        assert not any(name.endswith(".safetensors") for name in hub.downloaded())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, int(2.3 * weights)))
        assert harden("fold", tmp_path / "out").code == 0


def test_two_disks_are_not_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 0, 100))
    check_output(tmp_path / "out", tmp_path / "cache", 60, 0)
    (tmp_path / "cache").mkdir()
    with pytest.raises(SpecDefError, match="the output and the download"):
        check_output(tmp_path / "out", tmp_path / "cache", 60, 60)
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system here")
    check_output(tmp_path / "out", other, 60, 60)


def test_a_directory_knows_nothing_of_it(base: Path) -> None:
    assert open_checkpoint(base).arriving is None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["factors", "fold"])
def test_two_processes_download_each_shard_once(method: str, base: Path, tmp_path: Path) -> None:
    script = tmp_path / "specdef.py"
    script.write_text("from specdef_cli.cli.app import main\nmain()\n")
    out = tmp_path / "out"
    with serving(Hub(model_files(base), seconds=1.0)) as hub:
        process = subprocess.run(
            [*TWO_PROCESSES, str(script), "harden", "org/name", "--out", str(out), *OPTIONS[method]],
            env=environment(**variables(hub, tmp_path), HF_HUB_DISABLE_XET="1"),
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("adds") == 1
    sent = [path for verb, path, _ in hub.seen if verb == "GET" and path.endswith(".safetensors")]
    assert sorted(path.rsplit("/", 1)[-1] for path in sent) == shards(base)
    assert_as_from_a_directory(method, out, base, tmp_path / "other")
