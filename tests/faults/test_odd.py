"""A hundred odd directories, configurations, names, command lines and environments, given to the commands.

Whatever they are: no traceback; a refusal in two lines that leaves nothing behind, or a result that holds; and never an
exit code of 1 for what was published.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from specdef_cli.model import load_model
from tests.commands import Result, assert_refused, call_cli, command, environment
from tests.faults.small_attack import SMALL, finished_runs
from tests.hardening.mutations import REMOVED, Mutation, config, content, edit_json, spoiled, tensor

FOLD = ("--method", "fold", "--quiet")
FACTORS = ("--method", "factors", "--top-k", "4", "--quiet")


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
HARDENINGS = (FOLD, FACTORS)


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


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names(name: str, llama: Path, tmp_path: Path) -> None:
    directory = tmp_path / "in" / name
    directory.parent.mkdir()
    shutil.copytree(llama, directory)
    out = tmp_path / "out" / name
    assert ends_well(call_cli("harden", directory, *FOLD, "--out", out), out)
    assert ends_well(call_cli("inspect", out, "--json"))
    assert ends_well(call_cli("collapse", out, "--quiet", "--out", tmp_path / "back" / name))


def test_a_name_that_is_not_utf_8(llama: Path, tmp_path: Path) -> None:
    directory = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    shutil.copytree(llama, directory)
    out = tmp_path / "out"
    ends_well(call_cli("harden", directory, *FOLD, "--out", out), out)
    ends_well(call_cli("inspect", directory))


# --- command lines ---------------------------------------------------------------------------------------------------

LINES: dict[str, tuple[str, ...]] = {
    "alpha a word": ("harden", "BASE", "--alpha", "ten"),
    "alpha tiny": ("harden", "BASE", *FACTORS, "--alpha", "1e-320"),
    "alpha 1": ("harden", "BASE", *FACTORS, "--alpha", "1"),
    "top-k negative": ("harden", "BASE", "--method", "factors", "--top-k", "-3"),
    "top-k huge": ("harden", "BASE", "--method", "factors", "--top-k", str(10**30)),
    "seed negative": ("harden", "BASE", *FACTORS, "--seed", "-1"),
    "seed huge": ("harden", "BASE", *FACTORS, "--seed", str(10**40)),
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
    "certify in an unknown format": ("certify", "HARDENED", "--base", "BASE", "--formats", "jpeg"),
    "certify on a device of no kind": ("certify", "HARDENED", "--base", "BASE", "--device", "quantum"),
    "certify against a base that is nowhere": ("certify", "HARDENED", "--base", "./nowhere"),
    "certify on text that is a directory": ("certify", "HARDENED", "--base", "BASE", "--text", "BASE"),
    "alpha beyond any number": ("harden", "BASE", *FACTORS, "--alpha", "1e400"),
    "alpha with a minus of Unicode": ("harden", "BASE", *FACTORS, "--alpha", "\u22125"),
    "alpha of a staircase": ("harden", "BASE", *FOLD, "--alpha", "100"),
    "top-k of a fold": ("harden", "BASE", *FOLD, "--top-k", "4"),
    "a gauge of a fold": ("harden", "BASE", *FOLD, "--gauge", "symmetric"),
    "globs that cancel": ("harden", "BASE", *FACTORS, "--layers", "*o_proj", "--exclude", "*o_proj"),
    "a dtype of integers": ("harden", "BASE", *FOLD, "--dtype", "int8"),
    "shards of 1e400": ("harden", "BASE", *FOLD, "--max-shard-size", "1e400GB"),
    "shards below nothing": ("harden", "BASE", *FOLD, "--max-shard-size", "-5GB"),
    "private without a place": ("harden", "BASE", *FOLD, "--private"),
    "a GPU that is hidden": ("harden", "BASE", *FOLD, "--device", "cuda:77"),
    "attack within no time": ("attack", "HARDENED", "--control", "BASE", "--time-limit", "0s"),
    "attack within a negative time": ("attack", "HARDENED", "--control", "BASE", "--time-limit", "-5m"),
    "attack within a number": ("attack", "HARDENED", "--control", "BASE", "--time-limit", "5"),
    "attack within longer than any time": ("attack", "HARDENED", "--control", "BASE", "--time-limit", "9" * 400 + "h"),
    "attack with a billion seeds": ("attack", "HARDENED", "--control", "BASE", "--seeds", str(10**9)),
    "attack at a rate beyond any": ("attack", "HARDENED", "--control", "BASE", "--lr", "1e400"),
    "attack at a rate with a minus of Unicode": ("attack", "HARDENED", "--control", "BASE", "--lr", "1e\u22123"),
    "attack with a decay of NaN": ("attack", "HARDENED", "--control", "BASE", "--weight-decay", "nan"),
    "attack by growth of NaN": ("attack", "HARDENED", "--control", "BASE", "--expand", "nanx"),
    "attack by growth to nothing": ("attack", "HARDENED", "--control", "BASE", "--expand", "0x"),
    "attack by growth in words": ("attack", "HARDENED", "--control", "BASE", "--variant", "width:two"),
    "attack by a rank of nothing": ("attack", "HARDENED", "--control", "BASE", "--training", "lora:0"),
    "attack by a rank that no memory holds": (
        "attack", "HARDENED", "--control", "BASE", *SMALL[2:], "--training", f"lora:{10**12}",
    ),
    "attack by adapters on nothing": ("attack", "HARDENED", "--control", "BASE", *SMALL[2:], "--training", "lora@no"),
    "attack on parameters of no name": ("attack", "HARDENED", "--control", "BASE", *SMALL[2:], "--training", "full@z*"),
    "attack on parameters of an empty name": ("attack", "HARDENED", "--control", "BASE", "--training", "full@"),
    "attack by a suite that is weights": (
        "attack", "HARDENED", "--control", "BASE", "--suite", "BASE/model.safetensors",
    ),
    "attack by a suite that is a config": ("attack", "HARDENED", "--control", "BASE", "--suite", "BASE/config.json"),
    "attack by a suite that is a directory": ("attack", "HARDENED", "--control", "BASE", "--suite", "BASE"),
    "attack that fails on NaN": ("attack", "HARDENED", "--control", "BASE", "--fail-if", "steps_to_control<nan"),
    "attack that fails on nothing": ("attack", "HARDENED", "--control", "BASE", "--fail-if", ""),
    "attack told to nobody": ("attack", "HARDENED", "--control", "BASE", "--report-to", "nobody"),
    "attack that retains what is nowhere": ("attack", "HARDENED", "--control", "BASE", "--retained", "nowhere.txt"),
    "attack on a configuration of a file": (
        "attack", "HARDENED", "--control", "BASE", "--dataset", "TEXT", *SMALL, "--dataset-config", "de",
    ),
    "attack on a split of a file": (
        "attack", "HARDENED", "--control", "BASE", "--dataset", "TEXT", *SMALL, "--dataset-split", "test",
    ),
    "attack on a column that is not there": (
        "attack", "HARDENED", "--control", "BASE", "--dataset", "TEXT", *SMALL, "--text-column", "no",
    ),
    "attack on sequences longer than all data": (
        "attack", "HARDENED", "--control", "BASE", "--dataset", "TEXT", *SMALL, "--sequence-length", str(10**12),
    ),
    "attack in batches larger than all data": (
        "attack", "HARDENED", "--control", "BASE", "--dataset", "TEXT", *SMALL, "--batch-size", str(10**12),
    ),
    "attack for a task that the model has not": ("attack", "HARDENED", "--control", "BASE", "--task", "seq2seq-lm"),
    "attack to the data": ("attack", "HARDENED", "--control", "BASE", "--dataset", "TEXT", "--out", "TEXT"),
    "attack into its model": ("attack", "HARDENED", "--control", "BASE", "--out", "HARDENED/attack"),
    "attack into its control": ("attack", "HARDENED", "--control", "BASE", "--out", "BASE/attack"),
    "attack that says so as JSON": ("attack", "./nowhere", "--control", "BASE", "--json"),
    "certify that says so as JSON": ("certify", "./nowhere", "--json"),
    "an output of too long a name": ("harden", "BASE", *FOLD, "--out", "x" * 300),
    "an output at the root": ("harden", "BASE", *FOLD, "--out", "/"),
    "an output of no name": ("harden", "BASE", *FOLD, "--out", ""),
    "an output that is a file": ("harden", "BASE", *FOLD, "--out", "TEXT"),
    "an output in the kernel's files": ("harden", "BASE", *FOLD, "--out", "/proc/out"),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_command_lines(
    case: str, llama: Path, hardened: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    places = {"BASE": str(llama), "HARDENED": str(hardened), "EMPTY": str(tmp_path / "empty"), "TEXT": str(text)}
    arguments = [LINES[case][0]]
    for argument in LINES[case][1:]:
        first, slash, rest = argument.partition("/")
        arguments.append(places.get(first, first) + slash + rest)
    out = tmp_path / "outside" / "out"
    more: tuple[Any, ...] = () if arguments[0] == "inspect" or "--out" in arguments else ("--out", out)
    result = call_cli(*arguments, *more)
    if arguments[0] in ("harden", "collapse"):
        ends_well(result, out)
    else:
        assert not ends_well(result)
        assert not out.exists()
    assert list((tmp_path / "work").iterdir()) == []
    assert text.read_text()
    assert not (llama / "attack").exists()
    assert not (hardened / "attack").exists()


def test_a_task_that_the_model_has_not_leads_to_one_that_it_has(tmp_path: Path) -> None:
    """T5 was told to check its files and the release of transformers."""
    from tests.attack.test_tasks import save

    for name, asked, advised in (
        ("t5", "causal-lm", "seq2seq-lm"),
        ("bert", "seq2seq-lm", "masked-lm"),
        ("llava", "seq2seq-lm", "causal-lm"),
        ("t5", "image-classification", "seq2seq-lm"),
    ):
        model = tmp_path / name
        if not model.exists():
            save(name, model)
        attack = ("attack", model, "--control", model, *SMALL, "--sequence-length", "32", "--out")
        refused = call_cli(*attack, tmp_path / "out", "--task", asked)
        assert_refused(refused, model.name, asked, "--task")
        assert advised in refused.stderr.split("--task ")[1]
        if asked != "image-classification":
            result = call_cli(*attack, tmp_path / f"{name} {asked}", "--task", advised)  # as the hint says
            assert result.code == 0, result.stderr


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
    "a token of blanks": {"HF_TOKEN": "  "},
    "no GPU": {"CUDA_VISIBLE_DEVICES": ""},
    "a narrow terminal": {"COLUMNS": "20"},
    "no colours": {"NO_COLOR": "1", "CLICOLOR": "0"},
    "a home of the Hub that is nowhere": {"HF_HOME": "/proc/nowhere"},
    "an unknown verbosity": {"TRANSFORMERS_VERBOSITY": "loud"},
    "threads in words": {"OMP_NUM_THREADS": "many"},
    "an address of processes alone": {"MASTER_ADDR": "nowhere", "MASTER_PORT": "1"},
    "a job of SLURM": {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"},
}


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


UNFIT = {
    "a precision that accelerate has not": ("ACCELERATE_MIXED_PRECISION=half", (), "ACCELERATE_MIXED_PRECISION"),
    "docstrings stripped": ("PYTHONOPTIMIZE=2", (), "PYTHONOPTIMIZE"),
    "a current directory that is gone": ("", ("mkdir gone", "cd gone", "rmdir ../gone"), "current directory"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_environments_in_which_nothing_works(case: str, llama: Path, tmp_path: Path) -> None:
    """Told in two lines by whatever command, and the hint leads on."""
    setting, before, named = UNFIT[case]
    tried = " ".join(command("harden", llama, *FOLD, "--out", tmp_path / "out"))

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
    assert not (tmp_path / "out").exists()
    advised = re.search(r"`(unset \w+)`", refused.stderr)
    leaving = [advised[1]] if advised else [f"cd {tmp_path}"]
    followed = run(*before, *([f"export {setting}"] if setting else []), *leaving, tried)
    assert followed.code == 0, followed.stderr


# --- configurations that only planning sees ---------------------------------------------------------------------------

GIT_LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
CONFIGS: dict[str, tuple[Mutation, str]] = {
    # What is refused, and a word of why.
    "no vocab_size": (edit_json("config.json", vocab_size=REMOVED), "config.json"),
    "no hidden_size": (edit_json("config.json", hidden_size=REMOVED), "config.json"),
    "no model_type": (edit_json("config.json", model_type=REMOVED), "model_type"),
    "a vocabulary too large": (config(vocab_size=200), "[200, 32]"),
    "a vocabulary in words": (config(vocab_size="96"), "vocab_size"),
    "a vocabulary below nothing": (config(vocab_size=-1), "config.json"),
    "a vocabulary with a fraction": (config(vocab_size=96.5), "vocab_size"),
    "a tie in words": (config(tie_word_embeddings="false"), "tie_word_embeddings"),
    "positions of an unknown kind": (config(rope_scaling={"type": "nonsense"}), "config.json"),
    "positions without their factor": (config(rope_parameters={"rope_type": "linear"}), "factor"),
    "a model of another in it": (config(text_config={"hidden_size": 32}), "config.json"),
    "quantized by nobody": (config(quantization_config={}), "quantization_config"),
    "quantized": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "gptq"),
    "quantized by a list": (config(quantization_config=[1]), "quantized"),
    "hardened, it says": (config(quantization_config={"quant_method": "specdef"}), "specdef"),
    "code that is not there": (config(auto_map={"AutoConfig": "a.B"}, model_type="xx"), "--trust-remote-code"),
    "an unknown type": (config(model_type="xx"), "xx"),
    "no type": (config(model_type=None), "model_type"),
    "several types": (config(model_type=["llama"]), "model_type"),
    "an activation of no name": (config(hidden_act="nonsense"), "nonsense"),
    "no heads": (config(num_attention_heads=0), "config.json"),
    "seven heads": (config(num_attention_heads=7), "heads"),
    "heads of an odd width": (config(head_dim=7), "head_dim"),
    "a layer too many": (config(num_hidden_layers=3), "layers.2"),
    "a billion layers": (config(num_hidden_layers=10**9), "num_hidden_layers 1000000000"),
    "hidden beyond any memory": (config(hidden_size=10**12), "1000000000000"),
    "an epsilon in words": (config(rms_norm_eps="1e-6"), "rms_norm_eps"),
    "padding beyond the vocabulary": (config(pad_token_id=1000), "config.json"),
    "classes of no number": (config(id2label={"a": "b"}), "config.json"),
    "a cache in words": (config(use_cache="yes"), "use_cache"),
    "biases that are not there": (config(attention_bias=True), "bias"),
    "an architecture with an escape": (config(architectures=["Ll\x1b[31mama"]), "x1b[31m"),
    "a config in gzip": (lambda place: _gzip(place / "config.json"), "not valid JSON"),
    "weights in gzip": (lambda place: _gzip(place / "model.safetensors"), "not a valid safetensors file"),
    "weights that are a page": (content("model.safetensors", "<html>404</html>"), "not a valid safetensors file"),
    "weights cloned without Git LFS": (content("model.safetensors", GIT_LFS), "git lfs pull"),
    "a config cloned without Git LFS": (content("config.json", GIT_LFS), "git lfs pull"),
    "weights with a scalar": (tensor("model.norm.weight", lambda weight: weight[0]), "model.norm.weight"),
    "an attention kernel that is not here": (config(attn_implementation="flash_attention_2"), "flash_attention_2"),
    "an attention kernel of no name": (config(attn_implementation="nonsense"), "attn_implementation"),
    "an attention kernel of the Hub": (config(_attn_implementation="kernels-community/x"), "kernels-community/x"),
}


def _gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes()))


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_are_refused_before_the_work(
    case: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a dry run, and by an attack before it trains."""
    from specdef_cli.attack import run

    mutation, word = CONFIGS[case]
    directory = spoiled(llama, tmp_path, mutation)
    monkeypatch.setattr(run, "train_run", None)
    assert_refused(call_cli("harden", directory, *FOLD, "--dry-run"), word)
    attack = ("attack", directory, "--control", directory, *SMALL, "--out", tmp_path / "out")
    assert_refused(call_cli(*attack), word)
    assert not (tmp_path / "out").exists()


