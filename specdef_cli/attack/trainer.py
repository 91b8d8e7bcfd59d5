"""One run: a fresh model, surgery, a recipe, and transformers' Trainer.

The Trainer is what an attacker would use, with everything that is not training turned off. Nothing here knows of
plans, files or reports.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import PartialState
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from specdef_cli.attack.data import AttackData
from specdef_cli.attack.optimizers import optimizer_choice
from specdef_cli.attack.recipes import apply_recipe
from specdef_cli.attack.recorder import Recorder
from specdef_cli.attack.results import RunResult
from specdef_cli.attack.spec import RunSpec
from specdef_cli.attack.variants import apply_variant
from specdef_cli.errors import SpecDefError
from specdef_cli.runtime.load import load_model


def train_run(
    spec: RunSpec,
    directory: Path,
    data: AttackData,
    *,
    on_step: Callable[[int, float | None], None] = lambda step, loss: None,
    trust_remote_code: bool = False,
) -> RunResult:
    """Train ``directory`` as ``spec`` says and write down what happened.

    Every process of an ``accelerate launch`` calls this and gets the same result.

    Args:
        spec: What to run.
        directory: The checkpoint, base or hardened.
        data: The tokens; the same object for the control and the attack.
        on_step: Called after each optimizer step.
        trust_remote_code: Passed on to transformers.

    Raises:
        SpecDefError: The model cannot be loaded, the recipe matches nothing, or the batch does not split over the
            processes.
    """
    state = PartialState()
    if spec.batch_size % state.num_processes:
        raise SpecDefError(
            f"--batch-size {spec.batch_size} does not split over {state.num_processes} processes",
            f"Give a multiple of {state.num_processes}.",
        )
    with quiet(), tempfile.TemporaryDirectory(prefix="specdef-attack-") as scratch:
        # Before loading: a classification head that the checkpoint lacks is drawn at random, and must be the same for
        # the control.
        set_seed(spec.seed)
        model = load_for_training(spec, directory, data, trust_remote_code)
        # Surgery where the training will be: an SVD or a product of large factors is the accelerator's work.
        model.to(state.device)
        growth = apply_variant(model, spec.variant, spec.seed)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        model = apply_recipe(model, spec)
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        recorder = Recorder(on_step)
        trainer = make_trainer(spec, model, data, recorder, scratch)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    result = RunResult(
        spec=spec,
        train=tuple(recorder.train),
        evaluations=tuple(recorder.evaluations),
        divergence=recorder.divergence,
        growth=growth,
        parameters=parameters,
        trainable_parameters=trainable,
        seconds=seconds,
    )
    # The Trainer and its model refer to each other; without this two models would be in memory at the next run's
    # loading.
    trainer.accelerator.free_memory()
    del trainer, model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result


def load_for_training(spec: RunSpec, directory: Path, data: AttackData, trust_remote_code: bool) -> nn.Module:
    """Load a checkpoint afresh, with the task's head, in the dtype of training."""
    arguments: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    loader: Any = transformers.AutoModelForCausalLM
    if spec.task == "sequence-classification":
        loader = _AutoClassifier(data.labels, data.padding)
        arguments["ignore_mismatched_sizes"] = data.resize_head
    dtype = "auto" if spec.dtype == "auto" else getattr(torch, spec.dtype)
    return load_model(directory, auto_class=loader, dtype=dtype, **arguments)


class _AutoClassifier:
    """``AutoModelForSequenceClassification`` with the data's number of classes and padding.

    They belong to the config, which ``load_model`` makes and hands to whatever class it was given.
    """

    __name__ = "AutoClassifier"

    def __init__(self, labels: int, padding: int | None) -> None:
        self.labels = labels
        self.padding = padding

    def from_pretrained(self, path: Path, *, config: Any, **arguments: Any) -> Any:
        if config.num_labels != self.labels:
            config.num_labels = self.labels
        # Decoders find the token to classify by looking for the padding.
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = self.padding
        return transformers.AutoModelForSequenceClassification.from_pretrained(path, config=config, **arguments)


def make_trainer(spec: RunSpec, model: nn.Module, data: AttackData, recorder: Recorder, scratch: str) -> Trainer:
    """The Trainer of a run, silent and without checkpoints."""
    choice = optimizer_choice(spec.optimizer)
    arguments = TrainingArguments(
        output_dir=scratch,
        max_steps=spec.steps,
        per_device_train_batch_size=spec.batch_size // PartialState().num_processes,
        per_device_eval_batch_size=spec.batch_size,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.schedule,
        warmup_steps=spec.warmup_steps,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        seed=spec.seed,
        # The sampler's own seed: whatever surgery and adapters drew before, the data comes in the same order.
        data_seed=spec.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="steps",
        eval_steps=spec.eval_every,
        eval_on_start=True,
        logging_strategy="steps",
        logging_steps=1,
        logging_first_step=True,
        # The filter replaces a loss that is not finite by the mean of earlier ones, which would hide a divergence.
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        log_level="error",
        log_level_replica="error",
    )
    # Outside `accelerate launch` the Trainer would spread a batch over all GPUs by DataParallel, which changes its
    # size.
    arguments._n_gpu = min(1, arguments.n_gpu)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        data_collator=data.collate,
        callbacks=[recorder],
        optimizer_cls_and_kwargs=(choice.load(), {"lr": spec.learning_rate, **choice.arguments}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what the libraries print while a model is loaded and trained; errors still come as exceptions."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    dataset_bars = datasets.are_progress_bars_disabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
        if not dataset_bars:
            datasets.enable_progress_bars()
