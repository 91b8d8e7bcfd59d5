"""From a Hub id to a directory: out of a cache, and from a server on this machine that speaks the Hub's language."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from commands import Result, assert_refused, environment, run_cli

from specdef_cli.checkpoint.resolve import resolve
from specdef_cli.errors import SpecDefError

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
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


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(SpecDefError, match="is a file"):
        resolve(str(tmp_path / "model.safetensors"))


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


def test_harden_from_the_cache_records_the_commit(llama: Path, tmp_path: Path) -> None:
    fill_cache(tmp_path / "cache", llama)
    out = tmp_path / "out"
    result = run_cli(
        *("harden", "org/name@v1", "--out", out, "--method", "insert", "--top-k", "4", "--json", "--token", TOKEN),
        HF_HUB_CACHE=str(tmp_path / "cache"),
        HF_HOME=str(tmp_path / "home"),
    )
    assert result.code == 0, result.stderr
    manifest = json.loads((out / "specdef.json").read_text())
    assert manifest["base"] == {"name": "org/name", "revision": "v1", "commit": COMMITS["v1"]}
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


@dataclass
class Hub:
    """A stand-in for the Hub: one repository, ``org/name``, with the files of a directory.

    Attributes:
        files: Name → content.
        api_status, file_status: What to answer instead of 200, for the repository's metadata and for its files.
        error_code: The Hub's ``X-Error-Code`` that goes with it.
        broken: The name of a file whose connection breaks half way.
        push_status: What to answer to an upload instead of 200.
        pushed: Name → content of what was uploaded to ``org/out``.
        seen: Method, path and Authorization header of every request.
        address: Where it listens.
    """

    files: dict[str, bytes]
    api_status: int = 200
    file_status: int = 200
    error_code: str = ""
    broken: str = ""
    push_status: int = 200
    pushed: dict[str, bytes] = field(default_factory=dict)
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    address: str = ""

    def downloaded(self) -> list[str]:
        return [path.rsplit("/", 1)[-1] for method, path, _ in self.seen if method == "GET" and "/resolve/" in path]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            hub.seen.append((self.command, path, self.headers.get("Authorization", "")))
            if path.startswith("/api/models/org/out"):
                return self.answer(200, json.dumps({"id": "org/out", "sha": "d" * 40, "siblings": []}).encode())
            if path.startswith("/api/models/org/name/revision/"):
                ref = path.rsplit("/", 1)[-1]
                commit = COMMITS.get(ref, ref)
                if commit not in COMMITS.values():
                    return self.answer(404, code="RevisionNotFound")
                siblings = [{"rfilename": name} for name in hub.files]
                return self.answer(
                    hub.api_status, json.dumps({"id": "org/name", "sha": commit, "siblings": siblings}).encode()
                )
            if path.startswith("/api/models/org/name/tree/"):
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in hub.files.items()
                ]
                return self.answer(hub.api_status, json.dumps(tree).encode())
            _, _, commit, name = [*path.rsplit("/", 3), "", "", ""][:4]
            if path.startswith("/org/name/resolve/") and name in hub.files:
                data = hub.files[name]
                headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}
                return self.answer(hub.file_status, data, headers, cut=name == hub.broken)
            return self.answer(404, code="RepoNotFound")

        def do_POST(self) -> None:
            path = urlsplit(self.path).path
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            hub.seen.append((self.command, path, self.headers.get("Authorization", "")))
            reply: dict[str, object] = {"warnings": [], "errors": []}  # of /api/validate-yaml
            if path == "/api/repos/create":
                reply = {"url": f"{hub.address}/org/out"}
            elif path == "/api/models/org/out/preupload/main":
                files = [file["path"] for file in json.loads(body)["files"]]
                regular = {"uploadMode": "regular", "shouldIgnore": False}
                reply = {"files": [{"path": name, **regular} for name in files]}
            elif path == "/api/models/org/out/commit/main":
                for entry in map(json.loads, body.splitlines()):
                    if entry["key"] == "file":
                        hub.pushed[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                reply = {"commitUrl": f"{hub.address}/org/out/commit/{'c' * 40}", "commitOid": "c" * 40}
            status = hub.push_status if "/org/out/" in path else 200
            return self.answer(status, json.dumps(reply).encode())

        def answer(
            self,
            status: int,
            data: bytes = b"",
            headers: dict[str, str] | None = None,
            code: str = "",
            cut: bool = False,
        ) -> None:
            self.send_response(status)
            if status >= 400:
                data = b""
                if code or hub.error_code:
                    self.send_header("X-Error-Code", code or hub.error_code)
                self.send_header("X-Error-Message", "Access is restricted.")
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if cut else data)
            self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def online(tmp_path: Path) -> Callable[[Hub], dict[str, str]]:
    """The environment in which ``hub`` is the Hub and the cache is empty."""

    def variables(hub: Hub) -> dict[str, str]:
        return {
            "HF_ENDPOINT": hub.address,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }

    return variables


Online = Callable[[Hub], dict[str, str]]


def model_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_harden_from_the_hub(llama: Path, tmp_path: Path, online: Online) -> None:
    files = model_files(llama) | {"pytorch_model.bin": b"a pickle", "model.onnx": b"x", "weights.pt": b"a pickle"}
    with serving(Hub(files)) as hub:
        result = run_cli(
            *("harden", "org/name", "--out", tmp_path / "out", "--method", "insert", "--top-k", "4"),
            **online(hub),
            HF_TOKEN=TOKEN,
        )
        assert result.code == 0, result.stderr
        assert not {"pytorch_model.bin", "model.onnx", "weights.pt"} & set(hub.downloaded())
        assert "model.safetensors" in hub.downloaded()
        assert any(authorization == f"Bearer {TOKEN}" for _, _, authorization in hub.seen)
        manifest = json.loads((tmp_path / "out" / "specdef.json").read_text())
        assert manifest["base"] == {"name": "org/name", "revision": "main", "commit": COMMITS["main"]}
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


def test_no_server_at_all(tmp_path: Path, online: Online) -> None:
    with serving(Hub({})) as hub:
        pass  # so that nobody listens there any more
    result = run_cli("inspect", "org/name", **online(hub))
    assert_refused(result, "org/name is not in the local cache and the Hub cannot be reached")


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


# --- to a server -----------------------------------------------------------------------------------------------------


def push(llama: Path, out: Path, **changes: str) -> Result:
    options = ("--method", "insert", "--top-k", "4", "--no-verify", "--token", TOKEN, "--push-to-hub", "org/out")
    result = run_cli("harden", llama, "--out", out, *options, **changes)
    assert "Traceback" not in result.stderr, result.stderr
    assert TOKEN not in result.stdout + result.stderr
    assert (out / "specdef.json").is_file()  # published here, whatever the Hub says
    return result


def test_what_is_published_is_pushed(llama: Path, tmp_path: Path, online: Online) -> None:
    with serving(Hub({})) as hub:
        result = push(llama, tmp_path / "out", **online(hub))
    assert result.code == 0, result.stderr
    assert "org/out" in result.stderr
    assert hub.pushed == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    uploads = [authorization for method, path, authorization in hub.seen if method == "POST" and "yaml" not in path]
    assert set(uploads) == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize(("status", "words"), [(403, "403"), (0, "org/out could not be uploaded")])
def test_a_push_that_is_refused(status: int, words: str, llama: Path, tmp_path: Path, online: Online) -> None:
    """The directory stays, and the hint says so. Status 0: nobody listens there any more."""
    with serving(Hub({}, push_status=status)) as hub:
        if status:
            result = push(llama, tmp_path / "out", **online(hub))
    if not status:
        result = push(llama, tmp_path / "out", **online(hub))
    assert result.code == 1
    error, hint = result.stderr.rstrip().splitlines()[-2:]
    assert error.startswith("error: org/out could not be uploaded")
    assert words in error
    assert hint.startswith("hint: ")
    assert "HF_TOKEN" in hint
    assert f"{tmp_path / 'out'} is complete" in hint
    assert hub.pushed == {}
