"""What users do with a checkpoint besides running it, as rows of :mod:`consumers`: caches, adapters, training, merging.

Every function takes a trial and returns a loss (or a relative error where it says so) and a note; it raises what the
library raises where that refuses the checkpoint.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdef_cli.certify import tools
from specdef_cli.certify.formats import FORMATS, Format
from specdef_cli.certify.tools import (
    NotApplicableError,
    RefusedError,
    Trial,
    gguf_loss,
    mean_loss,
    mean_over_batches,
    next_token_loss,
    program,
)
from specdef_cli.hardening.adapter import convert_adapter
from specdef_cli.model import without_progress_bars
from specdef_cli.model.opened import OpenedModel, open_model
from specdef_cli.model.skeleton import repeated_blocks
from specdef_cli.spectral.subspace import layer_seed

Score = tuple[float, str]

PACKAGES = {
    "PEFT": "peft", "lm-eval": "lm_eval", "TRL": "trl", "sentence-transformers": "sentence_transformers",
}  # fmt: skip
"""Tools of the rows below that ``specdef certify`` does not run: the package to import."""

RANK, SCALE = 8, 0.1
"""Of the fixed adapter; the standard deviation of B's entries. A's is 1/√n."""
LORA_STEPS, LORA_RATE = 4, 1e-4
SFT_STEPS = 5
TRAINED_LENGTH = 128
LONGEST = 2048


def static_cache(trial: Trial) -> Score:
    """The loss with transformers' cache of a fixed size, which compiled generation uses."""
    from transformers import StaticCache

    tokens = trial.required_tokens()

    def logits(batch: Tensor) -> Tensor:
        cache = StaticCache(config=model.config, max_cache_len=batch.shape[1] + 8)
        found: Tensor = model(input_ids=batch.to(model.device), past_key_values=cache, use_cache=True).logits
        if not cache.get_seq_length():
            raise NotApplicableError("the model did not use the key/value cache that it was given")
        return found

    with trial.loaded(torch.float32) as model, torch.inference_mode():
        return mean_over_batches(tokens, model.config, logits), ""


def long_input(trial: Trial) -> Score:
    """The loss of one input that is as long as the text and the model's positions allow."""
    tokens = trial.required_tokens()
    with trial.loaded(torch.float32) as model:
        longest = min(LONGEST, getattr(model.config, "max_position_embeddings", LONGEST))
        sequence = tokens.flatten()[None, :longest]
        return mean_loss(model, sequence), f"{sequence.shape[1]} tokens"


