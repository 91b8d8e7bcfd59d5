"""Every kind of model is trained for what it is: tiny random ones, from a directory to a loss that falls."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from specdef_cli import AttackOptions
from specdef_cli.attack.run import plan_attack
from specdef_cli.attack.target import Head, Task
from specdef_cli.attack.tasks import task_of
from specdef_cli.attack.train import load_for_training
from specdef_cli.attack.variants import Variant
from specdef_cli.checkpoint.reader import read_config
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.options import Construction, Factors, Fold
from specdef_cli.model.opened import open_model
from tests.attack.conftest import learned, load, train_run
from tests.attack.test_data_forms import ENDING, MASKING
from tests.byte_tokenizer import byte_tokenizer
from tests.commands import refusal
from tests.hardened import harden_to
from tests.runs import spec

TEXT = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4}
DECODER = {**TEXT, "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 256, "pad_token_id": 257}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


# The class, the arguments of its config, the tokenizer and the task.
MODELS: dict[str, tuple[str, dict[str, Any], PreTrainedTokenizerFast, Task]] = {
    "t5": ("T5ForConditionalGeneration", {
        "vocab_size": 264, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 257, "pad_token_id": 257, "eos_token_id": 256,
    }, ENDING, "seq2seq-lm"),
    "bert": ("BertForMaskedLM", {**TEXT, "pad_token_id": 257}, MASKING, "masked-lm"),
    "llava": ("LlavaForConditionalGeneration", {
        "text_config": {"model_type": "llama", **DECODER}, "image_token_id": 260,
        "vision_config": {"model_type": "clip_vision_model", **VISION},
    }, byte_tokenizer(), "causal-lm"),
    "qwen2-vl": ("Qwen2VLForConditionalGeneration", {
        "text_config": {**DECODER, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
        "image_token_id": 260, "video_token_id": 261, "vision_start_token_id": 262, "vision_end_token_id": 263,
    }, byte_tokenizer(), "causal-lm"),
    "gemma3": ("Gemma3ForConditionalGeneration", {
        "text_config": {**DECODER, "head_dim": 8}, "vision_config": VISION, "image_token_id": 260,
        "mm_tokens_per_image": 4, "boi_token_index": 261, "eoi_token_index": 262,
    }, byte_tokenizer(), "causal-lm"),
}  # fmt: skip


def save(name: str, directory: Path) -> Path:
    kind, arguments, tokenizer, _ = MODELS[name]
    torch.manual_seed(0)
    make = getattr(transformers, kind)
    make(make.config_class(**arguments)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", list(MODELS))
def test_a_language_model_is_trained_as_what_it_is(name: str, tmp_path: Path) -> None:
    directory = save(name, tmp_path / name)
    task, _ = task_of(read_config(directory), directory, None)
    assert task == MODELS[name][3]
    data = load(None, directory, task)
    read = MODELS[name][2].decode(data.train[0]["input_ids"])
    begins, ends = {"t5": ("", "<end>"), "bert": ("<cls>", "<sep>")}.get(name, ("", ""))
    assert read.startswith(begins), "as its tokenizer begins a text"
    assert read.endswith(ends), "and as it ends one"
    result = train_run(spec(task=task, steps=4, eval_every=4, learning_rate=1e-2), directory, data)
    assert result.start == pytest.approx(5.58, abs=0.7)  # ln 264: chance
    assert learned(result) > 0.5


@pytest.mark.parametrize("construction", [Factors(alpha=1e3, top_k=2), Fold()], ids=["factors", "fold"])
def test_a_hardened_sequence_to_sequence_model_starts_where_its_base_does(
    construction: Construction, tmp_path: Path
) -> None:
    base = save("t5", tmp_path / "t5")
    harden_to(tmp_path / "hardened", base, construction)
    run = spec(task="seq2seq-lm", steps=2, eval_every=2)
    data = load(None, base, "seq2seq-lm")
    control, hardened = (train_run(run, directory, data) for directory in (base, tmp_path / "hardened"))
    assert hardened.start == pytest.approx(control.start, rel=1e-4)


def test_a_task_that_is_not_the_model_s_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    for name in ("t5", "bert"):
        save(name, tmp_path / name)
    with refusal("BertForMaskedLM and its control t5 a T5ForConditional", "--control"):
        plan_attack(AttackOptions(model=tmp_path / "bert", control=tmp_path / "t5", out=tmp_path / "out"))
    with refusal("is an encoder", "Use --task masked-lm."):
        task_of(read_config(tmp_path / "bert"), tmp_path / "bert", "causal-lm")
    named = tmp_path / "ner"
    transformers.BertForTokenClassification(transformers.BertConfig(**TEXT)).save_pretrained(named)
    with pytest.raises(SpecDefError, match="BertForTokenClassification") as caught:
        task_of(read_config(named), named, None)
    advised = caught.value.hint.rpartition("--task ")[2].rstrip(".").split(" or ")
    assert advised == ["sequence-classification", "masked-lm"]
    assert [task_of(read_config(named), named, task)[0] for task in advised] == advised  # type: ignore[arg-type]


LABELS: dict[str, tuple[Callable[[int], Any], str, int]] = {
    # The label of a row, what transformers calls it, and the outputs of a head that has three.
    "numbers": (lambda n: n % 3, "single_label_classification", 3),
    "names": (lambda n: "abcd"[n % 4], "single_label_classification", 4),
    "several numbers": (lambda n: [0, 2] if n % 2 else [1], "multi_label_classification", 3),
    "several names": (lambda n: ["a", "b"] if n % 2 else ["c"], "multi_label_classification", 3),
    "one for each class": (lambda n: [n % 2, 1, 0], "multi_label_classification", 3),
    "fractions": (lambda n: n / 7, "regression", 1),
    "several fractions": (lambda n: [n / 7, n / 3], "regression", 2),
}


def classifier(directory: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**DECODER, num_labels=3)
    transformers.LlamaForSequenceClassification(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return directory


def write_rows(path: Path, label: Callable[[int], Any]) -> Path:
    rows = [{"text": f"{'abc'[n % 3]} {n}", "label": label(n)} for n in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("published", ["LlamaForSequenceClassification", "LlamaForCausalLM"])
def test_a_fold_is_undone_before_a_new_head_is_put_on(published: str, tmp_path: Path) -> None:
    """The new head is the control's, and reads from the last norm what it reads there."""
    task: Task = "sequence-classification"
    base, folded = classifier(tmp_path / "base"), tmp_path / "fold"
    if published != "LlamaForSequenceClassification":
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)).save_pretrained(base)
    harden_to(folded, base)
    _, head = task_of(read_config(base), base, task)
    rows = write_rows(tmp_path / "rows.jsonl", lambda n: "abcd"[n % 4])
    data = load(rows, base, task, head)
    run = spec(task=task, steps=2, eval_every=2, learning_rate=1e-4)
    control = train_run(run, base, data)
    plain, undone = (
        train_run(replace(run, subject="model", variant=Variant(variant)), folded, data)
        for variant in ("plain", "rebalance")
    )
    assert control.start is not None
    assert plain.start is not None
    assert plain.start > 2 * control.start
    assert [point.loss for point in undone.evaluations] == pytest.approx(
        [point.loss for point in control.evaluations],
        rel=2e-2,  # powers of two, which the new head does not know
    )


