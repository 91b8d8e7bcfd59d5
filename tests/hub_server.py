"""A server on this machine that speaks as much of the Hub's language as huggingface_hub asks for."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
PULL_REQUEST = {
    "title": "Upload hardened model",
    "num": 1,
    "createdAt": "2026-01-01T00:00:00.000Z",
    "status": "draft",
    "repo": {"name": "org/out", "type": "model"},
    "isPullRequest": True,
    "changes": {"base": "refs/heads/main"},
    "filesWithConflicts": [],
    "events": [],
}


@dataclass
class Hub:
    """A stand-in for the Hub: a repository to read, ``org/name``, and one to write, ``org/out``."""

    files: dict[str, bytes]  # name → content
    api_status: int = 200  # what to answer instead, for the repository's metadata
    file_status: int = 200  # and for its files
    error_code: str = ""  # the Hub's X-Error-Code that goes with it
    broken: str = ""  # the name of a file whose connection breaks half way
    denied: str = ""  # the name of a file that is never sent
    seconds: float = 0.0  # how long it takes to send a weight file
    sizes: dict[str, int] = field(default_factory=dict)  # name → what to say of its size, instead of the truth
    push_status: int = 200  # what to answer to an upload
    account: dict[str, object] = field(default_factory=lambda: {"name": "someone", "orgs": [{"name": "org"}]})
    created: list[dict[str, object]] = field(default_factory=list)  # what was asked of each repository and branch
    pushed: dict[str, bytes] = field(default_factory=dict)  # name → content of what is in org/out
    commits: list[list[str]] = field(default_factory=list)  # the names that each added or deleted
    seen: list[tuple[str, str, str]] = field(default_factory=list)  # method, path and Authorization of every request
    address: str = ""

    def downloaded(self) -> list[str]:
        """The names of the files that were asked for as a whole."""
        return [path.rsplit("/", 1)[-1] for method, path, _ in self.seen if method == "GET" and "/resolve/" in path]


@functools.cache
def sha1(data: bytes) -> str:
    """What stands for the contents in an ETag."""
    return hashlib.sha1(data).hexdigest()


def eventually(holds: Callable[[], bool]) -> bool:
    """Wait until ``holds()``, a minute at most."""
    for _ in range(1200):
        if holds():
            return True
        time.sleep(0.05)
    return False


def pieces(data: bytes, count: int) -> list[bytes]:
    """``data`` in so many pieces, more or less."""
    step = max(1, -(-len(data) // count))
    return [data[begin : begin + step] for begin in range(0, len(data), step)]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Answer for ``hub`` while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            hub.seen.append((self.command, path, self.headers.get("Authorization", "")))
            if path == "/api/whoami-v2":
                return self.answer(hub.api_status, json.dumps(hub.account).encode())
            if path == "/api/models/org/out/discussions/1":
                return self.answer(200, json.dumps(PULL_REQUEST).encode())
            if path.startswith("/api/models/org/out"):
                there = [{"rfilename": name} for name in hub.pushed]
                return self.answer(200, json.dumps({"id": "org/out", "sha": "d" * 40, "siblings": there}).encode())
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
                    {"type": "file", "path": name, "size": len(data), "oid": sha1(data)}
                    for name, data in hub.files.items()
                ]
                return self.answer(hub.api_status, json.dumps(tree).encode())
            commit, _, name = path.removeprefix("/org/name/resolve/").partition("/")
            if path.startswith("/org/name/resolve/") and name in hub.files:
                data = hub.files[name]
                headers = {"ETag": f'"{sha1(data)}"', "X-Repo-Commit": commit}
                if self.command == "HEAD":
                    return self.answer(hub.file_status, data, headers, size=hub.sizes.get(name))
                status = 403 if name == hub.denied else hub.file_status
                slowly = hub.seconds if name.endswith(".safetensors") else 0.0
                return self.answer(status, data, headers, cut=name == hub.broken, seconds=slowly)
            return self.answer(404, code="RepoNotFound")

        def do_POST(self) -> None:
            path = urlsplit(self.path).path
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            hub.seen.append((self.command, path, self.headers.get("Authorization", "")))
            reply: dict[str, object] = {"warnings": [], "errors": []}  # of /api/validate-yaml
            if path == "/api/repos/create":
                hub.created.append(json.loads(body))
                reply = {"url": f"{hub.address}/org/out"}
            elif path.startswith("/api/models/org/out/branch/"):
                hub.created.append({"branch": path.rsplit("/", 1)[-1]})
            elif path.startswith("/api/models/org/out/discussions"):
                reply = {"num": 1, "newStatus": {}}
            elif path.startswith("/api/models/org/out/preupload/"):
                files = [file["path"] for file in json.loads(body)["files"]]
                regular = {"uploadMode": "regular", "shouldIgnore": False}
                reply = {"files": [{"path": name, **regular} for name in files]}
            elif path.startswith("/api/models/org/out/commit/"):
                entries = [json.loads(line) for line in body.splitlines()] if hub.push_status == 200 else []
                for entry in entries:
                    if entry["key"] == "file":
                        hub.pushed[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                    elif entry["key"] == "deletedFile":
                        del hub.pushed[entry["value"]["path"]]
                hub.commits.append([entry["value"]["path"] for entry in entries if "path" in entry["value"]])
                reply = {"commitUrl": f"{hub.address}/org/out/commit/{'c' * 40}", "commitOid": "c" * 40}
                if "create_pr=1" in self.path:
                    reply["pullRequestUrl"] = f"{hub.address}/org/out/discussions/1"
            status = hub.push_status if "/org/out/" in path else 200
            return self.answer(status, json.dumps(reply).encode())

        def answer(
            self,
            status: int,
            data: bytes = b"",
            headers: dict[str, str] | None = None,
            code: str = "",
            cut: bool = False,
            size: int | None = None,
            seconds: float = 0.0,
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
            self.send_header("Content-Length", str(len(data) if size is None else size))
            self.end_headers()
            if self.command != "HEAD":
                for piece in pieces(data[: len(data) // 2] if cut else data, 10 if seconds else 1):
                    time.sleep(seconds / 10)
                    with suppress(BrokenPipeError, ConnectionResetError):  # the other side has given up
                        self.wfile.write(piece)
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


def variables(hub: Hub, directory: Path) -> dict[str, Any]:
    """The environment in which ``hub`` is the Hub and the cache lies, empty at first, in ``directory``."""
    return {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(directory / "home"),
        "HF_HUB_CACHE": str(directory / "cache"),
    }


@contextmanager
def here(hub: Hub, directory: Path) -> Iterator[None]:
    """The same for this process, whose huggingface_hub has read its environment already."""
    names: dict[str, Any] = {"ENDPOINT": hub.address, "HF_HUB_OFFLINE": False}
    names |= {"HF_HOME": str(directory / "home"), "HF_TOKEN_PATH": str(directory / "home" / "token")}
    names |= {"HF_HUB_CACHE": str(directory / "cache")}
    names |= {"HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"}
    with patch.multiple("huggingface_hub.constants", **names):
        yield


@contextmanager
def online(hub: Hub, directory: Path) -> Iterator[Hub]:
    """Have huggingface_hub take ``hub`` for the Hub in this process, with its cache in ``directory``."""
    with serving(hub), here(hub, directory):
        yield hub


def model_files(directory: Path) -> dict[str, bytes]:
    """The files of a checkpoint directory, by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
