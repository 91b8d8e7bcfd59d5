"""From a Hub id to a directory: out of a cache, and from a server on this machine that speaks the Hub's language."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from specdef_cli.checkpoint.resolve import resolve
from specdef_cli.errors import SpecDefError
from tests.commands import call_cli, environment, run_cli
from tests.hub_server import COMMITS, Hub, model_files, serving, variables

TOKEN = "hf_" + "s3cretS3cret" * 3

RESOLVE = """
import json, sys
from specdef_cli.checkpoint.resolve import resolve
from specdef_cli.errors import SpecDefError
try:
    found = resolve(sys.argv[1], revision=sys.argv[2] or None, token=sys.argv[3] or None)
    print(json.dumps([str(found.directory), found.name, found.revision, found.commit]))
except SpecDefError as error:
    print(f"error: {error.problem}", file=sys.stderr)
    print(f"hint: {error.hint}", file=sys.stderr)
    sys.exit(1)
"""


@dataclass(frozen=True)
class Found:
    """What :func:`resolve` returned in a process of its own."""

    directory: Path
    name: str
    revision: str
    commit: str


def resolve_apart(model: str, revision: str = "", token: str = "", **changes: str) -> Found | str:
    """``resolve`` in a fresh process (huggingface_hub reads the environment once): what it found, or stderr."""
    process = subprocess.run(
        [sys.executable, "-c", RESOLVE, model, revision, token],
        env=environment(HF_HUB_DISABLE_XET="1", HF_HUB_DOWNLOAD_TIMEOUT="2", HF_HUB_ETAG_TIMEOUT="2", **changes),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in process.stderr, process.stderr
    assert TOKEN not in process.stdout + process.stderr
    if process.returncode:
        lines = process.stderr.rstrip().splitlines()[-2:]
        assert [line.split(":")[0] for line in lines] == ["error", "hint"], process.stderr
        return "\n".join(lines)
    directory, *rest = json.loads(process.stdout)
    return Found(Path(directory), *rest)


def fill_cache(cache: Path, model: Path, repository: str = "org/name") -> dict[str, Path]:
    """The Hub's cache with ``model`` at two commits: ``main`` and, with a file more, ``v1``."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshots = {}
    for ref, commit in COMMITS.items():
        snapshot = root / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (root / "blobs").mkdir(exist_ok=True)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / ref).write_text(commit)
        files = {file.name: file.read_bytes() for file in model.iterdir() if file.is_file()}
        for name, data in (files | {"which.txt": ref.encode()}).items():
            blob = root / "blobs" / hashlib.sha256(data).hexdigest()
            blob.write_bytes(data)
            (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
        snapshots[ref] = snapshot
    return snapshots


def base_at(ref: str) -> dict[str, str | None]:
    """What a manifest says of ``org/name`` as its base."""
    return {"name": "org/name", "revision": ref, "commit": COMMITS[ref], "hub_id": None, "subfolder": None}


# --- what is typed ---------------------------------------------------------------------------------------------------


def test_a_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    for typed in (str(tmp_path / "model"), "model", "./model"):
        found = resolve(typed)
        assert found.directory.resolve() == tmp_path / "model"
        assert (found.name, found.revision, found.commit) == (typed, None, None)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model").directory == tmp_path / "model"


@pytest.mark.parametrize(
    "typed", ["./nothing", "/no/such/place", "../x", "~/nothing", "a/b/c", "org/na me", "", "org/", "@main", "a\0b"]
)
def test_what_is_neither_a_directory_nor_a_hub_id(typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SpecDefError) as raised:
        resolve(typed)
    assert "neither a directory nor a Hub id" in raised.value.problem


@pytest.mark.parametrize(
    "typed", ["https://huggingface.co/org/name", "https://hf.co/org/name/tree/v1", "hf://org/name"]
)
def test_an_address_is_answered_with_the_hub_id_in_it(typed: str) -> None:
    with pytest.raises(SpecDefError) as raised:
        resolve(typed)
    assert raised.value.hint == "Give org/name."


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(SpecDefError, match="is a file"):
        resolve(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.Q4_K_M.gguf", ("llama.cpp", "gguf_file='model.Q4_K_M.gguf'")),
        ("pytorch_model.bin", ("pickled", "save_pretrained")),
        ("tf_model.h5", ("TensorFlow", "from_tf=True")),
    ],
)
@pytest.mark.parametrize("beside", [{}, {"README.md": b"x", "config.json": b"{}"}], ids=["alone", "with a config"])
def test_a_repository_of_another_format_names_it(
    name: str, words: tuple[str, ...], beside: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with serving(Hub({name: b"x" * 9, **beside})) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        with pytest.raises(SpecDefError) as raised:
            resolve("org/name")
    assert raised.value.problem.startswith("org/name has only ")
    for word in (*words, name, "'org/name'"):
        assert word in str(raised.value)
    assert hub.downloaded() == []
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SpecDefError) as of_a_file:
        resolve(str(tmp_path / name))
    assert of_a_file.value.hint == raised.value.hint.replace("org/name", str(tmp_path))


