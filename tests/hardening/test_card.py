"""The model card: front matter that the Hub reads, and no path of this machine."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from specdef_cli.checkpoint.files import DIFFUSERS, TRANSFORMERS
from specdef_cli.checkpoint.manifest import BaseCheckpoint, Manifest, read_manifest
from specdef_cli.checkpoint.resolve import base_of, remember_base
from specdef_cli.hardening.card import (
    RESISTANCE,
    collapsed_card,
    collapsed_metadata,
    hardened_card,
    hardened_metadata,
    metadata,
    read_card,
    split_card,
    with_keys,
)
from tests.commands import REPOSITORY, assert_refused, call_cli, succeed

MANIFEST = Manifest(
    format=2, specdef_version="1", method="fold", base=BaseCheckpoint("name"), dtype="float32", seed=0,
)  # fmt: skip


def card_data(directory: Path) -> Any:
    return ModelCard.load(directory / "README.md").data.to_dict()


def test_a_directory_leaves_no_path_in_its_card(llama: Path, tmp_path: Path) -> None:
    succeed("harden", llama, "--out", tmp_path / "out", "--no-verify")
    card = (tmp_path / "out/README.md").read_text()
    assert str(llama.parent) not in card
    assert llama.name not in card
    assert "the base model" in card
    assert "may diverge at usual learning rates" in card, "whoever fine-tunes it in good faith reads it here"
    data = {"license": "mit", "tags": ["tiny", "specdef"], "library_name": "transformers"}
    assert card_data(tmp_path / "out") == data


def test_base_model_names_where_a_directory_is_on_the_hub(llama: Path, tmp_path: Path) -> None:
    options = ("--no-verify", "--base-model", "org/base")
    succeed("harden", llama, "--out", tmp_path / "out", *options)
    data = card_data(tmp_path / "out")
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "finetune")
    assert "org/base" in (tmp_path / "out/README.md").read_text().split("---\n")[2]
    manifest = read_manifest(tmp_path / "out")
    assert manifest.base.hub_id == "org/base"
    assert manifest == manifest.published()
    assert manifest.base.name == "org/base"
    assert base_of(manifest, tmp_path / "out") == (str(llama), None)

    succeed("collapse", tmp_path / "out", "--out", tmp_path / "back")
    assert card_data(tmp_path / "back") == {"license": "mit", "tags": ["tiny"], "library_name": "transformers"}
    refused = call_cli("harden", llama, "--out", tmp_path / "no", "--base-model", "/home/me/base")
    assert_refused(refused, "--base-model", "org/name", code=2)


def test_a_base_is_found_again_and_is_no_other_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    base, manifest = tmp_path / "far" / "gpt2", replace(MANIFEST, base=BaseCheckpoint("gpt2"))
    assert base_of(manifest, tmp_path / "out") == ("./gpt2", None)  # the Hub has a model of this name
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    remember_base(manifest, base)
    assert base_of(manifest, tmp_path / "out") == (str(base), None)
    assert base_of(replace(manifest, seed=1), tmp_path / "out") == ("./gpt2", None)
    assert base_of(replace(manifest, seed=1), tmp_path / "far" / "out") == (str(base), None)
    shutil.rmtree(base)
    assert base_of(manifest, tmp_path / "out") == ("./gpt2", None)
    monkeypatch.chdir(tmp_path / "far")
    assert BaseCheckpoint(".").public_name == "far"
    assert BaseCheckpoint("../far/..").public_name == tmp_path.name


def test_metadata_of_every_kind_of_base() -> None:
    hub, directory = BaseCheckpoint("org/name", "main", "a" * 40), BaseCheckpoint("/models/name")
    said = "license: llama3 # ours\ntags: one\nbase_model:\n- org/older\nlibrary_name: peft"
    found = with_keys(said, hardened_metadata(metadata(said), hub, TRANSFORMERS))
    assert found == (
        "license: llama3 # ours\ntags:\n- one\n- specdef\nbase_model: org/name\nlibrary_name: peft\n"
        "base_model_relation: finetune"
    )
    assert with_keys(found, hardened_metadata(metadata(found), hub, TRANSFORMERS)) == found
    assert with_keys("", hardened_metadata({}, directory, DIFFUSERS)) == "tags:\n- specdef\nlibrary_name: diffusers"
    back = with_keys(found, collapsed_metadata(metadata(found), hub))
    assert back == "license: llama3 # ours\ntags:\n- one\nlibrary_name: peft"
    assert with_keys("tags: [specdef]", collapsed_metadata({"tags": ["specdef"]}, directory)) == ""


PLAIN = "license: cc-by-nc-4.0\nlanguage: [no, en]\ntags: [on, a]\nmodel-index:\n- results: broken\ntitle: ü\n"


@pytest.mark.parametrize(
    "data",
    [
        f"---\n{PLAIN}---\n# Body ü".encode(),
        f"---\n{PLAIN}---\n# Body ü".encode("utf-8-sig"),
        f"---\n{PLAIN}---\n# Body ü".encode("utf-16"),
        f"---\n{PLAIN}---\n# Body ü".encode("cp1252"),
        f"---\n{PLAIN}---\n# Body ü".replace("\n", "\r\n").encode(),
        f"\n---  \n{PLAIN}\n---\n\n# Body ü\n\n## SpecDef\n\nan older section\n".encode(),
    ],
    ids=["plain", "a mark", "UTF-16", "Windows", "CRLF", "blank lines and an old section"],
)
def test_a_card_keeps_every_key_and_word(data: bytes, tmp_path: Path) -> None:
    """The licence, Norwegian, and results that huggingface_hub would refuse."""
    (tmp_path / "README.md").write_bytes(data)
    card = hardened_card(read_card(tmp_path / "README.md"), MANIFEST, ())
    expected = PLAIN.replace("tags: [on, a]", "tags:\n- 'on'\n- a\n- specdef")
    assert card.startswith(f"---\n{expected}library_name: transformers\n---\n\n# Body ü\n\n## SpecDef\n")
    assert card.count("## SpecDef") == 1
    back = collapsed_card(card, MANIFEST)
    assert back == "---\n" + expected.replace("- specdef\n", "") + "library_name: transformers\n---\n\n# Body ü\n"


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: mit\ntitle: a: b\nlanguage: en\n", "license: mit\n# title: a: b\nlanguage: en\n"),
        ("{license: mit, tags: [a]}\n", "license: mit\ntags:\n- a\n"),
        ("# a comment\n", "# a comment\n"),
        ("tags:\n- a # first\n# the licence\nlicense: |\n  mit\n\n", "tags:\n- a\n# the licence\nlicense: |\n  mit\n"),
        ("tags: tiny\n", "tags:\n- tiny\n- specdef\n"),
        ("", ""),
    ],
)
def test_front_matter_of_any_kind_stays_front_matter(front: str, expected: str) -> None:
    card = hardened_card(f"---\n{front}---\ntext\n", MANIFEST, ())
    found, body = split_card(card)
    assert yaml.safe_load(found)["tags"][-1] == "specdef"
    for line in expected.splitlines():
        assert line in found.splitlines()
    assert body.startswith("\ntext\n\n## SpecDef\n")


@pytest.mark.parametrize("between", ["between two rules", "- a", "[a: {"])
def test_text_that_is_no_front_matter_and_sections_of_others_stay(between: str) -> None:
    text = f"---\n{between}\n---\n\n## SpecDefense\n\nmine"
    card = hardened_card(text, MANIFEST, ())
    assert text in card
    assert collapsed_card(card + "\n# Appendix\n", MANIFEST).endswith(f"{text}\n\n# Appendix\n")


@pytest.mark.parametrize("way", RESISTANCE)
def test_the_card_quotes_the_tables(way: str) -> None:
    asked = (
        ("smollm2-135m-instruct", "full fine-tuning"),
        ("smollm2-135m-instruct", "LoRA on every linear"),
        ("gemma-3-270m", "full fine-tuning"),
    )
    assert RESISTANCE[way] == tuple(share_in_tables(model, attack, way) for model, attack in asked)


def share_in_tables(model: str, attack: str, way: str) -> int:
    """Percent of the base's progress, as docs/tables has it."""
    tables = REPOSITORY / "docs/tables"
    text = (tables / f"attack-{model}.md").read_text()
    column = f"{model}-{'fold' if way == 'float16-cache' else way}"
    if way in ("quantizable", "gguf"):
        text, column = (tables / "serving.md").read_text().split(f"### {model}")[1].split("### ")[0], way
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    head = next(row for row in rows if row[0] == "attack")
    cell = next(row for row in rows if row[0] == attack)[head.index(column)]
    return min(100, int(cell.split(" %")[0]))  # more is noise
