"""Odd directories, configurations, names, command lines and environments, each with one right answer."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specdef_cli.certify import CertifyOptions
from specdef_cli.checkpoint.manifest import read_manifest
from specdef_cli.hardening import verify as verification
from specdef_cli.model import load_model, opened
from tests.commands import Result, assert_refused, call_cli, command, environment, snapshot, succeed
from tests.faults.small_attack import SMALL
from tests.hardening.mutations import config, content, file_in_place_of, spoiled
from tests.tiny_kinds import write_kind

FOLD = ("--method", "fold", "--quiet")
FACTORS = ("--method", "factors", "--top-k", "4", "--quiet")
ATTACK = ("attack", "HARDENED", "--control", "BASE")
CERTIFY = ("certify", "HARDENED", "--base", "BASE")
TEXT = ("--dataset", "TEXT", *SMALL)
QUICK = ("--text", "TEXT", "--formats", "none", "--no-curvature", "--quiet")

# --- command lines ---------------------------------------------------------------------------------------------------

USAGE: dict[str, tuple[Any, ...]] = {
    # Wrong whatever the files and the Hub hold, and a word of why. What one class or one parser refuses is tested
    # beside it.
    "alpha a word": (("harden", "BASE", "--alpha", "ten"), "'--alpha'"),
    "alpha with a minus of Unicode": (("harden", "BASE", *FACTORS, "--alpha", "\u22125"), "--alpha"),
    "a device of no kind": (("harden", "BASE", *FOLD, "--device", ""), "device ''"),
    "private without a place": (("harden", "BASE", *FOLD, "--private"), "--private"),
    "collapse on a device of no kind": (("collapse", "HARDENED", "--device", "quantum"), "'quantum'"),
    "inspect of two": (("inspect", "BASE", "HARDENED"), "unexpected extra argument"),
    "attack by an unknown suite": ((*ATTACK, "--suite", "nope"), "no suite 'nope'"),
    "attack by a suite that is a directory": ((*ATTACK, "--suite", "BASE"), "no suite"),
    "attack at a rate with a minus of Unicode": ((*ATTACK, "--lr", "1e\u22123"), "--lr"),
    "attack at a rate beyond any": ((*ATTACK, "--lr", "1e400"), "--lr inf"),
    "attack with a decay of NaN": ((*ATTACK, "--weight-decay", "nan"), "--weight-decay nan"),
    "attack of half a batch": ((*ATTACK, "--batch-size", "0"), "--batch-size 0"),
    "attack without evaluations": ((*ATTACK, "--eval-every", "0"), "--eval-every 0"),
    "attack of no seeds": ((*ATTACK, "--seeds", "0"), "--seeds 0"),
    "attack with a billion seeds": ((*ATTACK, "--seeds", str(10**9)), "1 to 1000"),
    "attack within a negative time": ((*ATTACK, "--time-limit", "-5m"), "'-5m' is not a duration"),
    "attack by growth of NaN": ((*ATTACK, "--expand", "nanx"), "growth nan"),
    "attack on parameters of an empty name": ((*ATTACK, "--training", "full@"), "names nothing after"),
    "attack that fails on percent": ((*ATTACK, "--fail-if", "share_of_control>20"), "0.2 for 20 %"),
    "attack that fails on refusals it never asks for": ((*ATTACK, "--fail-if", "refusals<0.5"), "--prompts FILE"),
    "attack on a split of no data": ((*ATTACK, "--dataset-split", "test"), "--dataset-split test needs --dataset"),
    "attack on a column of no data": ((*ATTACK, "--text-column", "body"), "--text-column body needs --dataset"),
    "attack with tasks of one's own and none named": ((*ATTACK, "--eval-task-path", "EMPTY"), "needs --eval-task"),
    "attack in a folder above": ((*ATTACK, "--subfolder", "../x"), "the subfolder '../x'"),
    "a base on the Hub that is none": (("harden", "BASE", *FOLD, "--base-model", "a b"), "'a b' is no Hub id"),
    "attack that fails on nonsense": ((*ATTACK, "--fail-if", "luck>3"), "'luck>3' is not a condition"),
    "attack that fails on NaN": ((*ATTACK, "--fail-if", "steps_to_control<nan"), "is not a condition"),
    "attack that fails on nothing": ((*ATTACK, "--fail-if", ""), "'' is not a condition"),
    "attack told to nobody": ((*ATTACK, "--report-to", "nobody"), "'nobody' is unknown"),
    "attack at a rate of NaN": ((*ATTACK, "--lr", "nan"), "--lr nan"),
    "attack on one token": ((*ATTACK, "--sequence-length", "1"), "--sequence-length 1"),
    "attack of no schedule": ((*ATTACK, "--schedule", "step"), "'step'"),
    "attack by no job": ((*ATTACK, "--jobs", "0"), "--jobs 0"),
    "attack warmed up to its end": ((*ATTACK, "--warmup-steps", "30"), "--warmup-steps 30"),
    "attack that takes a blank for a refusal": ((*ATTACK, "--refusal-word", " "), "--refusal-word"),
    "attack by a suite and a training": ((*ATTACK, "--suite", "quick", "--training", "full@*norm*"), "--suite quick"),
    "attack by a suite and an optimizer": ((*ATTACK, "--suite", "quick", "--optimizer", "sgd"), "--optimizer"),
    "certify on a device of no kind": ((*CERTIFY, "--device", "warp"), "warp"),
    "certify in an unknown format": ((*CERTIFY, "--formats", "jpeg"), "'jpeg'"),
    "push to no name": (("push", "HARDENED", ""), "not the name of a repository", "org/name"),
    "push to a path": (("push", "HARDENED", "a/b/c"), "'a/b/c'", "org/name"),
    "push to a branch": (("push", "HARDENED", "a/b@v1"), "'a/b@v1'", "org/name", "--revision"),
    "harden for a repository of no name": (("harden", "BASE", *FOLD, "--push-to-hub", "a b"), "'a b'", "org/name"),
    "a base's folder without a base": (
        ("certify", "CERTIFIED", "--base-subfolder", "x"), "--base-subfolder", "Give --base BASE",
    ),
}  # fmt: skip
LINES: dict[str, tuple[Any, ...]] = {
    # Wrong for what is there.
    "a glob that is broken": (("harden", "BASE", *FOLD, "--layers", "[a-"), "'[a-' matches no"),
    "an empty glob": (("harden", "BASE", *FOLD, "--layers", ""), "'' matches no"),
    "the meta device": (("harden", "BASE", *FOLD, "--device", "meta"), "device 'meta'"),
    "an empty model": (("harden", ""), "'' is neither"),
    "a model of blanks": (("harden", "  "), "'  ' is neither"),
    "a model that is the parent": (("harden", "BASE/.."), "holds a directory that has one"),
    "an output of too long a name": (("harden", "BASE", *FOLD, "--out", "x" * 300), "x" * 300),
    "an output at the root": (("harden", "BASE", *FOLD, "--out", "/"), "exists already"),
    "an output of no name": (("harden", "BASE", *FOLD, "--out", ""), "exists already"),
    "attack by a suite that is weights": ((*ATTACK, "--suite", "BASE/model.safetensors"), "not a suite"),
    "attack by a suite that is a config": ((*ATTACK, "--suite", "BASE/config.json"), "not a suite"),
    "attack by a rank that no memory holds": (
        (*ATTACK, *SMALL[2:], "--training", f"lora:{10**12}"), "memory is not enough",
    ),
    "attack by adapters on nothing, second": (
        (*ATTACK, *SMALL, "--training", "lora@no"), "cannot be put on no: Target modules",
    ),
    "attack by adapters of an odd size, second": ((*ATTACK, *SMALL, "--training", "boft:7"), "or another size"),
    "attack on parameters of no name": ((*ATTACK, *SMALL[2:], "--training", "full@z*"), "z* names no parameter"),
    "attack that retains what is nowhere": ((*ATTACK, "--retained", "nowhere.txt"), "no data file nowhere.txt"),
    "attack on a data set's address": (
        (*ATTACK, "--dataset", "https://huggingface.co/datasets/org/name"), "Give org/name.",
    ),
    "attack on an address": ((*ATTACK, "--dataset", "https://x.org/a.jsonl"), "https://x.org/a.jsonl is an address"),
    "attack on data that is nowhere": ((*ATTACK, "--dataset", "./nowhere.jsonl"), "no data file nowhere.jsonl"),
    "attack on a directory of nothing": ((*ATTACK, "--dataset", "EMPTY"), "holds no data"),
    "attack on a configuration of a file": ((*ATTACK, *TEXT, "--dataset-config", "de"), "--dataset-config 'de'"),
    "attack on a split of a file": ((*ATTACK, *TEXT, "--dataset-split", "test"), "--dataset-split 'test'"),
    "attack on a column that is not there": ((*ATTACK, *TEXT, "--text-column", "no"), "no column 'no'"),
    "attack on sequences longer than all data": (
        (*ATTACK, *TEXT, "--sequence-length", str(10**12)), "0 sequences to train on",
    ),
    "attack in batches larger than all data": ((*ATTACK, *TEXT, "--batch-size", str(10**12)), "a batch has 1000000000"),
    "attack for a task that the model has not": ((*ATTACK, "--task", "seq2seq-lm"), "--task causal-lm"),
    "attack for classes without data": ((*ATTACK, "--task", "sequence-classification"), "labelled texts"),
    "attack without a control": (("attack", "BASE"), "has no manifest that names its base"),
    "attack on a control that is nowhere": (("attack", "HARDENED", "--control", "./nowhere"), "'./nowhere' is neither"),
    "attack to the data": ((*ATTACK, "--dataset", "TEXT", "--out", "TEXT"), "not a directory"),
    "attack into its control": ((*ATTACK, "--out", "BASE/attack"), "lies in the input"),
    "certify below a file": ((*CERTIFY, "--out", "TEXT/certificate"), "not a directory"),
    "certify into the model": ((*CERTIFY, "--out", "HARDENED/certificate"), "lies in the input"),
    "attack that says so as JSON": (("attack", "./nowhere", "--control", "BASE", "--json"), "'./nowhere' is neither"),
    "certify against a base that is nowhere": (("certify", "HARDENED", "--base", "./nowhere"), "'./nowhere'"),
    "certify with a report that is nowhere": ((*CERTIFY, "--attacks", "nowhere.json"), "no attack report nowhere.json"),
    "certify on text that is a directory": ((*CERTIFY, "--text", "BASE"), "is not a file"),
    "compare weights": (("compare", "BASE/model.safetensors"), "not an attack report"),
    "compare one that is broken, as JSON": (("compare", "ATTACK", "nowhere", "--json"), "nowhere"),
    "an attack for the card of a base": (("attack", "BASE", "--control", "BASE", "--card", *TEXT), "specdef.json"),
    "push a file": (("push", "TEXT", "org/name"), "is not a directory"),
    "verify a file": (("verify-certificate", "CERTIFIED/certificate.json"), "is a file"),
    "verify with a report that is nowhere": (
        ("verify-certificate", "CERTIFIED", "--attacks", "nowhere"), "no attack report nowhere",
    ),
    "a fold's manifest for its base": (
        ("collapse", "BASE", "--manifest", "APART.JSON"), "multiplied by 2^", "and it is not",
    ),
    "inspect a base with a fold's manifest": (
        ("inspect", "BASE", "--manifest", "APART.JSON"), "multiplied by 2^", "specdef.json",
    ),
    "attack a base with a fold's manifest": (
        ("attack", "BASE", "--manifest", "APART.JSON", "--control", "BASE", *TEXT), "multiplied by 2^",
    ),
    "certify a base with a fold's manifest": (
        ("certify", "BASE", "--manifest", "APART.JSON", "--base", "BASE", *QUICK), "multiplied by 2^",
    ),
    "a manifest around the output": (
        ("harden", "BASE", *FOLD, "--out", "OUT/x", "--manifest-out", "OUT"), "--manifest-out", "lies in",
    ),
    "a manifest in the base": (("harden", "BASE", *FOLD, "--manifest-out", "BASE/specdef.json"), "lies in the model"),
    "a control that is hardened": (
        ("attack", "FOLD", "--control", "HARDENED", *TEXT), "--control", "hardened itself",
    ),
    "a model against itself": (
        ("certify", "HARDENED", "--base", "HARDENED", *QUICK), "--base", "hardened itself",
    ),
    "a base that is another hardened model": (
        ("certify", "HARDENED", "--base", "FOLD", *QUICK, "--dry-run"), "--base", "hardened itself",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(
    hardened: Path, text: Path, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A base, what is made of it, an attack on that, and its certificate."""
    root, base = tmp_path_factory.mktemp("places"), tiny_model("llama")
    names = ("certified", "fold", "apart", "apart.json", "attack", "certificate")
    found = {"BASE": base, "HARDENED": hardened, "TEXT": text, **{name.upper(): root / name for name in names}}
    shutil.copytree(hardened, root / "certified")
    succeed("harden", base, *FOLD, "--out", root / "fold")
    succeed("harden", base, *FOLD, "--out", root / "apart", "--manifest-out", root / "apart.json")
    succeed("attack", root / "certified", "--control", base, *filled(TEXT, found), "--out", root / "attack")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specdef_cli.certify.function._fresh_process", lambda *_: (True, ""))
        given = ("--attacks", root / "attack" / "report.json", "--out", root / "certificate")
        succeed("certify", root / "certified", "--base", base, *filled(QUICK, found), *given)
    return found


