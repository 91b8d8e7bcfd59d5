"""A manifest that is kept out of the published directory, and the commands that are told where it lies."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.commands import assert_refused, call_cli, snapshot, succeed
from tests.faults.small_attack import SMALL
from tests.hardening.mutations import edit_tensors
from tests.weights import assert_same_bytes, tensors


@pytest.fixture
def hardened(llama: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A hardened directory without its manifest, and the manifest."""
    out, manifest = tmp_path / "hardened", tmp_path / "keys" / "hardened.json"
    done = succeed("harden", llama, "--out", out, "--manifest-out", manifest)
    assert f"specdef collapse {out} --manifest {manifest}" in done.stderr
    return out, manifest


@pytest.mark.usefixtures("no_fresh_process")
def test_every_command_takes_it(llama: Path, text: Path, hardened: tuple[Path, Path], tmp_path: Path) -> None:
    out, manifest = hardened
    assert not (out / "specdef.json").exists()
    assert json.loads(manifest.read_text())["method"] == "fold"

    refused = call_cli("collapse", out, "--out", tmp_path / "plain")
    assert_refused(refused, f"{out} has no specdef.json", "--manifest")
    succeed("collapse", out, "--manifest", manifest, "--out", tmp_path / "plain", "--quiet")
    assert_same_bytes(tensors(tmp_path / "plain"), tensors(llama))

    without = json.loads(call_cli("inspect", out, "--json").stdout)
    told = json.loads(call_cli("inspect", out, "--manifest", manifest, "--json").stdout)
    assert without["manifest"] is None
    assert told["manifest"]["folded"] == json.loads(manifest.read_text())["folded"]

    # The base comes from the manifest, and the report is of these weights to certify too.
    succeed("attack", out, "--manifest", manifest, "--out", tmp_path / "attack", "--card", *SMALL)
    card = (out / "README.md").read_text()
    assert "### Attacks" in card
    other = shutil.copytree(llama, tmp_path / "other")
    edit_tensors(other, lambda t: t.update({name: 1.5 * tensor for name, tensor in t.items()}))
    where = ("--manifest", manifest, "--out", tmp_path / "against another", "--control", other)
    compared = call_cli("attack", out, *where, "--card", *SMALL)
    assert compared.code == 1
    assert "compares with other, which starts at another loss" in compared.stderr
    assert (out / "README.md").read_text() == card
    certified = succeed(
        "certify", out, "--manifest", manifest, "--attacks", tmp_path / "attack" / "report.json", "--text", text,
        "--formats", "none", "--no-curvature", "--out", tmp_path / "certificate", "--json",
    )  # fmt: skip
    claims = {claim["name"]: claim["holds"] for claim in json.loads(certified.stdout)["claims"]}
    assert True in claims.values(), claims
    assert False not in claims.values(), claims
    assert not (out / "specdef.json").exists()


def test_a_manifest_of_another_hardening_of_the_same_base_is_refused(llama: Path, tmp_path: Path) -> None:
    """The channel that stands out most is the same in both; what is left of the others shows."""
    out, kept = tmp_path / "hardened", tmp_path / "my keys"
    done = succeed("harden", llama, "--out", out, "--no-verify", "--manifest-out", kept / "own.json")
    assert f"collapse {out} --manifest '{kept / 'own.json'}'" in done.stderr
    succeed("harden", llama, "--out", tmp_path / "part", "--layers", "*.up_proj", "--exclude", "*.gate_proj",
            "--no-verify", "--manifest-out", kept / "other.json")  # fmt: skip
    before = snapshot(tmp_path)
    refused = call_cli("collapse", out, "--manifest", kept / "other.json", "--out", tmp_path / "plain")
    assert_refused(refused, "what that undoes leaves a fold", "specdef.json that belongs to these weights")
    assert snapshot(tmp_path) == before
    edit_tensors(out, lambda t: t["model.norm.weight"].mul_(1.001))  # as training does
    told = succeed("collapse", out, "--manifest", kept / "own.json", "--out", tmp_path / "plain")
    assert "model.safetensors is not the file that specdef.json was written of" in told.stderr


def test_places_that_are_refused_before_the_work(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "hardened"
    taken = tmp_path / "taken.json"
    taken.write_text("mine")
    before = snapshot(tmp_path)
    closed = tmp_path / "taken.json" / "below.json"
    for place, words in (
        (taken, "exists already"),
        (out / "specdef.json", "lies in the directory that is published"),
        (closed, "is not a directory that can be written to"),
    ):
        for more in ((), ("--dry-run",)):
            refused = call_cli("harden", llama, "--out", out, "--manifest-out", place, *more)
            assert_refused(refused, str(place), words)
    assert snapshot(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken.json"]


def test_manifests_that_are_refused(llama: Path, hardened: tuple[Path, Path], tmp_path: Path) -> None:
    out, manifest = hardened
    nowhere = tmp_path / "nowhere.json"
    arguments = ("collapse", out, "--out", tmp_path / "plain", "--manifest")
    assert_refused(call_cli(*arguments, nowhere), f"--manifest {nowhere} is not a file", "--manifest-out")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert_refused(call_cli(*arguments, broken), str(broken), "not a valid manifest")
    os.link(manifest, out / "specdef.json")  # the same one is no contradiction
    succeed(*arguments, manifest, "--quiet")
    other = tmp_path / "other.json"
    other.write_text(manifest.read_text())
    assert_refused(call_cli("inspect", out, "--manifest", other), "a specdef.json of its own", "Leave --manifest out")
    assert not (tmp_path / "plain" / "specdef.json").exists()


def test_a_place_that_fails_after_the_work_leaves_the_manifest_in_the_directory(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specdef_cli.hardening import run

    manifest = tmp_path / "keys.json"
    write = run.write_durably

    def fails(path: Path, text: str) -> None:
        if path == manifest:
            raise OSError(28, "No space left on device")
        write(path, text)

    monkeypatch.setattr(run, "write_durably", fails)
    out = tmp_path / "hardened"
    assert_refused(call_cli("harden", llama, "--out", out, "--manifest-out", manifest), str(manifest), "No space left")
    assert json.loads((out / "specdef.json").read_text())["method"] == "fold"
    assert not manifest.exists()
