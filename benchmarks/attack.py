"""The attack against the same Trainer run written by hand: what recording and surgery's hooks cost a step."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments, set_seed

from specdef_cli import AttackOptions
from specdef_cli.attack.data import load_data, load_preprocessor
from specdef_cli.attack.data.split import AttackData
from specdef_cli.attack.one_run import RunSpec
from specdef_cli.attack.train import load_for_training, quiet
from specdef_cli.attack.trainer import Recorder, make_trainer
from specdef_cli.attack.trainings import Training
from specdef_cli.attack.variants import Variant
from specdef_cli.model.opened import open_model

MODEL = Path(__file__).parents[1] / "examples" / "tiny_llama" / "model"


def attack_table(runs: int = 9, steps: int = 20, batch_size: int = 8, length: int = 64) -> None:
    """Print CPU seconds a step of both, and the median of their ratios, runs in turn; evaluation included in both."""
    options = AttackOptions(
        MODEL, Path(), steps=steps, batch_size=batch_size, sequence_length=length, retained="none"
    )  # the Trainer by hand evaluates no retained text
    with quiet():
        data = load_data(options, "causal-lm", load_preprocessor("causal-lm", open_model(MODEL)))
        _by_hand(options, data), _attack(options, data)  # the first run of a process pays for imports and caches
        pairs = [(_by_hand(options, data), _attack(options, data)) for _ in range(runs)]
    ratio = statistics.median(attack / by_hand for by_hand, attack in pairs)
    print("| run | CPU seconds a step (median) | × by hand |")
    print("|---|---|---|")
    for name, column, times in (("Trainer by hand", 0, 1.0), ("attack", 1, ratio)):
        print(f"| {name} | {statistics.median(pair[column] for pair in pairs) / steps:.4f} | {times:.3f} |")


def _attack(options: AttackOptions, data: AttackData) -> float:
    spec = RunSpec(
        subject="control", checkpoint="", data="", task="causal-lm", variant=Variant(), training=Training(),
        optimizer="adamw", learning_rate=1e-3, schedule="constant", warmup_steps=0, max_grad_norm=1.0,
        weight_decay=0.0, steps=options.steps, batch_size=options.batch_size, sequence_length=options.sequence_length,
        eval_every=options.eval_interval, seed=0, dtype="float32",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        set_seed(0)
        model = load_for_training(spec, open_model(MODEL), data)
        return _timed(make_trainer(spec, model, data, Recorder(lambda step, loss: None), scratch, options))


def _by_hand(options: AttackOptions, data: AttackData) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        set_seed(0)
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        arguments = TrainingArguments(
            scratch, max_steps=options.steps, per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size, learning_rate=1e-3, lr_scheduler_type="constant",
            eval_strategy="steps", eval_steps=options.eval_interval, eval_on_start=True, logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False, log_level="error",
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=data.train, eval_dataset=data.held_out, data_collator=data.collate
        )
        trainer.remove_callback(PrinterCallback)
        return _timed(trainer)


def _timed(trainer: Trainer) -> float:
    began = time.process_time()  # not the clock on the wall: whatever else the machine does must not count
    trainer.train()
    return time.process_time() - began
