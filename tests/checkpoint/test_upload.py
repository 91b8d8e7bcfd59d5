"""Uploads, to a server on this machine that speaks the Hub's language."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specdef_cli.checkpoint.upload import Destination, push, upload_hint
from specdef_cli.hardening.card import has_section
from tests.commands import Result, assert_refused, call_cli, succeed
from tests.hub_server import Hub, here, online, serving

TOKEN = "hf_" + "s3cretS3cret" * 3


def harden_and_push(hub: Hub, llama: Path, root: Path, *more: str) -> Result:
    """``specdef harden --push-to-hub``; the token is in nothing that it says."""
    options = ("--method", "factors", "--top-k", "4", "--no-verify", "--token", TOKEN, "--push-to-hub", "org/out")
    with here(hub, root):
        result = call_cli("harden", llama, "--out", root / "out", *options, *more)
    assert "Traceback" not in result.stderr, result.stderr
    assert TOKEN not in result.stdout + result.stderr
    return result


def published(root: Path) -> dict[str, bytes]:
    """The files of the directory."""
    return {path.name: path.read_bytes() for path in (root / "out").iterdir()}


def test_harden_publishes_and_pushes(llama: Path, tmp_path: Path) -> None:
    with serving(Hub({})) as hub:
        result = harden_and_push(hub, llama, tmp_path, "--private", "--push-revision", "hardened")
    assert result.code == 0, result.stderr
    assert f"uploaded: {hub.address}/org/out" in result.stderr
    assert hub.pushed == published(tmp_path)
    assert str(llama).encode() not in b"".join(data for name, data in hub.pushed.items() if name != "README.md")
    assert hub.created[0]["visibility"] == "private"
    assert hub.created[1:] == [{"branch": "hardened"}]
    assert any(path == "/api/models/org/out/commit/hardened" for _, path, _ in hub.seen)
    uploads = [authorization for method, path, authorization in hub.seen if method == "POST" and "yaml" not in path]
    assert set(uploads) == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    ("account", "words"),
    [
        ({"name": "someone", "orgs": []}, ("someone does not belong to org", "someone/out", "--create-pr")),
        (
            {"name": "someone", "orgs": [{"name": "org"}], "auth": {"accessToken": {"role": "read"}}},
            ("someone's token only reads", "hf auth login"),
        ),
    ],
    ids=["another's namespace", "a token that reads"],
)
def test_what_cannot_be_uploaded(account: dict[str, Any], words: tuple[str, ...], llama: Path, tmp_path: Path) -> None:
    with serving(Hub({}, account=account)) as hub:
        result = harden_and_push(hub, llama, tmp_path)
    assert_refused(result, "org/out cannot be uploaded", *words)
    assert not (tmp_path / "out").exists()
    assert hub.created == []


def test_nobody_is_logged_in(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving(Hub({})) as hub:
        with here(hub, tmp_path):
            result = call_cli("harden", llama, "--push-to-hub", "org/out")
        assert_refused(result, "nobody is logged in", "hf auth login")
    with here(hub, tmp_path):
        result = call_cli("harden", llama, "--push-to-hub", "org/out", "--token", TOKEN)
    assert_refused(result, "org/out cannot be uploaded", "Check the connection")  # nobody listens there any more
    assert not (tmp_path / "hardened").exists()


def test_a_push_that_the_hub_refuses_leaves_the_directory(llama: Path, tmp_path: Path) -> None:
    with serving(Hub({}, push_status=403)) as hub:
        result = harden_and_push(hub, llama, tmp_path)
    assert result.code == 1
    error, hint = result.stderr.rstrip().splitlines()[-2:]
    assert error.startswith("error: org/out could not be uploaded")
    assert "403" in error
    assert hint.startswith("hint: ")
    assert f"{tmp_path / 'out'} stays as it is" in hint
    assert "specdef push" in hint
    assert hub.pushed == {}
    assert "specdef.json" in published(tmp_path)


def test_push_uploads_a_directory_later_with_or_without_the_manifest(llama: Path, tmp_path: Path) -> None:
    succeed("harden", llama, "--out", tmp_path / "out", "--no-verify", "--quiet")
    arguments = ("push", tmp_path / "out", "org/out", "--token", TOKEN)
    with online(Hub({}), tmp_path) as hub:
        whole = call_cli(*arguments, "--json")
    assert whole.code == 0, whole.stderr
    assert json.loads(whole.stdout)["address"].startswith(f"{hub.address}/org/out")
    assert "specdef collapse org/out" in whole.stderr
    assert hub.pushed == published(tmp_path)
    with online(Hub({}), tmp_path):
        branched = call_cli(*arguments, "--revision", "v1")
    assert "specdef collapse org/out@v1" in branched.stderr
    with online(Hub({}), tmp_path) as hub:
        proposed = call_cli(*arguments, "--no-manifest", "--create-pr")
    assert proposed.code == 0, proposed.stderr
    assert f"{hub.address}/org/out/discussions/1" in proposed.stdout
    assert "specdef.json was not uploaded: keep it" in proposed.stderr
    assert hub.pushed == {name: data for name, data in published(tmp_path).items() if name != "specdef.json"}

    (tmp_path / "out/model.safetensors").unlink()
    with online(Hub({}), tmp_path) as hub:
        assert_refused(call_cli(*arguments), "safetensors")
    assert hub.created == []


def test_a_push_leaves_only_the_directory_s_weights(llama: Path, tmp_path: Path) -> None:
    kept = {"notes.md": b"mine", "images/a.png": b"x", "training_args.bin": b"x", ".gitattributes": b"x"}
    stale = {"pytorch_model.bin": b"x", "onnx/model.onnx": b"x", "original/consolidated.safetensors": b"x"}
    options = ("--no-verify", "--quiet", "--max-shard-size", "50KB")
    succeed("harden", llama, "--out", tmp_path / "out", *options)
    destination = Destination("org/out", token=TOKEN)
    with online(Hub({}, pushed={**kept, **stale, "certificate.json": b"{}"}), tmp_path) as hub:
        assert set(push(llama, destination).removed) == {*stale, "certificate.json"}
        assert set(hub.pushed) == {*kept, *(path.name for path in llama.iterdir())}
        hub.pushed["configuration_specdef.py"] = b"of another construction"
        assert set(push(tmp_path / "out", destination).removed) == {"model.safetensors", "configuration_specdef.py"}
        assert {**kept, **published(tmp_path)} == hub.pushed
        assert push(tmp_path / "out", destination, without=[Path("specdef.json")]).removed == ("specdef.json",)
        assert {**kept, **published(tmp_path)} == {**hub.pushed, "specdef.json": published(tmp_path)["specdef.json"]}
    assert len(hub.commits) == 3


@pytest.mark.parametrize("method", ["fold", "scale"])
def test_weights_of_the_base_in_the_directory_are_not_uploaded(llama: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out"
    succeed("harden", llama, "--method", method, "--out", out, "--no-verify", "--quiet")
    expected = published(tmp_path)
    (out / "base").mkdir()
    shutil.copy(llama / "model.safetensors", out / "base")
    shutil.copy(llama / "model.safetensors", out / "pytorch_model.bin")
    (out / ".env").write_text("HF_TOKEN=secret")
    with online(Hub({}), tmp_path) as hub:
        result = call_cli("push", out, "org/out", "--token", TOKEN)
    assert result.code == 0, result.stderr
    assert "Not uploaded: .env (hidden); base/model.safetensors (weights of the model" in result.stderr
    assert hub.pushed == expected


def test_what_is_not_hardened_is_uploaded_with_a_yes_only(llama: Path) -> None:
    assert_refused(call_cli("push", llama, "org/out", "--token", TOKEN), f"{llama} is not hardened", "--yes")
    asked = call_cli("push", llama, "org/out", "--token", TOKEN, "--yes")  # tests are offline
    assert_refused(asked, "org/out cannot be uploaded", "HF_HUB_OFFLINE")


def test_a_directory_whose_manifest_is_elsewhere_is_hardened(llama: Path, tmp_path: Path) -> None:
    succeed("harden", llama, "--out", tmp_path / "o", "--no-verify", "--manifest-out", tmp_path / "m")
    assert has_section(tmp_path / "o")
    assert not has_section(llama)


@pytest.mark.parametrize(
    ("status", "word"),
    [(None, "connection"), (401, "Log in"), (403, "Log in"), (412, "try again"), (413, "--max-shard-size"),
     (429, "in some minutes"), (503, "later"), (400, "what the Hub said")],
)  # fmt: skip
def test_what_to_do_about_an_upload_that_failed(status: int | None, word: str) -> None:
    error = OSError("no")
    if status is not None:
        error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    hint = upload_hint(error)
    assert word in hint
    assert ("Log in" in hint) == (status in (401, 403))


def test_a_pull_request_against_a_branch_is_refused(llama: Path) -> None:
    refused = call_cli("push", llama, "org/out", "--yes", "--create-pr", "--revision", "v1", "--token", TOKEN)
    assert_refused(refused, "against v1", "--create-pr", code=2)
