"""Nothing that comes with a checkpoint is run, unpickled or shown as markup, and no token is written down."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest

from tests.commands import Result, assert_refused, call_cli
from tests.faults.small_attack import SMALL
from tests.hardening.mutations import config, content

TOKEN = "hf_" + "s3cretS3cret" * 3
PICKLES = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin", "state.ckpt", "data.pkl")


class Canary:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def every_command(base: Path, hardened: Path, text: Path, out: Path) -> dict[str, Result]:
    """All five commands on two directories."""
    insert = ("--method", "factors", "--top-k", "4", "--quiet")
    certify = ("--text", text, "--attacks", out / "attack" / "report.json", "--formats", "none", "--no-curvature")
    return {
        "harden": call_cli("harden", base, *insert, "--out", out / "hardened"),
        "inspect": call_cli("inspect", base, "--quiet"),
        "inspect hardened": call_cli("inspect", hardened, "--quiet"),
        "collapse": call_cli("collapse", hardened, "--out", out / "collapsed", "--quiet"),
        "attack": call_cli("attack", hardened, "--control", base, *SMALL, "--out", out / "attack"),
        "certify": call_cli("certify", hardened, "--base", base, *certify, "--no-card", "--out", out / "certificate"),
    }


def copied(model: Path, target: Path) -> Path:
    return Path(shutil.copytree(model, target))


def test_no_pickle_is_ever_loaded(llama: Path, hardened: Path, text: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    base, spoiled = copied(llama, tmp_path / "base"), copied(hardened, tmp_path / "spoiled")
    for name in PICKLES:
        for directory in (base, spoiled):
            (directory / name).write_bytes(pickle.dumps(Canary(canary)))
    for name, result in every_command(base, spoiled, text, tmp_path).items():
        assert result.code == 0, (name, result.stderr)
    assert not canary.exists()
    pickle.loads((base / "data.pkl").read_bytes()).close()
    assert canary.exists()  # so it would have been seen


def test_code_in_a_checkpoint_is_run_only_if_asked_for(llama: Path, hardened: Path, text: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    evil = f"open({str(canary)!r}, 'w').close()\nclass SpecDefConfig: pass\n"
    base = copied(llama, tmp_path / "base")
    # transformers knows Llama itself: the code is not needed, and not run.
    for mutate in (content("evil.py", evil), config(auto_map={"AutoConfig": "evil.SpecDefConfig"})):
        mutate(base)
    shim = copied(hardened, tmp_path / "shim")
    content("configuration_specdef.py", evil)(shim)
    results = every_command(base, shim, text, tmp_path)
    for name in ("harden", "inspect", "inspect hardened", "collapse", "attack"):
        assert results[name].code == 0, (name, results[name].stderr)
    assert_refused(results["certify"], "configuration_specdef.py", "--trust-remote-code")
    assert not canary.exists()
    elsewhere = copied(hardened, tmp_path / "elsewhere")
    config(auto_map={"AutoConfig": "evil.SpecDefConfig"})(elsewhere)
    content("evil.py", evil)(elsewhere)
    options = ("--base", llama, "--text", text, "--quiet", "--out", tmp_path / "no")
    assert_refused(call_cli("certify", elsewhere, *options, "--attacks", tmp_path / "attack" / "report.json"))
    assert not canary.exists()
    call_cli("inspect", base, "--trust-remote-code")
    assert canary.exists()  # so it would have been seen


@pytest.mark.usefixtures("no_fresh_process")
def test_no_token_is_written_down(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hardened, token = tmp_path / "hardened", ("--token", TOKEN)
    results = [
        call_cli("harden", llama, "--method", "factors", "--top-k", "4", *token, "--json", "--out", hardened),
        call_cli("attack", hardened, "--control", llama, *SMALL, *token, "--json", "--out", tmp_path / "attack"),
        call_cli("inspect", hardened, *token, "--json"),
        call_cli("collapse", hardened, *token, "--out", tmp_path / "back"),
        call_cli(
            *("certify", hardened, "--base", llama, "--text", text, *token, "--out", tmp_path / "certificate"),
            *("--attacks", tmp_path / "attack" / "report.json", "--formats", "none", "--no-curvature"),
        ),
    ]
    assert [result.code for result in results] == [0] * 5, [result.stderr for result in results]
    failed = [
        call_cli("harden", "org/not-in-the-cache", *token, "--out", tmp_path / "no"),
        call_cli("attack", hardened, "--control", "org/not-in-the-cache", *SMALL, *token, "--out", tmp_path / "no"),
        call_cli("attack", hardened, "--dataset", "org/no-data", *SMALL, *token, "--out", tmp_path / "no"),
        call_cli("certify", hardened, "--base", "org/not-in-the-cache", *token, "--out", tmp_path / "no"),
    ]
    for result in failed:
        assert_refused(result)
    assert TOKEN not in "".join(result.stdout + result.stderr for result in (*results, *failed))
    assert (tmp_path / "certificate" / "certificate.json").is_file()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []
