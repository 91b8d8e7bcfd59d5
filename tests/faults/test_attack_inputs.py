"""What cannot be attacked or certified is refused in one line with one hint, before anything is trained or written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Result, assert_refused, call_cli, snapshot, succeed
from tests.faults.small_attack import SMALL, finished_runs
from tests.hardening.mutations import (
    DOWN,
    GIT_LFS,
    REMOVED,
    Mutation,
    content,
    edit_json,
    element,
    spoiled,
    tensor,
)
from tests.hardening.test_refusals import INPUTS

INFLATED = "model.layers.0.mlp.down_proj.inflated.weight"


# Where an attack says something else than `harden` of the same directory; all else is told at the door that both open.
BROKEN = {"NaN": "the control", "NaN elsewhere": "the control", "hardened already": "specdef.json"}


@pytest.mark.parametrize("name", [*BROKEN, "code of its own", "a billion layers"])
def test_a_broken_base_is_not_attacked(name: str, llama: Path, tmp_path: Path, outside: Path) -> None:
    mutation, words = INPUTS[name]
    directory = spoiled(llama, tmp_path, mutation, content("evil.py", "raise SystemExit('code was run')"))
    before = snapshot(directory)
    result = call_cli("attack", directory, "--control", directory, *SMALL, "--out", outside / "out")
    assert_refused(result, *((BROKEN[name],) if name in BROKEN else words))
    assert finished_runs(outside / "out") == {}
    assert {path.name for path in outside.rglob("*")} <= {"out", "runs"}
    assert "code was run" not in result.stderr
    assert snapshot(directory) == before


# What `collapse` and `inspect` refuse at the same door is in test_refusals.
HARDENED: dict[str, tuple[Mutation, tuple[str, ...]]] = {
    "manifest gone, and the list of layers": (
        lambda directory: (
            (directory / "specdef.json").unlink() or edit_json("config.json", quantization_config=REMOVED)(directory)
        ),
        ("config.json", "quantization_config.layers"),
    ),
    "manifest gone, and a layer": (
        lambda directory: (directory / "specdef.json").unlink() or tensor(INFLATED, None)(directory),
        (INFLATED, "missing"),
    ),
    "weights behind a link": (
        lambda directory: (
            (directory / "model.safetensors").rename(directory.parent / "elsewhere.safetensors")
            and (directory / "model.safetensors").symlink_to(directory.parent / "elsewhere.safetensors")
        ),
        ("model.safetensors is a link that leaves",),
    ),
}


def measured(command: str, model: Path, base: Path, text: Path, out: Path) -> Result:
    """Attack or certify a model, as it was hardened from a base, on a text."""
    if command == "attack":
        return call_cli(command, model, "--control", base, "--dataset", text, *SMALL, "--out", out)
    return call_cli(command, model, "--base", base, "--text", text, "--quiet", "--out", out)


@pytest.mark.parametrize("command", ["attack", "certify"])
@pytest.mark.parametrize("name", HARDENED)
def test_a_damaged_hardened_directory(
    name: str, command: str, hardened: Path, llama: Path, text: Path, tmp_path: Path, outside: Path
) -> None:
    mutation, words = HARDENED[name]
    result = measured(command, spoiled(hardened, tmp_path, mutation), llama, text, outside / "out")
    if command == "certify" and name.startswith("manifest gone"):
        words = ("specdef.json",)
    assert_refused(result, *words, empty=outside)


def unknown_tokens(directory: Path) -> None:
    """Give the tokenizer a vocabulary that the model has no embedding for."""
    path = directory / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"] = {word: number + 500 * bool(number) for word, number in data["model"]["vocab"].items()}
    path.write_text(json.dumps(data))


TOKENIZERS: dict[str, tuple[Mutation, tuple[str, ...]]] = {
    "cloned without Git LFS": (content("tokenizer.json", GIT_LFS), ("tokenizer.json", "git lfs pull")),
    "of another model": (unknown_tokens, ("tokenizer", "token id 5", "vocabulary of 96")),
    "not JSON": (content("tokenizer.json", "{"), ("tokenizer", "cannot be loaded")),
    "of another shape": (content("tokenizer.json", '{"model": 3}'), ("tokenizer", "cannot be loaded")),
    "without files": (
        lambda directory: [path.unlink() for path in directory.glob("tokenizer*")] and None,
        ("no tokenizer",),
    ),
}


@pytest.mark.parametrize("command", ["attack", "certify"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_does_not_fit(
    name: str, command: str, hardened: Path, llama: Path, text: Path, tmp_path: Path, outside: Path
) -> None:
    mutation, words = TOKENIZERS[name]
    result = measured(command, hardened, spoiled(llama, tmp_path, mutation), text, outside / "out")
    assert_refused(result, *words, empty=outside)


def lines(*rows: Any) -> str:
    return "\n".join(json.dumps(row) for row in rows)


WORDS = "w1 w2 w3 w4 " * 20
DATA: dict[str, tuple[str, bytes | str, tuple[str, ...], tuple[str, ...]]] = {
    "empty text": ("d.txt", "", (), ("d.txt", "no rows")),
    "empty JSONL": ("d.jsonl", "", (), ("d.jsonl", "no rows")),
    "blank lines": ("d.jsonl", "\n\n", (), ("d.jsonl",)),
    "no column": (
        "d.jsonl", lines(*[{"body": WORDS}] * 30), (), ("no column 'text'", "body", "messages", "--text-column"),
    ),
    "numbers": ("d.jsonl", lines(*[{"text": 5}] * 30), (), ("'text'", "int", "--text-column")),
    "lists": ("d.jsonl", lines(*[{"text": ["w1"]}] * 30), (), ("'text'", "list", "--text-column")),
    "only null": ("d.jsonl", lines(*[{"text": None}] * 30), (), ("0 sequences",)),
    "empty strings": ("d.jsonl", lines(*[{"text": ""}] * 30), (), ("0 sequences",)),
    "broken JSONL": ("d.jsonl", '{"text": "w1"\n{"', (), ("d.jsonl", "JSON")),
    "broken further down": ("d.jsonl", lines(*[{"text": WORDS}] * 200) + "\n{broken", (), ("d.jsonl", "row 200")),
    "no parquet": ("d.parquet", bytes(100), (), ("d.parquet",)),
    "no UTF-8": ("d.txt", bytes(range(256)), (), ("d.txt", "utf-8")),
    "an unknown kind": ("d.exe", "x", (), ("d.exe", ".jsonl")),
    "labels that are none": (
        "d.jsonl", lines(*[{"text": WORDS, "label": None}] * 30), ("--task", "sequence-classification"), ("'label'",),
    ),
    "labels that are identifiers": (
        "d.jsonl", lines(*[{"text": WORDS, "label": 10**9}] * 30), ("--task", "sequence-classification"),
        ("1000000000", "--label-column"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_data_that_cannot_be_trained_on(name: str, llama: Path, tmp_path: Path, outside: Path) -> None:
    file, written, options, words = DATA[name]
    path = tmp_path / file
    path.write_bytes(written if isinstance(written, bytes) else written.encode())
    result = call_cli("attack", llama, "--control", llama, *SMALL, *options, "--dataset", path, "--out", outside / "o")
    assert_refused(result, *words, empty=outside)


def test_a_sequence_beyond_the_models_positions(tiny_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    gpt2 = tiny_model("gpt2")
    options = ("--control", gpt2, "--dataset", text, *SMALL, "--sequence-length", "100")
    assert_refused(call_cli("attack", gpt2, *options, "--out", tmp_path / "out"), "100 tokens", "--sequence-length")
    assert finished_runs(tmp_path / "out") == {}
    long, short = tmp_path / "long.txt", tmp_path / "short.txt"
    long.write_text("w1 w2\n" + "w3 " * 33)
    short.write_text("w5\nw6 w7\n")
    edits: list[str | Path] = [*options[:4], *SMALL, "--training", "none", "--variant", "abliterate:1"]
    edits += ["--out", tmp_path / "out", "--prompts-harmless", short]
    refused = call_cli("attack", gpt2, *edits, "--prompts", long)
    assert_refused(refused, "33 tokens", "64 positions", "at most 32 tokens")
    long.write_text("w1 w2\n" + "w3 " * 32)
    assert call_cli("attack", gpt2, *edits, "--prompts", long).code == 0


# --- certify ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_fresh_process")
def test_weights_that_became_nan_fail_the_certificate(hardened: Path, llama: Path, text: Path, tmp_path: Path) -> None:
    directory = spoiled(hardened, tmp_path, tensor(INFLATED, element(math.nan)))
    options = ("--text", text, "--formats", "none", "--no-curvature", "--no-card", "--json")
    result = call_cli("certify", directory, "--base", llama, *options, "--out", tmp_path / "out")
    assert "Traceback" not in result.stderr, result.stderr
    assert result.code == 1
    verdicts = {claim["name"]: claim["holds"] for claim in json.loads(result.stdout)["claims"]}
    assert verdicts == {"function": False, "spectrum": False, "curvature": None}


@pytest.mark.slow
def test_weights_of_low_rank_are_certified(llama: Path, text: Path, tmp_path: Path) -> None:
    """Singular values that are rounding alone are not held against the checkpoint."""
    base = spoiled(llama, tmp_path, tensor(DOWN, lambda weight: weight[:, :1] @ weight[:1]))
    out = tmp_path / "hardened"
    hardening = ("--method", "factors", "--top-k", "8", "--no-verify", "--quiet")
    succeed("harden", base, "--out", out, *hardening)
    succeed("attack", out, "--control", base, *SMALL, "--out", tmp_path / "attack")
    options = ("--attacks", tmp_path / "attack" / "report.json", "--text", text, "--formats", "none", "--no-curvature")
    result = call_cli("certify", out, "--base", base, *options, "--json", "--out", tmp_path / "certificate")
    assert {claim["name"]: claim["holds"] for claim in json.loads(result.stdout)["claims"]}["spectrum"] is True