def filled(arguments: Sequence[str], places: Mapping[str, Path]) -> list[str]:
    """Names in capitals, and what comes after a slash, as paths."""
    split = [(argument, *argument.partition("/")) for argument in arguments]
    return [f"{places[name]}{slash}{rest}" if name in places else plain for plain, name, slash, rest in split]


@pytest.mark.parametrize("case", [*USAGE, *LINES])
def test_command_lines_are_refused(
    case: str, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an error and a hint, or as wrong usage; nothing is written anywhere."""
    for name in ("empty", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    given, *words = {**USAGE, **LINES}[case]
    out = tmp_path / "outside" / "out"
    arguments = filled(given, {**places, "EMPTY": tmp_path / "empty", "OUT": out})
    if arguments[0] in ("harden", "collapse", "attack", "certify") and "--out" not in arguments:
        arguments += ["--out", str(out)]
    watched = (tmp_path, places["BASE"], places["HARDENED"], places["TEXT"].parent, places["FOLD"].parent)
    before = [snapshot(path) for path in watched]
    result = call_cli(*arguments)
    if "Usage" in result.stderr:  # typer's own words
        assert (result.code, case in USAGE) == (2, True)
        assert words[0] in result.stderr
    else:
        assert_refused(result, *words, code=2 if case in USAGE else 1)
    assert [snapshot(path) for path in watched] == before
    assert not out.exists()


def test_a_base_in_a_folder(places: dict[str, Path]) -> None:
    """A base with a Hub id needs a folder of its own; on this disk it may be written either way."""
    given = ("--base", places["BASE"].parent, "--base-subfolder", places["BASE"].name)
    succeed("verify-certificate", places["CERTIFIED"], *given)
    succeed("certify", places["CERTIFIED"], *given, *filled(QUICK, places), "--dry-run")
    options = CertifyOptions("hardened", base="org/b", base_subfolder="b/c/")
    assert (options.base, options.base_subfolder) == ("org/b", "b/c")


def test_a_certificate_is_found_by_the_directory_of_its_report(places: dict[str, Path]) -> None:
    for report in (places["ATTACK"], places["ATTACK"] / "report.json"):
        succeed("verify-certificate", places["CERTIFIED"], "--base", places["BASE"], "--attacks", report)


@pytest.mark.parametrize(
    "options",
    [
        (*FACTORS, "--seed", "-1", "--alpha", "1"),
        (*FACTORS, "--seed", str(10**40)),
        (*FOLD, "--max-shard-size", "0.001KB", "--device", "cpu:7", "--resume", "--revision", "v1"),
    ],
    ids=" ".join,
)
def test_odd_options_that_harden_takes(options: tuple[str, ...], llama: Path, tmp_path: Path) -> None:
    succeed("harden", llama, *options, "--out", tmp_path / "out")
    assert load_model(tmp_path / "out") is not None


# --- environments ----------------------------------------------------------------------------------------------------


def test_a_command_works_in_odd_surroundings(llama: Path, tmp_path: Path) -> None:
    surroundings: dict[str, Any] = {
        "HOME": "/nowhere/at/all", "HF_HOME": "/proc/nowhere", "TMPDIR": "/nowhere", "LC_ALL": "xx_XX", "LANG": "xx",
        "COLUMNS": "wide", "LINES": "0", "TERM": "dumb", "FORCE_COLOR": "1", "HF_TOKEN": "  ", "OMP_NUM_THREADS": "x",
        "ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "bf16", "TRANSFORMERS_VERBOSITY": "loud",
        "MASTER_ADDR": "nowhere", "MASTER_PORT": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0",
        "SPECDEF_DEBUG": "1",
    }  # fmt: skip
    with Path("/dev/full").open("w") as stdout:  # what is printed is lost, and what is written is not
        done = subprocess.run(
            command("harden", llama, *FOLD, "--out", tmp_path / "out"),
            env=environment(**surroundings), stdout=stdout, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert load_model(tmp_path / "out") is not None


UNFIT = {
    "a precision that accelerate has not": ("ACCELERATE_MIXED_PRECISION=half", (), "ACCELERATE_MIXED_PRECISION"),
    "docstrings stripped": ("PYTHONOPTIMIZE=2", (), "PYTHONOPTIMIZE"),
    "a current directory that is gone": ("", ("mkdir gone", "cd gone", "rmdir ../gone"), "current directory"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_environments_in_which_nothing_works(case: str, tmp_path: Path) -> None:
    """Told in two lines by whatever command, and the hint leads on."""
    setting, before, named = UNFIT[case]
    tried = " ".join(command("inspect", "./nowhere"))

    def run(*lines: str) -> Result:
        done = subprocess.run(
            ["bash", "-ec", "\n".join(lines)],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    refused = run(*before, f"{setting} {tried}")
    assert_refused(refused, named)
    advised = re.search(r"`(unset \w+)`", refused.stderr)
    leaving = [advised[1]] if advised else [f"cd {tmp_path}"]
    followed = run(*before, *([f"export {setting}"] if setting else []), *leaving, tried)
    assert_refused(followed, "./nowhere")


# --- names and files that are harmless --------------------------------------------------------------------------------

NAMES = ("-dash", "model@main", "x" * 200, "[bold]ünï 'a' 50%\t$HOME\nb")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names(name: str, llama: Path, tmp_path: Path) -> None:
    directory, out = tmp_path / "in" / name, tmp_path / "out" / name
    shutil.copytree(llama, directory)
    for arguments in (
        ("harden", directory, *FOLD, "--out", out),
        ("inspect", out, "--json"),
        ("collapse", out, "--quiet", "--out", tmp_path / "back" / name),
    ):
        succeed(*arguments)
    assert (tmp_path / "back" / name / "model.safetensors").is_file()


def test_a_name_that_is_not_utf_8(llama: Path, tmp_path: Path) -> None:
    """Neither JSON nor transformers can name such a directory: it may be read, and not written."""
    directory = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(llama, directory)
    succeed("harden", directory, *FOLD, "--no-verify", "--out", tmp_path / "out")
    assert read_manifest(tmp_path / "out").base.name.endswith("caf?")


def harmless(directory: Path) -> None:
    """Everything at once that is no part of the model, or that no command has to read."""
    file_in_place_of("README.md")(directory)
    for name, text in {
        "generation_config.json": "{", "modules.json": '[{"path": 5}, 7]', "model.safetensors.index.json": "[]",
        "a\nb.txt": "x", "[red]x[bold].txt": "x", os.fsdecode(b"caf\xe9.txt"): "x",
    }.items():  # fmt: skip
        (directory / name).write_text(text)
    for number in range(300):
        (directory / f"extra-{number}.bin").write_bytes(b"x")
    (directory / "sub").mkdir()
    (directory / "sub" / "x.safetensors").write_bytes(b"")
    os.mkfifo(directory / "fifo")
    (directory / "loop").symlink_to("loop")
    (directory / "up").symlink_to("..")
    deep = directory.joinpath(*["d"] * 60)
    deep.mkdir(parents=True)
    (deep / "x.txt").write_text("x")


def test_files_that_do_not_matter_do_no_harm(llama: Path, hardened: Path, text: Path, tmp_path: Path) -> None:
    plain = spoiled(llama, tmp_path / "plain", config(dtype=None, torch_dtype=None))
    succeed("harden", plain, *FOLD, "--dry-run")
    directory = spoiled(llama, tmp_path, harmless, config(dtype="float64", torch_dtype=None))
    spoilt = spoiled(hardened, tmp_path / "hardened", harmless)
    for arguments in (
        ("harden", directory, *FOLD, "--dry-run"),
        ("harden", directory, *FOLD, "--out", tmp_path / "out"),
        ("collapse", tmp_path / "out", "--out", tmp_path / "back", "--quiet"),
        ("inspect", directory, "--json"),
        ("attack", directory, "--control", directory, "--dataset", text, *SMALL, "--out", tmp_path / "attack"),
        ("certify", spoilt, "--base", directory, "--dry-run"),
    ):
        succeed(*arguments)
    assert load_model(tmp_path / "out") is not None


# --- directories ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "text"), [("adapter_config.json", "{}"), ("generation_config.json", "[]")])
def test_files_that_transformers_reads_with_the_weights(name: str, text: str, llama: Path, tmp_path: Path) -> None:
    directory = spoiled(llama, tmp_path, content(name, text))
    assert_refused(call_cli("harden", directory, *FOLD, "--dry-run"), "cannot be loaded")
    attack = ("attack", directory, "--control", directory, *SMALL, "--out", tmp_path / "out")
    assert_refused(call_cli(*attack), "cannot be loaded")


def test_a_layer_that_config_json_does_not_count_is_refused(llama: Path, tmp_path: Path) -> None:
    """Half of the weights would be published as they are."""
    model = spoiled(llama, tmp_path, config(num_hidden_layers=1))
    for refused in (
        ("harden", model, *FOLD, "--out", tmp_path / "out"),
        ("inspect", model),
        ("attack", model, "--control", llama, *SMALL, "--out", tmp_path / "attack"),
    ):
        assert_refused(call_cli(*refused), "model.layers.1", "fewer", "save_pretrained")
    load_model(model).save_pretrained(tmp_path / "saved")  # as the hint says
    assert call_cli("harden", tmp_path / "saved", *FOLD, "--dry-run").code == 0


def test_tensors_that_the_model_has_no_place_for_are_named(llama: Path, tmp_path: Path) -> None:
    """Such as heads for further tokens, which stand in a layer beyond the last and have more than a layer has."""
    model = spoiled(llama, tmp_path)
    tensors = load_file(model / "model.safetensors")
    beyond = {name.replace(".1.", ".2."): tensor.clone() for name, tensor in tensors.items() if ".layers.1." in name}
    more = {**tensors, **beyond, "model.layers.2.eh_proj.weight": torch.ones(2, 2), "mtp.fc.weight": torch.ones(2, 2)}
    save_file(more, model / "model.safetensors", {"format": "pt"})
    result = call_cli("harden", model, "--dry-run")
    assert result.code == 0, result.stderr
    assert f"copied unchanged and not hardened: {len(beyond) + 2} tensors" in result.stderr
    assert "copied unchanged" not in call_cli("harden", llama, "--dry-run").stderr


def test_names_with_escapes_do_not_reach_the_terminal(llama: Path, tmp_path: Path) -> None:
    model = spoiled(llama, tmp_path, content("a\x1b[2Jb.bin", "x"))
    results = (
        call_cli("harden", model, "--method", "fold", "--dry-run"),
        call_cli("harden", f"{tmp_path}/no\x1b[2J", "--dry-run"),
        call_cli("harden", model, "--method", "fold", "--out", model / "\x1b[2J"),
    )
    assert all("\\x1b[2J" in result.stderr for result in results)
    assert all("\x1b" not in result.stderr + result.stdout for result in results)


def test_memory_that_is_not_enough_is_two_lines(
    llama: Path, hardened: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch says of the machine and of a GPU, and Python of a list."""
    from specdef_cli.attack import train

    attack = ("attack", hardened, "--control", llama, "--dataset", text, *SMALL, "--out", tmp_path / "out")
    for error in (
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 12 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
    ):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(train, "make_trainer", fail)
        assert_refused(call_cli(*attack), "memory is not enough", "--batch-size", "--gradient-checkpointing")
    monkeypatch.undo()
    succeed(*attack, "--gradient-checkpointing", "--gradient-accumulation", "2")  # as the hint says


def test_every_file_has_the_permissions_that_the_umask_gives(llama: Path, tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        succeed("harden", llama, "--out", tmp_path / "out", "--no-verify", *FOLD)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o664}


# --- models: of two inputs, with layers that only look like linears, and whose outputs are not finite ----------------


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_model_of_two_inputs_is_verified_with_both(name: str, tmp_path: Path) -> None:
    model, out = write_kind(name, tmp_path / "model"), tmp_path / "out"
    result = succeed("harden", model, "--out", out, *FACTORS, "--json")
    assert 0 < json.loads(result.stdout)["manifest"]["verification"]["relative"] < 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_a_model_without_a_batch_is_refused_before_any_work(tmp_path: Path) -> None:
    model = write_kind("time series", tmp_path / "model")
    command = ("harden", model, "--out", tmp_path / "out", *FACTORS)
    before = snapshot(tmp_path)
    refused = call_cli(*command)
    assert_refused(refused, "TimeSeriesTransformerModel takes past_values", "--no-verify", "before you publish it")
    assert call_cli(*command, "--dry-run") == refused
    assert snapshot(tmp_path) == before


def test_a_linear_whose_weight_is_read_past_it_is_not_planned(tmp_path: Path) -> None:
    """nn.MultiheadAttention hands its out_proj's weight to a kernel."""
    model = write_kind("siglip vision", tmp_path / "model")
    command = ("harden", model, *FACTORS, "--layers", "*out_proj")
    plan = json.loads(call_cli(*command, "--dry-run", "--json").stdout)
    assert (plan["layers"], plan["changed"]) == (2, {"self_attn.out_proj": 2})
    succeed(*command, "--out", tmp_path / "out")
    assert load_model(tmp_path / "out") is not None
    assert_refused(call_cli(*command[:-1], "head.attention.out_proj", "--dry-run"), "matches no linear layer")


def test_layers_whose_weight_the_model_s_own_code_reads_are_left_out(tmp_path: Path) -> None:
    """Mamba multiplies by the weight of dt_proj itself; without it, an architecture that nobody described is kept."""
    model = write_kind("mamba", tmp_path / "model")
    command = ("harden", model, "--method", "scale", "--json", "--out", tmp_path / "out")
    result = succeed(*command)
    manifest = json.loads(result.stdout)["manifest"]
    assert manifest["verification"]["equal"]
    scaled = {module["module"].rpartition(".")[2] for module in manifest["scaled"]}
    assert "in_proj" in scaled
    assert "dt_proj" not in scaled


@pytest.mark.parametrize("verify", [(), ("--no-verify",)], ids=["verified", "not verified"])
def test_what_nobody_could_load_is_never_published(
    verify: tuple[str, ...], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the published config.json lists a layer that the files do not hold."""
    checked = opened.load_model

    def spoil_first(directory: Path, **arguments: Any) -> Any:
        path = directory / "config.json"
        data = json.loads(path.read_text())
        layers = data["quantization_config"]["layers"]
        layers["model.layers.0.self_attn.q_proj"] = dict(layers["model.layers.0.self_attn.o_proj"])
        path.write_text(json.dumps(data))
        return checked(directory, **arguments)

    monkeypatch.setattr(opened, "load_model", spoil_first)
    result = call_cli("harden", llama, "--out", tmp_path / "out", *FACTORS, *verify)
    assert_refused(result, "q_proj", empty=tmp_path)


def test_outputs_that_are_not_finite_have_a_message_of_their_own(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = verification._outputs

    def broken(load: Any, *arguments: Any) -> torch.Tensor:
        found = outputs(load, *arguments)
        return found if load.__self__.directory == llama else found * float("nan")

    monkeypatch.setattr(verification, "_outputs", broken)
    for method, words in (("factors", "smaller --alpha"), ("fold", "--method scale"), ("scale", "--method factors")):
        result = call_cli(
            "harden",
            llama,
            "--out",
            tmp_path / "out",
            "--method",
            method,
            "--quiet",
            *(FACTORS[2:] if method == "factors" else ()),
        )
        assert_refused(result, "NaN or infinity, and the base's do not", words, empty=tmp_path)