def test_an_attention_kernel_is_taken_out_as_the_hint_says(llama: Path, tmp_path: Path) -> None:
    model = spoiled(llama, tmp_path, config(attn_implementation="flash_attention_2"))
    harden = ("harden", model, *FOLD, "--no-verify", "--out", tmp_path / "out")
    assert_refused(call_cli(*harden), "take attn_implementation out of config.json")
    edit_json("config.json", attn_implementation=REMOVED)(model)
    assert ends_well(call_cli(*harden), tmp_path / "out")


def test_a_tokenizer_cloned_without_git_lfs(llama: Path, tmp_path: Path) -> None:
    model = spoiled(llama, tmp_path, content("tokenizer.json", GIT_LFS))
    attack = ("attack", model, "--control", model, *SMALL, "--out", tmp_path / "out")
    assert_refused(call_cli(*attack), "tokenizer.json", "git lfs pull")


def test_layers_that_config_json_has_no_place_for_are_named(llama: Path, tmp_path: Path) -> None:
    """Half of the weights would stay as they are, and nobody would know."""
    model = spoiled(llama, tmp_path, config(num_hidden_layers=1))
    result = call_cli("harden", model, "--method", "fold", "--dry-run")
    assert result.code == 0
    assert "Not part of the model that config.json describes" in result.stderr
    assert "9 tensors, model.layers.1." in result.stderr
    assert "Not part of" not in call_cli("harden", llama, "--method", "fold", "--dry-run").stderr


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
    from specdef_cli.attack import run

    attack = ("attack", hardened, "--control", llama, "--dataset", text, *SMALL, "--out", tmp_path / "out")
    for error in (
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 12 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
    ):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(run, "train_run", fail)
        assert_refused(call_cli(*attack), "memory is not enough", "--batch-size", "--gradient-checkpointing")
    monkeypatch.undo()
    followed = call_cli(*attack, "--gradient-checkpointing", "--gradient-accumulation", "2")  # as the hint says
    assert followed.code == 0, followed.stderr


def test_every_file_has_the_permissions_that_the_umask_gives(llama: Path, tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        assert call_cli("harden", llama, "--out", tmp_path / "out", "--no-verify", *FOLD).code == 0
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o664}
