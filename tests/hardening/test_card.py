"""The model card: front matter that the Hub reads, and no path of this machine."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from specdef_cli.checkpoint.library import DIFFUSERS, TRANSFORMERS
from specdef_cli.checkpoint.manifest import BaseCheckpoint, base_of, read_manifest
from specdef_cli.hardening.card_metadata import collapsed_metadata, hardened_metadata
from tests.commands import assert_refused, call_cli


def card_data(directory: Path) -> dict[str, object]:
    data: dict[str, object] = ModelCard.load(directory / "README.md").data.to_dict()
    return data


def test_a_directory_leaves_no_path_in_its_card(llama: Path, tmp_path: Path) -> None:
    assert call_cli("harden", llama, "--out", tmp_path / "out", "--no-verify").code == 0
    card = (tmp_path / "out/README.md").read_text()
    assert str(llama.parent) not in card
    assert llama.name not in card
    assert "the base model" in card
    assert "diverge or make little progress at their usual ones" in card, (
        "whoever fine-tunes it in good faith reads it here"
    )
    assert card_data(tmp_path / "out") == {
        "license": "mit",
        "tags": ["tiny", "specdef"],
        "library_name": "transformers",
    }


def test_base_model_names_where_a_directory_is_on_the_hub(llama: Path, tmp_path: Path) -> None:
    options = ("--no-verify", "--base-model", "org/base")
    assert call_cli("harden", llama, "--out", tmp_path / "out", *options).code == 0
    data = card_data(tmp_path / "out")
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "finetune")
    assert "org/base" in (tmp_path / "out/README.md").read_text().split("---\n")[2]
    manifest = read_manifest(tmp_path / "out")
    assert manifest.base.hub_id == "org/base"
    assert manifest.published().base.name == "org/base"
    assert base_of(manifest, tmp_path / "out") == (str(llama), None)

    assert call_cli("collapse", tmp_path / "out", "--out", tmp_path / "back").code == 0
    assert card_data(tmp_path / "back") == {"license": "mit", "tags": ["tiny"], "library_name": "transformers"}
    assert_refused(
        call_cli("harden", llama, "--out", tmp_path / "no", "--base-model", "/home/me/base"), "--base-model", "org/name"
    )


def test_metadata_of_every_kind_of_base() -> None:
    hub, directory = BaseCheckpoint("org/name", "main", "a" * 40), BaseCheckpoint("/models/name")
    said = {"license": "llama3", "tags": "one", "base_model": "org/older", "library_name": "peft"}
    found = hardened_metadata(said, hub, TRANSFORMERS)
    assert found == {
        "license": "llama3",
        "tags": ["one", "specdef"],
        "base_model": "org/name",
        "base_model_relation": "finetune",
        "library_name": "peft",
    }
    assert hardened_metadata(found, hub, TRANSFORMERS) == found
    assert hardened_metadata({}, directory, DIFFUSERS) == {"tags": ["specdef"], "library_name": "diffusers"}
    assert collapsed_metadata(found, hub) == {"license": "llama3", "tags": ["one"], "library_name": "peft"}
    assert collapsed_metadata({"tags": ["specdef"]}, directory) == {}
    assert said["tags"] == "one"
    assert ModelCardData(**found).to_yaml()
    assert json.dumps(found)
