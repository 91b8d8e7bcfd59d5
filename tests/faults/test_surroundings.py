"""What surrounds a command: tokens, terminals, pipes, full disks, and what other launches left in the environment."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from specdef_cli.cli.output import Output, SafeStream, safe_streams
from specdef_cli.errors import SpecDefError, clean_token, redact
from specdef_cli.process import forget_stale_launcher
from tests.commands import REPOSITORY, assert_refused, call_cli, command, environment
from tests.hub_server import Hub, serving, variables

TOKEN = "hf_" + "s3cretS3cret" * 3
FOLD = ("--method", "fold", "--quiet")

# --- secrets ---------------------------------------------------------------------------------------------------------


def test_white_space_around_a_token_is_no_part_of_it(tmp_path: Path) -> None:
    """A secret that was mounted as a file ends with a newline; HTTP clients refuse it, and quote it whole."""
    with serving(Hub({})) as hub:
        changes = {**variables(hub, tmp_path), "HF_TOKEN": f"{TOKEN}\r\n"}
        done = subprocess.run(
            command("inspect", "org/name", "--quiet"),
            env=environment(**changes, SPECDEF_DEBUG="1"), capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
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


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp437", "latin-1"])
def test_a_terminal_without_the_characters(encoding: str, llama: Path, tmp_path: Path) -> None:
    for arguments in (
        ("inspect", llama),
        ("harden", llama, "--method", "factors", "--top-k", "4", "--out", tmp_path / "out"),
        ("collapse", tmp_path / "out", "--out", tmp_path / "back"),
    ):
        result, shown = through(encoding, *arguments)
        assert result == 0, shown
        assert "down_proj" in shown or "back" in shown
    assert (tmp_path / "back" / "config.json").is_file()


def through(encoding: str, *arguments: object) -> tuple[int, str]:
    """The exit code of a command in this process, and what it writes to a stdout of that encoding."""
    from specdef_cli.cli.app import main

    raw = io.BytesIO()
    before, argv = sys.stdout, sys.argv
    sys.stdout = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
    sys.argv = ["specdef", *map(str, arguments)]
    code = 0
    try:
        main()
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    finally:
        sys.stdout.flush()
        shown = raw.getvalue().decode(encoding)
        sys.stdout, sys.argv = before, argv
    return code, shown


class FullDisk(io.StringIO):
    """A stdout on a disk that is full."""

    error = OSError(28, "No space left on device")

    def write(self, text: str) -> int:
        raise self.error


class NobodyReads(FullDisk):
    """A stdout whose reader has gone."""

    error = BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize(
    ("stdout", "inspected"), [(FullDisk, 1), (NobodyReads, 0), (None, 0)], ids=["full", "gone", "closed"]
)
def test_output_does_not_decide_success(
    stdout: type[FullDisk] | None, inspected: int, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from specdef_cli.cli.app import main

    codes = []
    for arguments in (
        ("inspect", llama),
        ("harden", llama, *FOLD, "--dry-run"),
        ("harden", llama, *FOLD, "--out", tmp_path / "out"),
        ("collapse", tmp_path / "out", "--out", tmp_path / "back", "--json"),
    ):
        monkeypatch.setattr(sys, "argv", ["specdef", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdout", stdout and stdout())
        try:
            main()
            codes.append(0)
        except SystemExit as leaving:
            codes.append(int(leaving.code or 0))
    # What is only printed is lost; what is published is not.
    assert codes == [inspected, inspected, 0, 0]
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert ("No space left on device" in said) is (stdout is FullDisk)
    assert (tmp_path / "back" / "config.json").is_file()


def test_the_same_in_a_process_of_its_own(llama: Path, tmp_path: Path) -> None:
    script = " ".join((*command("harden", llama, *FOLD, "--out", tmp_path / "out"), "> /dev/full"))
    done = subprocess.run(
        ["bash", "-c", script], env=environment(), cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "specdef.json").is_file()


def test_a_stream_takes_text_only_and_passes_the_rest_on() -> None:
    inner = io.StringIO()
    stream = SafeStream(inner)
    assert stream.write(f"a {TOKEN} b") == len(f"a {TOKEN} b")
    stream.writelines(["c", "d"])
    assert inner.getvalue() == "a *** bcd"
    assert stream.isatty() is False
    with pytest.raises(TypeError):
        stream.write(b"x")  # type: ignore[arg-type]


def test_streams_are_what_they_were_afterwards() -> None:
    before = sys.stdout, sys.stderr
    with safe_streams():
        assert isinstance(sys.stdout, SafeStream)
    assert (sys.stdout, sys.stderr) == before


def test_a_result_that_is_lost_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", FullDisk())
    with safe_streams(), pytest.raises(SpecDefError, match="No space left"):
        Output(as_json=True).data({"a": 1}, None)


def test_an_output_that_is_taken_is_refused_before_anything_is_imported(llama: Path) -> None:
    code = (
        "import sys\nsys.argv = ['specdef', 'harden', sys.argv[1], '--out', sys.argv[1] + '/..']\n"
        "import runpy\n"
        "try:\n    runpy.run_module('specdef_cli', run_name='__main__')\n"
        "except SystemExit as leaving:\n    print(leaving.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(llama)], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "1 False\n"
    assert "exists already" in done.stderr


# --- launchers -------------------------------------------------------------------------------------------------------

STALE: dict[str, dict[str, str]] = {
    "one process": {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
    "a local rank alone": {"LOCAL_RANK": "0"},
    "empty": {"RANK": "", "WORLD_SIZE": ""},
    "a rank of eight": {"LOCAL_RANK": "3", "WORLD_SIZE": "1"},
    "MPI": {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
}
REFUSED: dict[str, dict[str, str]] = {
    "two processes": {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    "two processes of MPI": {"PMI_SIZE": "2", "PMI_RANK": "1"},
    "a rank beyond": {"RANK": "1", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"},
    "no number": {"RANK": "x", "WORLD_SIZE": "1"},
    "a size in words": {"WORLD_SIZE": "two"},
}


@pytest.mark.parametrize("case", STALE)
def test_what_a_launch_of_one_process_left_is_ignored(case: str) -> None:
    environ = {**STALE[case], "HOME": "/"}
    note = forget_stale_launcher(environ)
    assert note is not None
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


@pytest.mark.parametrize("case", REFUSED)
def test_a_launch_that_cannot_be_joined(
    case: str, llama: Path, hardened: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in REFUSED[case].items():
        monkeypatch.setenv(name, value)
    for arguments in (("inspect", llama), ("harden", llama, "--dry-run"), ("collapse", hardened, "--out", "nowhere")):
        result = call_cli(*arguments)
        assert_refused(result, "unset", "torchrun")
    advised = result.stderr.split("`unset ")[1].split("`")[0].split()
    for name in advised:
        monkeypatch.delenv(name, raising=False)
    assert call_cli("inspect", llama, "--quiet").code == 0  # as the hint says


def test_a_command_works_alone_and_says_so(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STALE["MPI"].items():
        monkeypatch.setenv(name, value)
    done = call_cli("harden", llama, "--method", "fold", "--out", tmp_path / "out")
    assert done.code == 0, done.stderr
    assert "was ignored: MASTER_ADDR is not set" in done.stderr
    assert os.listdir(tmp_path) == ["out"]  # noqa: PTH208