@pytest.mark.parametrize("shape", list(LABELS))
def test_labels_of_every_shape_train(shape: str, tmp_path: Path) -> None:
    label, problem, outputs = LABELS[shape]
    directory = classifier(tmp_path / "model")
    task, head = task_of(read_config(directory), directory, None)
    data = load(write_rows(tmp_path / "rows.jsonl", label), directory, task, head)
    assert (data.problem, data.labels, data.resize_head) == (problem, outputs, outputs != 3)
    run = spec(task=task, steps=4, eval_every=4, learning_rate=1e-2)
    model: Any = load_for_training(run, open_model(directory), data)
    batch = data.collate([data.train[0], data.train[1]])
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits.detach()
    losses: dict[str, Any] = {
        "single_label_classification": torch.nn.functional.cross_entropy,
        "multi_label_classification": torch.nn.functional.binary_cross_entropy_with_logits,
        "regression": torch.nn.functional.mse_loss,
    }
    torch.testing.assert_close(model(**batch).loss.detach(), losses[problem](logits, batch["labels"]))
    result = train_run(run, directory, data)
    assert (len(result.train), result.divergence) == (4, None)
    assert result.final != result.start


def test_a_tokenizer_without_padding_is_refused_with_what_helps(tmp_path: Path) -> None:
    directory = classifier(tmp_path / "model")
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    bare = {key: value for key, value in config.items() if not key.endswith("_token")}
    path.write_text(json.dumps(bare))
    rows = write_rows(tmp_path / "rows.jsonl", lambda n: n % 3)
    task: Task = "sequence-classification"
    with refusal("neither padding nor an end", "pad_token"):
        load(rows, directory, task, Head(3))
    path.write_text(json.dumps({**bare, "pad_token": "<pad>"}))
    assert len(load(rows, directory, task, Head(3)).train) == 16
