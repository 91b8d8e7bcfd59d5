"""What surrounds a command: code, pickles and tokens, terminals, pipes, full disks, and what other launches left."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from specdef_cli.cli.output import SafeStream, safe_streams
from specdef_cli.errors import clean_token, redact
from specdef_cli.process import forget_stale_launcher
from tests.commands import Result, assert_refused, call_cli, run_main, succeed
from tests.faults.small_attack import SMALL
from tests.hardening.mutations import config, content
from tests.hub_server import Hub, here, serving

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


def test_no_pickle_is_ever_loaded(llama: Path, hardened: Path, text: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    base, spoiled = shutil.copytree(llama, tmp_path / "base"), shutil.copytree(hardened, tmp_path / "spoiled")
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
    base = shutil.copytree(llama, tmp_path / "base")
    # transformers knows Llama itself: the code is not needed, and not run.
    for mutate in (content("evil.py", evil), config(auto_map={"AutoConfig": "evil.SpecDefConfig"})):
        mutate(base)
    shim = shutil.copytree(hardened, tmp_path / "shim")
    content("configuration_specdef.py", evil)(shim)
    results = every_command(base, shim, text, tmp_path)
    for name in ("harden", "inspect", "inspect hardened", "collapse", "attack"):
        assert results[name].code == 0, (name, results[name].stderr)
    assert_refused(results["certify"], "configuration_specdef.py", "--trust-remote-code")
    assert not canary.exists()
    elsewhere = shutil.copytree(hardened, tmp_path / "elsewhere")
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


FOLD = ("--method", "fold", "--quiet")

# --- secrets ---------------------------------------------------------------------------------------------------------


def test_white_space_around_a_token_is_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret that was mounted as a file ends with a newline; HTTP clients refuse it, and quote it whole."""
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\r\n")
    monkeypatch.setenv("SPECDEF_DEBUG", "1")
    with serving(Hub({})) as hub, here(hub, tmp_path):
        done = call_cli("inspect", "org/name", "--quiet")
    assert done.code == 1
    assert TOKEN not in done.stdout + done.stderr
    assert "org/name" in done.stderr
    assert {authorization for _, _, authorization in hub.seen} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("token", [f"{TOKEN[:9]}\n{TOKEN[9:]}", f"{TOKEN} {TOKEN}", f"{TOKEN}é", f"{TOKEN}\0x"])
def test_a_token_that_is_none_is_wrong_usage_and_is_not_shown(token: str, llama: Path) -> None:
    result = call_cli("inspect", llama, "--token", token)
    assert result.code == 2
    assert "token" in result.stderr
    for part in (TOKEN, TOKEN[9:]):
        assert part not in result.stdout + result.stderr


@pytest.mark.parametrize(
    "text",
    [
        f"Illegal header value b'Bearer {TOKEN}\\n'",
        f"{{'authorization': 'Bearer {'x' * 20}'}}",
        f"https://user:{'p' * 9}@hub.example/org/name",
        f"HF_TOKEN={TOKEN}",
    ],
)
def test_what_an_http_client_says_is_without_secrets(text: str) -> None:
    assert "***" in redact(text)
    for secret in (TOKEN, "x" * 20, "p" * 9):
        assert secret not in redact(text)


def test_a_given_token_of_any_shape_is_taken_out() -> None:
    clean_token(" mirror/Password+1 \n")
    assert redact("a mirror/Password+1 b") == "a *** b"
    assert clean_token("\n") is None
    assert redact("model.layers.0.hf_device_map in hf_cache") == "model.layers.0.hf_device_map in hf_cache"


# --- what cannot be shown --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_terminal_without_the_characters(encoding: str, llama: Path, tmp_path: Path) -> None:
    for arguments in (
        ("inspect", llama),
        ("harden", llama, "--method", "factors", "--top-k", "4", "--out", tmp_path / "out"),
        ("collapse", tmp_path / "out", "--out", tmp_path / "back"),
    ):
        raw = io.BytesIO()
        with contextlib.redirect_stdout(io.TextIOWrapper(raw, encoding=encoding, errors="strict")) as stdout:
            assert run_main(*arguments) == 0
            stdout.flush()
        shown = raw.getvalue().decode(encoding)
        assert "down_proj" in shown or "back" in shown
    assert (tmp_path / "back" / "config.json").is_file()