def left_padded(trial: Trial) -> Score:
    """The loss of a batch whose shorter inputs are padded on the left, as batched generation does it."""
    tokens = trial.required_tokens()
    count, length = tokens.shape
    starts = [(row % 4) * length // 8 for row in range(count)]
    mask = torch.stack([(torch.arange(length) >= start).long() for start in starts])
    padded = tokens * mask
    total, predicted = 0.0, 0
    with trial.loaded(torch.float32) as model, torch.inference_mode():
        for batch, batch_mask, batch_starts in zip(
            padded.split(4), mask.split(4), [starts[row : row + 4] for row in range(0, count, 4)], strict=True
        ):
            inputs = {"input_ids": batch.to(model.device), "attention_mask": batch_mask.to(model.device)}
            logits = model(**inputs).logits
            for row, start in enumerate(batch_starts):
                own = length - start - 1
                total += own * next_token_loss(logits[row : row + 1, start:], batch[row : row + 1, start:])
                predicted += own
    return total / predicted, ""


def lora_round_trip(trial: Trial) -> Score:
    """The loss after LoRA's whole life: attached with PEFT's defaults, trained, merged, saved, loaded again."""
    from peft import LoraConfig, get_peft_model

    training, held_out = _halves(trial.required_tokens())
    out = trial.scratch / "lora-merged"
    torch.manual_seed(0)
    with trial.loaded(torch.float32) as model, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's hints on targets and saved embeddings
        before = mean_loss(model, held_out)
        adapted: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
        optimizer = torch.optim.AdamW(
            [parameter for parameter in adapted.parameters() if parameter.requires_grad], lr=LORA_RATE
        )
        adapted.train()
        for step in range(LORA_STEPS):
            batch = training[2 * step % len(training) :][:2].to(model.device)
            adapted(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        adapted.eval()
        trained = mean_loss(adapted, held_out)
        adapted.merge_and_unload().save_pretrained(out)
    with open_model(out).loaded(dtype=torch.float32, device=trial.device) as model:
        reloaded = mean_loss(model, held_out)
    return reloaded, f"loss {before:.4f} before training, {trained:.4f} attached, {reloaded:.4f} merged, reloaded"


def fine_tuned(trial: Trial) -> Score:
    """The loss after a few steps of TRL's ``SFTTrainer`` with its default rate and optimizer, in float32."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    training, held_out = _halves(trial.required_tokens())
    with trial.loaded(torch.float32) as model:
        before = mean_loss(model, held_out)
        config = SFTConfig(
            output_dir=str(trial.scratch / "sft"), max_steps=SFT_STEPS, per_device_train_batch_size=2, bf16=False,
            use_cpu=model.device.type == "cpu", report_to="none", save_strategy="no", disable_tqdm=True,
            max_length=TRAINED_LENGTH, seed=0,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_dict({"input_ids": training.tolist()}),
            processing_class=trial.base.tokenizer(),
        )
        trainer.train()
        after = mean_loss(model.eval(), held_out)
    return after, f"loss {before:.4f} before training, {after:.4f} after {SFT_STEPS} steps"


def harness(trial: Trial) -> Score:
    """The loss in nats a byte that lm-eval finds on a local task, a text that is scored in rolling windows."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = trial.base.tokenizer()
    text = tokenizer.batch_decode(trial.required_tokens(), skip_special_tokens=True)
    tasks = trial.scratch / "lm-eval"
    tasks.mkdir(exist_ok=True)
    data = tasks / "text.json"
    data.write_text("".join(json.dumps({"text": sequence}) + "\n" for sequence in text), encoding="utf-8")
    task = {
        "task": "local_text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tasks / "local_text.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    with trial.loaded(torch.float32) as model:
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
            tasks=["local_text"],
            task_manager=TaskManager(verbosity="ERROR", include_path=str(tasks), include_defaults=False),
            bootstrap_iters=0,
            log_samples=False,
        )
    return (found or {})["results"]["local_text"]["bits_per_byte,none"] * math.log(2), "nats a byte"


def merged_with_base(trial: Trial) -> Score:
    """The loss of mergekit's linear merge, half the base and half the checkpoint: what merges of fine-tunes do.

    Raises:
        RefusedError: mergekit ends with an error.
    """
    recipe, out, other = trial.scratch / "merge.yml", trial.scratch / "merged", trial.scratch / "other"
    other.unlink(missing_ok=True)
    other.symlink_to(trial.directory.resolve())  # mergekit refuses a model twice, and the base is merged with itself
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (trial.base.directory.resolve(), other)]
    recipe.write_text(json.dumps({"merge_method": "linear", "models": models, "dtype": "float32"}), encoding="utf-8")
    tool = program("mergekit-yaml")
    assert tool is not None, "mergekit is missing, which was asked before"
    # mergekit's interpreter is another one, with releases of its own: it must not find what is meant for this one.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [tool, recipe, out], capture_output=True, text=True, errors="replace", check=False, env=environment
    )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise RefusedError(f"mergekit: {lines[-1] if lines else f'exit status {done.returncode}'}")
    with open_model(out).loaded(dtype=torch.float32, device=trial.device) as model:
        return mean_loss(model, trial.required_tokens()), ""


def sentence_embeddings(trial: Trial) -> Score:
    """How far sentence-transformers' embeddings are from the base's: ‖difference‖/‖base's‖ over a few sentences."""
    from sentence_transformers import SentenceTransformer

    if trial.tokens is not None:
        raise NotApplicableError("only encoders are embedded with")
    sentences = [line for line in (__doc__ or "").splitlines() if line] + list(map(str, range(8)))

    def embedded(directory: Path) -> Tensor:
        model = SentenceTransformer(str(directory), device=trial.device or "cpu")
        return torch.as_tensor(model.encode(sentences, show_progress_bar=False)).double()

    own, reference = embedded(trial.directory), embedded(trial.base.directory)
    return float((own - reference).norm() / reference.norm()), ""


