"""Hints are instructions that work: each is followed here, and what was refused then goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from specdef_cli.attack.tasks import _CLASSES, task_of
from specdef_cli.checkpoint.reader import read_config
from specdef_cli.errors import SpecDefError
from tests.commands import assert_refused, call_cli, succeed
from tests.faults.small_attack import SMALL
from tests.hardening.mutations import config, edit_json, spoiled

FOLD = ("--method", "fold", "--quiet")


def harden(model: Path, out: Path, *options: str) -> Path:
    succeed("harden", model, "--out", out, *(options or FOLD))
    return out


@pytest.mark.parametrize("command", ["attack", "certify"])
def test_a_base_is_found_beside_the_hardened_directory(
    command: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`harden model` was run in one directory, and the command in another."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, "model")
    harden(Path("model"), Path("out") / "hardened")
    monkeypatch.chdir(tmp_path / "elsewhere")
    # What is refused now comes after the base was found.
    wrong = ("--dataset", "nowhere.txt", *SMALL) if command == "attack" else ("--text", "nowhere.txt", "--quiet")
    assert_refused(call_cli(command, "../out/hardened", *wrong, "--out", tmp_path / "r"), "nowhere.txt")


@pytest.mark.parametrize(("command", "option"), [("attack", "--control"), ("certify", "--base")])
def test_a_base_that_is_gone_is_named_by_the_commands_own_option(
    command: str, option: str, llama: Path, tmp_path: Path
) -> None:
    base = spoiled(llama, tmp_path)
    out = harden(base, tmp_path / "out")
    shutil.rmtree(base)
    refused = call_cli(command, out, "--quiet", "--out", tmp_path / "r")
    assert_refused(refused, f"./{base.name}", f"with {option}.")
    wrong = ("--dataset", "nowhere.txt", *SMALL) if command == "attack" else ("--text", "nowhere.txt", "--quiet")
    followed = call_cli(command, out, option, llama, *wrong, "--out", tmp_path / "r")
    assert_refused(followed, "nowhere.txt")


def test_a_task_that_is_advised_is_one_that_the_model_has(tmp_path: Path) -> None:
    """Whatever the type of model: each task in the hint has a class that transformers builds from this config."""
    for kind in ("llama", "t5", "bert", "vit", "siglip_vision_model", "whisper", "clip", "gpt2"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": ["NobodysModel"]}))
        with pytest.raises(SpecDefError) as caught:
            task_of(read_config(tmp_path), tmp_path, None)
        advised = caught.value.hint.partition("--task ")[2].rstrip(".")
        for task in filter(None, advised.split(" or ")):
            assert kind in _CLASSES[task][1]  # type: ignore[index]
        assert advised or "script of its own" in caught.value.hint


@pytest.mark.usefixtures("no_fresh_process")
def test_certify_of_a_classifier_leads_to_attack(tmp_path: Path, llama: Path) -> None:
    """Without a report certify says which attack makes one, with the options that this model needs."""
    torch.manual_seed(0)
    base = spoiled(llama, tmp_path)
    model_config = transformers.LlamaConfig.from_pretrained(base, num_labels=3, pad_token_id=0)
    transformers.LlamaForSequenceClassification(model_config).save_pretrained(base)
    out = harden(base, tmp_path / "out")
    quick = ("--formats", "none", "--no-curvature", "--no-card")
    alone = call_cli("certify", out, "--base", base, *quick, "--out", tmp_path / "alone")
    assert f"`specdef attack {out} --control {base} --dataset …`" in alone.stderr
    assert json.loads((tmp_path / "alone" / "certificate.json").read_text())["resistance"] is None
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join(json.dumps({"text": "w1 w2 w3 " * 5, "label": n % 3}) for n in range(60)))
    attack = ("attack", out, "--control", base, "--dataset", data, *SMALL, "--out", tmp_path / "a")
    assert_refused(call_cli(*attack), "neither padding nor an end of text", '"pad_token"', "tokenizer_config.json")
    edit_json("tokenizer_config.json", pad_token="w0")(base)
    succeed(*attack)
    more = ("--attacks", tmp_path / "a" / "report.json", *quick, "--quiet")
    certified = call_cli("certify", out, "--base", base, *more, "--out", tmp_path / "c")
    assert "Traceback" not in certified.stderr
    assert (tmp_path / "c" / "certificate.json").is_file(), certified.stderr


def merged(directory: Path, out: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    AutoPeftModelForCausalLM.from_pretrained(directory).merge_and_unload().save_pretrained(out)


def test_an_adapter_is_merged_as_the_hint_says(llama: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    lora: Any = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    refused = call_cli("harden", tmp_path / "adapter", *FOLD, "--out", tmp_path / "out")
    assert_refused(refused, f"adapter of PEFT for {llama}", f"from_pretrained('{tmp_path / 'adapter'}')")
    merged(tmp_path / "adapter", tmp_path / "merged")
    harden(tmp_path / "merged", tmp_path / "out")


def test_weights_under_another_name_are_renamed_as_the_hint_says(llama: Path, tmp_path: Path) -> None:
    directory = spoiled(llama, tmp_path)
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    assert_refused(call_cli("inspect", directory), "rename it to model.safetensors")
    (directory / "weights.safetensors").rename(directory / "model.safetensors")
    config(transformers_weights="model.safetensors")(directory)
    assert_refused(call_cli("inspect", directory), "take transformers_weights out")
    config(transformers_weights=None)(directory)
    succeed("inspect", directory, "--quiet")
