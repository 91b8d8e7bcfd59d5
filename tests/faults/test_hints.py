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
from tests.attack.test_tasks import save
from tests.commands import assert_refused, call_cli, succeed
from tests.faults.small_attack import SMALL
from tests.hardening.mutations import REMOVED, config, edit_json, spoiled

FOLD = ("--method", "fold", "--quiet")
FACTORS = ("--method", "factors", "--top-k", "4")


def harden(model: Path, out: Path, *options: str) -> Path:
    succeed("harden", model, "--out", out, *(options or FOLD))
    return out


# What is refused after the base was found.
WRONG: dict[str, tuple[str, ...]] = {
    "attack": ("--dataset", "nowhere.txt", *SMALL), "certify": ("--text", "nowhere.txt", "--quiet"),
}  # fmt: skip


@pytest.mark.parametrize(("command", "option"), [("attack", "--control"), ("certify", "--base")])
def test_a_base_is_found_beside_the_hardened_directory_or_asked_for(
    command: str, option: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`harden model` was run in one directory, and the command in another."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, "model")
    harden(Path("model"), Path("out") / "hardened")
    monkeypatch.chdir(tmp_path / "elsewhere")
    run: tuple[str | Path, ...] = (command, "../out/hardened", "--out", tmp_path / "r", *WRONG[command])
    assert_refused(call_cli(*run), "nowhere.txt")
    shutil.rmtree(tmp_path / "model")
    assert_refused(call_cli(*run), "./model", f"with {option}.")
    assert_refused(call_cli(*run, option, llama), "nowhere.txt")


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


def test_an_adapter_is_merged_as_the_hint_says(llama: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    lora: Any = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    refused = call_cli("harden", tmp_path / "adapter", *FOLD, "--out", tmp_path / "out")
    assert_refused(refused, f"adapter of PEFT for {llama}", f"from_pretrained('{tmp_path / 'adapter'}')")
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
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


def test_a_task_that_the_model_has_not_leads_to_one_that_it_has(tmp_path: Path) -> None:
    """T5 was told to check its files and the release of transformers."""
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
            succeed(*attack, tmp_path / f"{name} {asked}", "--task", advised)  # as the hint says


def test_an_attention_kernel_is_taken_out_as_the_hint_says(llama: Path, tmp_path: Path) -> None:
    model = spoiled(llama, tmp_path, config(attn_implementation="flash_attention_2"))
    harden = ("harden", model, *FOLD, "--no-verify", "--out", tmp_path / "out")
    assert_refused(call_cli(*harden), "take attn_implementation out of config.json")
    edit_json("config.json", attn_implementation=REMOVED)(model)
    succeed(*harden)


IN_CONFIG = "in which config.json has the model loaded"
# The type that config.json names, the method, what is said, and what the hint advises.
LOADED: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], tuple[tuple[str, str], ...]]] = {
    "a fold in float16": (
        "float16", ("--method", "fold"), ("float16", "--dtype bfloat16 or float32"),
        (("--dtype", "bfloat16"), ("--dtype", "float32")),
    ),
    "factors in float16": (
        "float16", FACTORS, (f"float16, {IN_CONFIG}", "--alpha 100", "--dtype bfloat16"),
        (("--alpha", "100"), ("--dtype", "bfloat16")),
    ),
    "the symmetric gauge in bfloat16": (
        "bfloat16", (*FACTORS, "--gauge", "symmetric"), (f"bfloat16, {IN_CONFIG}", "--dtype float32"),
        (("--dtype", "float32"),),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOADED)
def test_what_is_loaded_in_another_dtype(case: str, llama: Path, tmp_path: Path) -> None:
    dtype, method, words, advice = LOADED[case]
    model = spoiled(llama, tmp_path, config(torch_dtype=dtype, dtype=dtype))
    command: tuple[str | Path, ...] = ("harden", model, *method, "--quiet", "--out")
    for more in ((), ("--dry-run",), ("--no-verify",)):
        assert_refused(call_cli(*command, tmp_path / "no", *more), *words)
    for option, value in advice:
        succeed(*command, tmp_path / value, option, value)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / value, dtype="auto")
        assert loaded(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
        assert option != "--dtype" or str(loaded.dtype) == f"torch.{value}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_alpha_beyond_the_range_is_not_told_to_use_what_it_uses(dtype: str, llama: Path, tmp_path: Path) -> None:
    command = ("harden", llama, *FACTORS, "--dtype", dtype, "--quiet", "--out", tmp_path / "out", "--alpha")
    refused = call_cli(*command, "1e40")
    assert_refused(refused, f"1e+40 would break the function in {dtype}", "--alpha", empty=tmp_path)
    assert "--dtype" not in refused.stderr
    advised = refused.stderr.split("--alpha ")[1].split()[0]
    succeed(*command, advised)