class FullDisk(io.StringIO):
    """A stdout on a disk that is full."""

    error = OSError(28, "No space left on device")

    def write(self, text: str) -> int:
        raise self.error


class NobodyReads(FullDisk):
    error = BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize(
    ("stdout", "inspected"), [(FullDisk, 1), (NobodyReads, 0), (None, 0)], ids=["full", "gone", "closed"]
)
def test_output_does_not_decide_success(
    stdout: Any, inspected: int, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = []
    for arguments in (
        ("inspect", llama),
        ("inspect", llama, "--json"),
        ("harden", llama, *FOLD, "--dry-run"),
        ("harden", llama, *FOLD, "--out", tmp_path / "out"),
        ("collapse", tmp_path / "out", "--out", tmp_path / "back", "--json"),
    ):
        with contextlib.redirect_stdout(stdout and stdout()):
            codes.append(run_main(*arguments))
    # What is only printed is lost; what is published is not.
    assert codes == [inspected, inspected, inspected, 0, 0]
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert ("No space left on device" in said) is (stdout is FullDisk)
    assert (tmp_path / "back" / "config.json").is_file()


def test_a_stream_takes_secrets_out_and_streams_are_what_they_were_afterwards() -> None:
    inner = io.StringIO()
    stream = SafeStream(inner)
    assert stream.write(f"a {TOKEN} b") == len(f"a {TOKEN} b")
    stream.writelines(["c", "d"])
    assert inner.getvalue() == "a *** bcd"
    assert stream.isatty() is False
    with pytest.raises(TypeError):
        stream.write(b"x")  # type: ignore[arg-type]
    before = sys.stdout, sys.stderr
    with safe_streams():
        assert isinstance(sys.stdout, SafeStream)
    assert (sys.stdout, sys.stderr) == before


# --- launchers -------------------------------------------------------------------------------------------------------

STALE: dict[str, dict[str, str]] = {
    "one process": {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
    "a local rank alone": {"LOCAL_RANK": "0"},
    "empty": {"RANK": "", "WORLD_SIZE": ""},
    "a rank of eight": {"LOCAL_RANK": "3", "WORLD_SIZE": "1"},
    "MPI": {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
}


@pytest.mark.parametrize("case", STALE)
def test_what_a_launch_of_one_process_left_is_ignored(case: str) -> None:
    environ = {**STALE[case], "HOME": "/"}
    note = forget_stale_launcher(environ) or ""
    assert all(name in note for name in STALE[case])
    assert environ == {"HOME": "/"}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
    ],
)
def test_a_launch_that_can_be_joined_is_left_alone(environ: dict[str, str]) -> None:
    before = dict(environ)
    assert forget_stale_launcher(environ) is None
    assert environ == before


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"PMI_SIZE": "2", "PMI_RANK": "1"},
        {"RANK": "1", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"},
        {"RANK": "x", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "two"},
    ],
    ids=["two processes", "two processes of MPI", "a rank beyond", "no number", "a size in words"],
)
def test_a_launch_that_cannot_be_joined(
    environ: dict[str, str], llama: Path, hardened: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    for arguments in (("inspect", llama), ("harden", llama, "--dry-run"), ("collapse", hardened, "--out", "nowhere")):
        result = call_cli(*arguments)
        assert_refused(result, "unset", "torchrun")
    advised = result.stderr.split("`unset ")[1].split("`")[0].split()
    for name in advised:
        monkeypatch.delenv(name, raising=False)
    succeed("inspect", llama, "--quiet")  # as the hint says


def test_a_command_works_alone_and_says_so(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STALE["MPI"].items():
        monkeypatch.setenv(name, value)
    done = succeed("harden", llama, "--method", "fold", "--out", tmp_path / "out")
    assert "was ignored: MASTER_ADDR is not set" in done.stderr
    assert os.listdir(tmp_path) == ["out"]  # noqa: PTH208