def _halves(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What is trained on, in sequences of :data:`TRAINED_LENGTH` at most, and what is measured."""
    if len(tokens) < 2:
        raise NotApplicableError("the text is one sequence, and training needs another")
    half = len(tokens) // 2
    return tokens[:half, :TRAINED_LENGTH], tokens[half:]


def adapted(model: Any, trial: Trial, *, merged: bool) -> Any:
    """Put a fixed LoRA adapter on, carried over to hardened weights; merge it into the stored weights if asked."""
    from peft import PeftModel

    plain = trial.scratch / "adapter"
    if not plain.is_dir():
        fixed_adapter(trial.base, plain)
    place = plain
    if trial.model.manifest is not None:
        place = trial.scratch / "converted"
        if not place.is_dir():
            convert_adapter(str(plain), trial.model, place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it found a Conv1D, and treats it as one
        attached: Any = PeftModel.from_pretrained(model, place)
    return attached.merge_and_unload() if merged else attached.eval()


def fixed_adapter(base: OpenedModel, out: Path) -> None:
    """Write an adapter of every linear layer in the base's blocks; its values depend on the layers' names alone."""
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    with without_progress_bars():
        model = base.load()
    blocks = tuple(f"{block}." for block in repeated_blocks(model))
    names = [
        name
        for name, module in model.named_modules()
        if name.startswith(blocks) and isinstance(module, torch.nn.Linear | Conv1D)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))
    for name in names:
        layer = wrapped.base_model.model.get_submodule(name)
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        generator = torch.Generator().manual_seed(layer_seed(0, name))
        with torch.no_grad():
            down.copy_(torch.randn(down.shape, generator=generator) / math.sqrt(down.shape[1]))
            up.copy_(SCALE * torch.randn(up.shape, generator=generator))
    wrapped.save_pretrained(out)


def missing(tool: str) -> str:
    """Why a tool cannot be used, with what to do about it; empty if it can."""
    if tool == "mergekit":
        return "" if program("mergekit-yaml") else "not installed: pip install mergekit"
    if tool in PACKAGES:
        found = importlib.util.find_spec(PACKAGES[tool])
        return "" if found else f"not installed: pip install {PACKAGES[tool].replace('_', '-')}"
    return tools.missing(tool)


def _checked(row: Format) -> Format:
    """The row, skipped where its tool is not installed."""

    def score(trial: Trial) -> Score:
        if reason := missing(row.tool):
            raise NotApplicableError(reason)
        assert row.score is not None
        return row.score(trial)

    return row if row.score is None else replace(row, score=score)


def _scored(description: str, tool: str, score: Callable[[Trial], Score]) -> Format:
    return _checked(Format(description, tool, score=score))


def _llama_cpp(kind: str, words: str, **how: Any) -> Format:
    return Format(f"{kind}{words}", "llama.cpp", score=lambda trial: (gguf_loss(trial, kind, **how), ""))


CONVERTED = ("F16", "Q8_0")
"""Types that llama.cpp's converter writes itself, and its quantizer too."""


def _llama_cpp_rows() -> dict[str, Format]:
    """Every type without flash attention, with a float32 cache, and as the converter writes it."""
    rows = {}
    for name, row in FORMATS.items():
        if row.tool != "llama.cpp":
            continue
        kind = row.description
        rows[f"{name}/no-flash"] = _llama_cpp(kind, ", no flash attention", flash_attention=False)
        rows[f"{name}/f32-cache"] = _llama_cpp(kind, ", float32 cache", cache="f32")
        rows[f"{name}/f32-cache/no-flash"] = _llama_cpp(
            kind, ", float32 cache, no flash attention", cache="f32", flash_attention=False
        )
        if kind in CONVERTED:
            rows[f"{name}/converter"] = _llama_cpp(kind, ", written by the converter", by_converter=True)
    return rows


_attached, _merged = partial(adapted, merged=False), partial(adapted, merged=True)

ROWS: Mapping[str, Format] = {
    **FORMATS,
    **_llama_cpp_rows(),
    "static-cache": _scored("static cache", "transformers", static_cache),
    "long-input": _scored("long input", "transformers", long_input),
    "left-padded": _scored("left-padded batch", "transformers", left_padded),
    "lora": Format("LoRA carried over, attached", "PEFT", None, change=_attached, reference=_attached),
    "lora-merged": Format("LoRA carried over, merged", "PEFT", None, change=_merged, reference=_attached),
    "lora-round-trip": _scored("LoRA attached, trained, merged, reloaded", "PEFT", lora_round_trip),
    "sft": _scored("SFTTrainer with its defaults, after 5 steps", "TRL", fine_tuned),
    "lm-eval": _scored("a local task", "lm-eval", harness),
    "merge": _scored("linear merge with the base", "mergekit", merged_with_base),
    "embeddings": _scored("embeddings", "sentence-transformers", sentence_embeddings),
}
"""Every row of the tables by its name: the formats of ``specdef certify``, and what else users do."""
