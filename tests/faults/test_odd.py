"""A hundred odd directories, configurations, names, command lines and environments, given to the commands.

Whatever they are: no traceback; a refusal in two lines that leaves nothing behind, or a result that holds; and never an
exit code of 1 for what was published.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from specdef_cli.runtime import load_model
from tests.commands import Result, assert_refused, call_cli
from tests.faults.small_attack import SMALL, finished_runs
from tests.hardening.mutations import Mutation, config, content, spoiled

FOLD = ("--method", "fold", "--quiet")
INSERT = ("--method", "insert", "--top-k", "4", "--quiet")


def ends_well(result: Result, out: Path | None = None) -> bool:
    """Whether the command succeeded; it fails the test where the command did neither that nor refuse."""
    assert "Traceback" not in result.stderr, result.stderr
    if result.code == 0:
        assert out is None or load_model(out) is not None
        return True
    if result.code == 2:  # wrong usage
        assert "Usage" in result.stderr or "usage" in result.stderr, result.stderr
    else:
        assert_refused(result)
    if out is not None:
        assert not out.exists()
        unfinished = out.parent / f".{out.name}.specdef-unfinished"
        assert not unfinished.exists() or "--resume" in result.stderr
        assert not (out.parent / f".{out.name}.specdef-lock").exists()
    return False


# --- directories and configurations ----------------------------------------------------------------------------------


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def file_in_place_of(name: str) -> Mutation:
    def apply(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).mkdir()

    return apply


def pipe(name: str) -> Mutation:
    return lambda directory: os.mkfifo(directory / name)


def loop(directory: Path) -> None:
    (directory / "loop").symlink_to("loop")
    (directory / "up").symlink_to("..")


def deep(directory: Path) -> None:
    inside = directory.joinpath(*["d"] * 60)
    inside.mkdir(parents=True)
    (inside / "x.txt").write_text("x")


def not_utf_8(directory: Path) -> None:
    Path(os.fsdecode(os.fsencode(directory) + b"/caf\xe9.txt")).write_text("x")


def empty_below(directory: Path) -> None:
    (directory / "sub").mkdir()
    (directory / "sub" / "x.safetensors").write_bytes(b"")


def many(directory: Path) -> None:
    for number in range(300):
        (directory / f"extra-{number}.bin").write_bytes(b"x")


DIRECTORIES: dict[str, Mutation] = {
    # files
    "a byte order mark": content("config.json", b"\xef\xbb\xbf{}"),
    "config.json in UTF-16": content("config.json", "{}".encode("utf-16")),
    "config.json nested deeply": content("config.json", nested(100_000)),
    "config.json a directory": file_in_place_of("config.json"),
    "the weights a directory": file_in_place_of("model.safetensors"),
    "the tokenizer a directory": file_in_place_of("tokenizer.json"),
    "the card a directory": file_in_place_of("README.md"),
    "generation_config.json broken": content("generation_config.json", "{"),
    "generation_config.json a list": content("generation_config.json", "[]"),
    "tokenizer_config.json broken": content("tokenizer_config.json", "{"),
    "modules.json broken": content("modules.json", "{"),
    "modules.json of another shape": content("modules.json", '[{"path": 5}, 7]'),
    "adapter_config.json without weights": content("adapter_config.json", "{}"),
    "a pipe": pipe("fifo"),
    "links in circles": loop,
    "deep directories": deep,
    "many files of another format": many,
    "an index of nothing": content("model.safetensors.index.json", "[]"),
    "a name with a newline": content("a\nb.txt", "x"),
    "a name in another encoding": not_utf_8,
    "a name with markup": content("[red]x[bold].txt", "x"),
    "an empty .safetensors below": empty_below,
    # config.json
    "dtype unknown": config(dtype="float12"),
    "dtype a number": config(dtype=16),
    "dtype float64": config(dtype="float64"),
    "dtype float8": config(dtype="float8_e4m3fn"),
    "dtype auto": config(dtype="auto"),
    "torch_dtype null": config(torch_dtype=None, dtype=None),
    "architectures empty": config(architectures=[]),
    "architectures null": config(architectures=None),
    "architectures a string": config(architectures="LlamaForCausalLM"),
    "architectures of a function": config(architectures=["pipeline"]),
    "architectures of another family": config(architectures=["GPT2LMHeadModel"]),
}
HARDENINGS = (FOLD, INSERT)


@pytest.mark.fault("odd directories, configs and names, given to every command", inputs=6)
@pytest.mark.parametrize("case", DIRECTORIES)
def test_directories(case: str, llama: Path, hardened: Path, tmp_path: Path) -> None:
    directory = spoiled(llama, tmp_path, DIRECTORIES[case])
    outside = tmp_path / "outside"
    outside.mkdir()
    for number, options in enumerate(HARDENINGS):
        out = outside / str(number)
        planned = call_cli("harden", directory, *options, "--dry-run")
        result = call_cli("harden", directory, *options, "--out", out)
        if ends_well(result, out):
            assert ends_well(planned)
            assert ends_well(call_cli("collapse", out, "--out", outside / f"back {number}", "--quiet"))
    ends_well(call_cli("inspect", directory, "--json"))
    ends_well(call_cli("certify", hardened, "--base", directory, "--dry-run"))
    spoilt = spoiled(hardened, tmp_path / "hardened", DIRECTORIES[case])
    ends_well(call_cli("certify", spoilt, "--base", llama, "--dry-run"))
    result = call_cli("attack", directory, "--control", directory, *SMALL, "--out", tmp_path / "attack")
    if not ends_well(result):
        assert finished_runs(tmp_path / "attack") == {}


NAMES = ("a b", "[bold]x", "-dash", "ünïcode", "model@main", "a\nb", "x" * 200, "50%", "$HOME", "'quoted'", "tab\tname")


@pytest.mark.fault("odd directories, configs and names, given to every command", inputs=3)
@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names(name: str, llama: Path, tmp_path: Path) -> None:
    directory = tmp_path / "in" / name
    directory.parent.mkdir()
    shutil.copytree(llama, directory)
    out = tmp_path / "out" / name
    assert ends_well(call_cli("harden", directory, *FOLD, "--out", out), out)
    assert ends_well(call_cli("inspect", out, "--json"))
    assert ends_well(call_cli("collapse", out, "--quiet", "--out", tmp_path / "back" / name))


@pytest.mark.fault("odd directories, configs and names, given to every command")
def test_a_name_that_is_not_utf_8(llama: Path, tmp_path: Path) -> None:
    directory = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    shutil.copytree(llama, directory)
    out = tmp_path / "out"
    ends_well(call_cli("harden", directory, *FOLD, "--out", out), out)
    ends_well(call_cli("inspect", directory))


# --- command lines ---------------------------------------------------------------------------------------------------

LINES: dict[str, tuple[str, ...]] = {
    "alpha a word": ("harden", "BASE", "--alpha", "ten"),
    "alpha tiny": ("harden", "BASE", *INSERT, "--alpha", "1e-320"),
    "alpha 1": ("harden", "BASE", *INSERT, "--alpha", "1"),
    "top-k negative": ("harden", "BASE", "--method", "insert", "--top-k", "-3"),
    "top-k huge": ("harden", "BASE", "--method", "insert", "--top-k", str(10**30)),
    "seed negative": ("harden", "BASE", *INSERT, "--seed", "-1"),
    "seed huge": ("harden", "BASE", *INSERT, "--seed", str(10**40)),
    "shards of one byte": ("harden", "BASE", *FOLD, "--max-shard-size", "0.001KB"),
    "shards of nothing": ("harden", "BASE", *FOLD, "--max-shard-size", "0GB"),
    "shards of infinity": ("harden", "BASE", *FOLD, "--max-shard-size", "infGB"),
    "shards without a unit": ("harden", "BASE", *FOLD, "--max-shard-size", "5"),
    "a glob that is broken": ("harden", "BASE", *FOLD, "--layers", "[a-"),
    "an empty glob": ("harden", "BASE", *FOLD, "--layers", ""),
    "everything excluded": ("harden", "BASE", *FOLD, "--exclude", "*"),
    "a device of no kind": ("harden", "BASE", *FOLD, "--device", ""),
    "the meta device": ("harden", "BASE", *FOLD, "--device", "meta"),
    "a device number": ("harden", "BASE", *FOLD, "--device", "cpu:7"),
    "resume of nothing": ("harden", "BASE", *FOLD, "--resume"),
    "an empty model": ("harden", ""),
    "a model of blanks": ("harden", "  "),
    "a model that is a URL": ("harden", "https://huggingface.co/org/name"),
    "a model that is a Hub id with a path": ("harden", "org/name/sub"),
    "a model that is a file": ("harden", "BASE/config.json"),
    "a model that is the parent": ("harden", "BASE/.."),
    "a revision of a directory": ("harden", "BASE", *FOLD, "--revision", "v1"),
    "two revisions": ("harden", "org/name@a", "--revision", "b"),
    "a revision that is empty": ("harden", "org/name@"),
    "collapse of a base": ("collapse", "BASE"),
    "collapse of shards of nothing": ("collapse", "HARDENED", "--max-shard-size", "x"),
    "collapse on a device of no kind": ("collapse", "HARDENED", "--device", "quantum"),
    "inspect on a device of no kind": ("inspect", "BASE", "--device", "quantum"),
    "inspect of two": ("inspect", "BASE", "HARDENED"),
    "attack without a control": ("attack", "BASE"),
    "attack by an unknown training": ("attack", "HARDENED", "--control", "BASE", "--training", "osmosis"),
    "attack by an unknown optimizer": ("attack", "HARDENED", "--control", "BASE", "--optimizer", "nope"),
    "attack by an unknown variant": ("attack", "HARDENED", "--control", "BASE", "--variant", "nope"),
    "attack by a suite that is none": ("attack", "HARDENED", "--control", "BASE", "--suite", "nope"),
    "attack at a rate of NaN": ("attack", "HARDENED", "--control", "BASE", "--lr", "nan"),
    "attack at a negative rate": ("attack", "HARDENED", "--control", "BASE", "--lr", "-1"),
    "attack of no steps": ("attack", "HARDENED", "--control", "BASE", "--steps", "0"),
    "attack of half a batch": ("attack", "HARDENED", "--control", "BASE", "--batch-size", "0"),
    "attack of sequences of one": ("attack", "HARDENED", "--control", "BASE", "--sequence-length", "1"),
    "attack without evaluations": ("attack", "HARDENED", "--control", "BASE", "--eval-every", "0"),
    "attack of no seeds": ("attack", "HARDENED", "--control", "BASE", "--seeds", "0"),
    "attack by no jobs": ("attack", "HARDENED", "--control", "BASE", "--jobs", "0"),
    "attack on data that is nowhere": ("attack", "HARDENED", "--control", "BASE", "--dataset", "./nowhere.jsonl"),
    "attack on a directory of nothing": ("attack", "HARDENED", "--control", "BASE", "--dataset", "EMPTY"),
    "attack of an unknown task": ("attack", "HARDENED", "--control", "BASE", "--task", "chess"),
    "attack for classes without data": (
        "attack", "HARDENED", "--control", "BASE", "--task", "sequence-classification",
    ),
    "attack that fails on nonsense": ("attack", "HARDENED", "--control", "BASE", "--fail-if", "luck>3"),
    "attack on a control that is nowhere": ("attack", "HARDENED", "--control", "./nowhere"),
    "certify of a base": ("certify", "BASE"),
    "certify with a report that is nowhere": ("certify", "HARDENED", "--base", "BASE", "--attacks", "nowhere.json"),
    "certify with a report that is a model": ("certify", "HARDENED", "--base", "BASE", "--attacks", "BASE/config.json"),
    "certify on text that is nowhere": ("certify", "HARDENED", "--base", "BASE", "--text", "nowhere.txt"),
    "certify in an unknown format": ("certify", "HARDENED", "--base", "BASE", "--format", "jpeg"),
    "certify on a device of no kind": ("certify", "HARDENED", "--base", "BASE", "--device", "quantum"),
    "certify against a base that is nowhere": ("certify", "HARDENED", "--base", "./nowhere"),
    "certify by no jobs": ("certify", "HARDENED", "--base", "BASE", "--jobs", "0"),
}  # fmt: skip


@pytest.mark.fault("odd command lines")
@pytest.mark.parametrize("case", LINES)
def test_command_lines(case: str, llama: Path, hardened: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    places = {"BASE": str(llama), "HARDENED": str(hardened), "EMPTY": str(tmp_path / "empty")}
    arguments = [LINES[case][0]]
    for argument in LINES[case][1:]:
        first, slash, rest = argument.partition("/")
        arguments.append(places.get(first, first) + slash + rest)
    out = tmp_path / "outside" / "out"
    more: tuple[Any, ...] = () if arguments[0] == "inspect" else ("--out", out)
    result = call_cli(*arguments, *more)
    if arguments[0] in ("harden", "collapse"):
        ends_well(result, out)
    else:
        assert not ends_well(result)
        assert not out.exists()
    assert list((tmp_path / "work").iterdir()) == []


# --- environments ----------------------------------------------------------------------------------------------------

ENVIRONMENTS: dict[str, dict[str, str | None]] = {
    "no HOME": {"HOME": None},
    "a HOME that is nowhere": {"HOME": "/nowhere/at/all"},
    "columns of nothing": {"COLUMNS": "0"},
    "columns in words": {"COLUMNS": "wide", "LINES": "tall"},
    "a dumb terminal": {"TERM": "dumb"},
    "colours forced": {"FORCE_COLOR": "1"},
    "a debugger": {"SPECDEF_DEBUG": "1"},
    "an empty token": {"HF_TOKEN": ""},
    "threads of nothing": {"OMP_NUM_THREADS": "0"},
    "accelerate on a CPU": {"ACCELERATE_USE_CPU": "true"},
    "mixed precision": {"ACCELERATE_MIXED_PRECISION": "bf16"},
    "an unknown language": {"LC_ALL": "xx_XX", "LANG": "xx"},
    "a temporary directory that is nowhere": {"TMPDIR": "/nowhere"},
}


@pytest.mark.fault("odd environments")
@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_environments(case: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENTS[case].items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    assert ends_well(call_cli("harden", llama, *FOLD, "--out", out), out)
    assert ends_well(call_cli("inspect", out))


def test_the_table_is_about_a_hundred() -> None:
    assert len(DIRECTORIES) + len(NAMES) + len(LINES) + len(ENVIRONMENTS) >= 100