def test_two_revisions_are_refused() -> None:
    with pytest.raises(SpecDefError, match="two revisions are named: v1 and v2"):
        resolve("org/name@v1", revision="v2")


# --- out of the cache ------------------------------------------------------------------------------------------------


def test_the_cache_serves_offline_and_pins_revisions(llama: Path, tmp_path: Path) -> None:
    snapshots = fill_cache(tmp_path, llama)
    for model, revision, ref in (
        ("org/name", "", "main"),
        ("org/name@v1", "", "v1"),
        ("org/name", "v1", "v1"),
        ("org/name@v1", "v1", "v1"),
    ):
        found = resolve_apart(model, revision, HF_HUB_CACHE=str(tmp_path))
        assert found == Found(snapshots[ref], "org/name", ref, COMMITS[ref])
    pinned = resolve_apart("org/name", COMMITS["v1"], HF_HUB_CACHE=str(tmp_path))
    assert pinned == Found(snapshots["v1"], "org/name", COMMITS["v1"], COMMITS["v1"])


def test_what_is_not_in_the_cache_is_refused_offline(tmp_path: Path) -> None:
    said = resolve_apart("org/other", HF_HUB_CACHE=str(tmp_path))
    assert isinstance(said, str)
    assert "org/other" in said
    assert "HF_HUB_OFFLINE" in said


