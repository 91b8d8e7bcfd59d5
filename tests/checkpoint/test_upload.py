"""Uploads, to a server on this machine that speaks the Hub's language; every command is a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Result, assert_refused, run_cli
from tests.hub_server import Hub, serving, variables

TOKEN = "hf_" + "s3cretS3cret" * 3


def harden_and_push(hub: Hub, llama: Path, root: Path, *more: str) -> Result:
    """``specdef harden --push-to-hub``; the token is in nothing that it says."""
    options = ("--method", "factors", "--top-k", "4", "--no-verify", "--token", TOKEN, "--push-to-hub", "org/out")
    result = run_cli("harden", llama, "--out", root / "out", *options, *more, **variables(hub, root))
    assert "Traceback" not in result.stderr, result.stderr
    assert TOKEN not in result.stdout + result.stderr
    return result


def published(root: Path) -> dict[str, bytes]:
    """The files of the directory, and its manifest without the path of the base."""
    files = {path.name: path.read_bytes() for path in (root / "out").iterdir()}
    manifest = json.loads(files["specdef.json"])
    manifest["base"]["name"] = Path(manifest["base"]["name"]).name
    return {**files, "specdef.json": (json.dumps(manifest, indent=1) + "\n").encode()}


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
def test_what_cannot_be_uploaded_is_not_hardened(
    account: dict[str, Any], words: tuple[str, ...], llama: Path, tmp_path: Path
) -> None:
    with serving(Hub({}, account=account)) as hub:
        result = harden_and_push(hub, llama, tmp_path)
    assert_refused(result, "org/out cannot be uploaded", *words)
    assert not (tmp_path / "out").exists()
    assert hub.created == []


def test_nobody_is_logged_in(llama: Path, tmp_path: Path) -> None:
    with serving(Hub({})) as hub:
        result = run_cli("harden", llama, "--push-to-hub", "org/out", cwd=tmp_path, **variables(hub, tmp_path))
        assert_refused(result, "nobody is logged in", "hf auth login")
    result = run_cli(
        "harden", llama, "--push-to-hub", "org/out", "--token", TOKEN, cwd=tmp_path, **variables(hub, tmp_path)
    )
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
    assert f"{tmp_path / 'out'} is complete" in hint
    assert "specdef push" in hint
    assert hub.pushed == {}
    assert "specdef.json" in published(tmp_path)


def test_options_of_an_upload_without_an_upload_are_wrong_usage(llama: Path, tmp_path: Path) -> None:
    result = run_cli("harden", llama, "--out", tmp_path / "out", "--private")
    assert result.code == 2
    assert "--push-to-hub" in result.stderr


def test_push_uploads_a_directory_later_with_or_without_the_manifest(llama: Path, tmp_path: Path) -> None:
    hardened = run_cli("harden", llama, "--out", tmp_path / "out", "--no-verify", "--quiet")
    assert hardened.code == 0, hardened.stderr
    arguments = ("push", tmp_path / "out", "org/out", "--token", TOKEN)
    with serving(Hub({})) as hub:
        whole = run_cli(*arguments, "--json", **variables(hub, tmp_path))
    assert whole.code == 0, whole.stderr
    assert json.loads(whole.stdout)["address"].startswith(f"{hub.address}/org/out")
    assert "specdef collapse org/out" in whole.stderr
    assert hub.pushed == published(tmp_path)
    with serving(Hub({})) as hub:
        proposed = run_cli(*arguments, "--no-manifest", "--create-pr", **variables(hub, tmp_path))
    assert proposed.code == 0, proposed.stderr
    assert f"{hub.address}/org/out/discussions/1" in proposed.stdout
    assert "specdef.json stays here" in proposed.stderr
    assert hub.pushed == {name: data for name, data in published(tmp_path).items() if name != "specdef.json"}

    (tmp_path / "out/model.safetensors").unlink()
    with serving(Hub({})) as hub:
        assert_refused(run_cli(*arguments, **variables(hub, tmp_path)), "safetensors")
    assert hub.created == []