def test_harden_from_the_cache_records_the_commit(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_cache(tmp_path / "cache", llama)
    out = tmp_path / "out"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    result = call_cli(
        *("harden", "org/name@v1", "--out", out, "--method", "factors", "--top-k", "4", "--json", "--token", TOKEN)
    )
    assert result.code == 0, result.stderr
    manifest = json.loads((out / "specdef.json").read_text())
    assert manifest["base"] == base_at("v1")
    assert json.loads(result.stdout)["manifest"]["base"] == manifest["base"]
    assert (out / "which.txt").read_text() == "v1"
    assert not (out / "which.txt").is_symlink()
    card = (out / "README.md").read_text()
    assert "base_model: org/name" in card
    assert COMMITS["v1"] in card
    written = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert TOKEN.encode() not in written
    assert TOKEN not in result.stdout + result.stderr


# --- from a server ---------------------------------------------------------------------------------------------------


@pytest.fixture
def online(tmp_path: Path) -> Callable[[Hub], dict[str, Any]]:
    """The environment in which ``hub`` is the Hub and the cache is empty."""
    return lambda hub: variables(hub, tmp_path)


Online = Callable[[Hub], dict[str, Any]]


def test_harden_from_the_hub(llama: Path, tmp_path: Path, online: Online) -> None:
    files = model_files(llama) | {"pytorch_model.bin": b"a pickle", "model.onnx": b"x", "weights.pt": b"a pickle"}
    with serving(Hub(files)) as hub:
        result = run_cli(
            *("harden", "org/name", "--out", tmp_path / "out", "--method", "factors", "--top-k", "4"),
            **online(hub),
            HF_TOKEN=TOKEN,
        )
        assert result.code == 0, result.stderr
        assert not {"pytorch_model.bin", "model.onnx", "weights.pt"} & set(hub.downloaded())
        assert "model.safetensors" in hub.downloaded()
        assert any(authorization == f"Bearer {TOKEN}" for _, _, authorization in hub.seen)
        manifest = json.loads((tmp_path / "out" / "specdef.json").read_text())
        assert manifest["base"] == base_at("main")
        written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
        assert TOKEN.encode() not in written
        assert TOKEN not in result.stdout + result.stderr

        # A second time, nothing is downloaded again; and another revision is another commit.
        count = len(hub.downloaded())
        found = resolve_apart("org/name", **online(hub))
        assert isinstance(found, Found)
        assert found.commit == COMMITS["main"]
        assert len(hub.downloaded()) == count
        other = resolve_apart("org/name@v1", **online(hub))
        assert isinstance(other, Found)
        assert (other.revision, other.commit) == ("v1", COMMITS["v1"])


@pytest.mark.parametrize(
    ("hub", "words"),
    [
        (Hub({}, file_status=403, error_code="GatedRepo"), ("org/name is gated", "Ask for access", "HF_TOKEN")),
        (Hub({}, file_status=401, error_code="GatedRepo"), ("org/name is gated", "Ask for access", "HF_TOKEN")),
        (Hub({}, api_status=403, error_code="GatedRepo"), ("org/name is gated", "Ask for access", "HF_TOKEN")),
        (Hub({}, api_status=403), ("org/name is gated", "HF_TOKEN")),
        (Hub({}, api_status=401), ("org/name is neither", "spelling", "HF_TOKEN")),
        (Hub({}, api_status=404, error_code="RepoNotFound"), ("org/name is neither", "spelling", "HF_TOKEN")),
        (Hub({}, api_status=500), ("org/name could not be fetched", "500", "Try again")),
    ],
    ids=["files-403", "files-401", "api-403-gated", "api-403", "api-401", "api-404", "api-500"],
)
def test_what_the_hub_denies_is_one_line_and_a_hint(
    hub: Hub, words: tuple[str, ...], llama: Path, online: Online
) -> None:
    hub.files = model_files(llama)
    with serving(hub):
        said = resolve_apart("org/name", token=TOKEN, **online(hub))
    assert isinstance(said, str)
    for word in words:
        assert word in said


def test_an_unknown_repository_and_an_unknown_revision(llama: Path, online: Online) -> None:
    with serving(Hub(model_files(llama))) as hub:
        said = resolve_apart("org/misspelt", **online(hub))
        assert isinstance(said, str)
        assert "org/misspelt" in said
        said = resolve_apart("org/name@v9", **online(hub))
        assert isinstance(said, str)
        assert "org/name has no revision v9" in said


def test_no_server_at_all(online: Online) -> None:
    with serving(Hub({})) as hub:
        pass  # so that nobody listens there any more
    said = resolve_apart("org/name", **online(hub))
    assert isinstance(said, str)
    assert "org/name is not in the local cache and the Hub cannot be reached" in said


def test_a_download_that_breaks_off(llama: Path, online: Online) -> None:
    with serving(Hub(model_files(llama), broken="model.safetensors")) as hub:
        said = resolve_apart("org/name", **online(hub))
        assert isinstance(said, str)
        assert "org/name could not be fetched" in said
        # The next attempt goes on from what is there.
        hub.broken = ""
        found = resolve_apart("org/name", **online(hub))
    assert isinstance(found, Found)
    assert (found.directory / "model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()
