"""One run: a fresh model, what its variant does to it, what its training trains, and transformers' Trainer.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
from transformers.trainer_utils import EvalLoopOutput

from specdef_cli.attack.behaviour import behaviour_of, reference_of, task_accuracy, try_edits
from specdef_cli.attack.data.examples import AttackData
from specdef_cli.attack.optimizers.own import build_optimizer
from specdef_cli.attack.optimizers.table import OPTIMIZERS, OptimizerChoice
from specdef_cli.attack.prompts import Prompts
from specdef_cli.attack.recorder import ATTACK, CONSTANT, NOWHERE, RETAINED, Recorder, Tracking
from specdef_cli.attack.run_result import RunResult
from specdef_cli.attack.search import Lead
from specdef_cli.attack.spec import RunSpec
from specdef_cli.attack.target import Task
from specdef_cli.attack.tasks import leave_to_fsdp, load_for_training
from specdef_cli.errors import SpecDefError
from specdef_cli.model.loading import new_objects_only, process_state
from specdef_cli.model.opened import OpenedModel


@dataclass(frozen=True)
class Memory:
    """How the memory of a step is kept down. Curves stay the same but for rounding, so no specification names it."""

    accumulation: int = 1  # passes that the sequences of a step are split into
    checkpointing: bool = False  # compute activations once more in the backward pass instead of keeping them


def train_run(
    spec: RunSpec,
    opened: OpenedModel,
    data: AttackData,
    *,
    memory: Memory = Memory(),
    tracking: Tracking = NOWHERE,
    on_step: Callable[[int, float | None], None] = lambda step, loss: None,
    eval_task_path: Path | None = None,
    lead: Lead | None = None,
    prompts: Prompts | None = None,
) -> RunResult:
    """Train a model as ``spec`` says and write down what happened.

    Every process of an ``accelerate launch`` calls this and gets the same result.

    Args:
        lead: As :class:`Recorder` takes it.
    """
    state = process_state()
    if spec.is_edit:
        assert prompts is not None
        return _edit_run(spec, opened, prompts, str(state.device), on_step)
    _check_passes(spec, state, memory)
    with quiet(), new_objects_only(), tempfile.TemporaryDirectory(prefix="specdef-attack-") as scratch:
        # Before loading: a classification head that the checkpoint lacks is drawn at random, and must be the same for
        # the control.
        set_seed(spec.seed)
        model = load_for_training(spec, opened, data)
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            leave_to_fsdp(model)
        else:
            # The variant where the training will be: an SVD or a product of large factors is the accelerator's work.
            model.to(state.device)
        growth = spec.variant.apply(model, spec.seed)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        model = spec.training.apply(model, spec.task)
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        recorder = Recorder(on_step, spec.stop_at_divergence, lead)
        trainer = make_trainer(spec, model, data, recorder, scratch, memory, tracking)
        began = time.perf_counter()
        try:
            trainer.train()
        finally:
            tracking.finish()
        seconds = time.perf_counter() - began
        accuracy = {}
        if spec.eval_tasks:
            accuracy = task_accuracy(model, opened.tokenizer(), spec.eval_tasks, task_directory=eval_task_path)
        behaviour = None
        if prompts is not None and spec.prompts and recorder.divergence is None and recorder.stopped is None:
            before = reference_of(opened, prompts, spec.dtype, str(state.device))
            behaviour = behaviour_of(model, prompts, before, opened)
        result = RunResult(
            spec=spec,
            train=tuple(recorder.train),
            evaluations=tuple(recorder.evaluations),
            divergence=recorder.divergence,
            stopped=recorder.stopped,
            growth=growth,
            parameters=parameters,
            trainable_parameters=trainable,
            seconds=seconds,
            accuracy=accuracy,
            behaviour=behaviour,
        )
        # The Trainer and its model refer to each other; without this two models would be in memory at the next run's
        # loading.
        trainer.accelerator.free_memory()
        del trainer, model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return result


def _edit_run(
    spec: RunSpec,
    opened: OpenedModel,
    prompts: Prompts,
    device: str,
    on_step: Callable[[int, float | None], None],
) -> RunResult:
    """A run in which nothing is trained: the model is edited and asked."""
    began = time.perf_counter()
    with quiet():
        edits, behaviour, growth, parameters = try_edits(
            spec.variant,
            opened,
            prompts,
            dtype=spec.dtype,
            device=device,
            on_strength=lambda number: on_step(number, None),
        )
    return RunResult(
        spec=spec,
        train=(),
        evaluations=(),
        divergence=None,
        growth=growth,
        parameters=parameters,
        trainable_parameters=0,
        seconds=time.perf_counter() - began,
        edits=edits,
        behaviour=behaviour,
    )


def _check_passes(spec: RunSpec, state: PartialState, memory: Memory) -> None:
    """Refuse what does not split over processes and passes."""
    choice = OPTIMIZERS.choose(spec.optimizer)
    if spec.batch_size % (state.num_processes * memory.accumulation):
        over = [f"{state.num_processes} processes"] * (state.num_processes > 1)
        over += [f"{memory.accumulation} passes"] * (memory.accumulation > 1)
        raise SpecDefError(
            f"--batch-size {spec.batch_size} does not split over {' of '.join(over)}",
            f"Give a multiple of {state.num_processes * memory.accumulation}.",
        )
    if choice.second_order and state.num_processes > 1:
        raise SpecDefError(
            f"--optimizer {spec.optimizer} differentiates the gradient, which is not possible over "
            f"{state.num_processes} processes",
            "Run it without `accelerate launch`, or choose a first-order optimizer.",
        )
    if choice.second_order and memory != Memory():
        raise SpecDefError(
            f"--optimizer {spec.optimizer} differentiates the gradient, which needs all of a step's graph",
            "Leave --gradient-accumulation and --gradient-checkpointing out, or choose a first-order optimizer.",
        )


CONSTANT_WITHIN = 1e-6
"""Outputs that differ by no more than this share of the largest are the same."""


class AttackTrainer(Trainer):
    """transformers' Trainer with an optimizer of the table, which evaluates the cross-entropy of the labels alone.

    Optimizers that evaluate at other weights than they train at (schedule-free ones) are switched by the Trainer
    itself, which calls their ``train`` and ``eval``.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(self, choice: OptimizerChoice, task: Task, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._choice = choice
        self._task = task
        self._constant: list[torch.Tensor] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Trained on is the model's own loss, evaluated that of the labels: many models add a router's to theirs."""
        if model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._task not in _LABEL_LOSSES:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
        else:
            labels = inputs["labels"]
            # A decoder reads its labels; other models would only spend a second loss on them.
            read = {name: value for name, value in inputs.items() if name != "labels" or self._task == "seq2seq-lm"}
            outputs = model(**read)
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs["labels" in read]
            counted = logits[:, -labels.shape[1] :].contiguous()  # without the tokens of a trained prompt
            loss = _LABEL_LOSSES[self._task](counted, labels, counted.shape[-1], num_items_in_batch)
            if num_items_in_batch is not None:  # of all processes, whose losses the Trainer averages
                loss = loss * self.accelerator.num_processes
        self._constant.append(_constant(inputs, logits))
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **more: Any) -> EvalLoopOutput:
        """Also says whether the outputs were the same for all inputs, which no network that can learn has."""
        self._constant = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **more)
        found = torch.stack(self._constant).all() if self._constant else torch.tensor(False)
        gathered = self.accelerator.gather(found.to(self.args.device))
        output.metrics[f"{metric_key_prefix}_{CONSTANT}"] = bool(gathered.all())
        return output

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Called after sharding, with the sharded model, where there is any."""
        if self.is_fsdp_enabled and not self._choice.elementwise:
            others = (name for name, choice in OPTIMIZERS.items() if choice.elementwise and not choice.second_order)
            raise SpecDefError(
                f"{self._choice.name} has to see whole tensors, and FSDP shards them",
                f"Launch without FSDP, or choose --optimizer {', '.join(others)}.",
            )
        if self.optimizer is None:
            trained = self.model if model is None else model
            self.optimizer = build_optimizer(
                self._choice,
                trained,
                self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                decayed=self.get_decay_parameter_names(trained),
            )
        return self.optimizer


_LABEL_LOSSES: dict[Task, Callable[..., torch.Tensor]] = {
    "causal-lm": ForCausalLMLoss,
    "masked-lm": ForMaskedLMLoss,
    "seq2seq-lm": ForMaskedLMLoss,
}


def _constant(inputs: dict[str, Any], logits: torch.Tensor) -> torch.Tensor:
    """Whether inputs that differ give one output: a boolean scalar."""
    read = inputs["input_ids"] if "input_ids" in inputs else inputs["pixel_values"]
    first = read[0] if logits.ndim == 2 else read[0, 0]  # an output for each row, or for each token
    flat = logits.detach().flatten(0, -2)  # [outputs, classes]
    spread, largest = (flat.amax(0) - flat.amin(0)).max(), flat.abs().max()
    return (read != first).any() & (spread <= CONSTANT_WITHIN * largest)


class SecondOrderTrainer(AttackTrainer):
    """Leaves the gradient's graph for the optimizer to differentiate. One process, no gradient accumulation."""

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One forward and backward pass that can be differentiated once more."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss, create_graph=True)
        return loss.detach()


def make_trainer(
    spec: RunSpec,
    model: nn.Module,
    data: AttackData,
    recorder: Recorder,
    scratch: str,
    memory: Memory = Memory(),
    tracking: Tracking = NOWHERE,
) -> Trainer:
    """The Trainer of a run, silent and without checkpoints."""
    choice = OPTIMIZERS.choose(spec.optimizer)
    if memory.checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise SpecDefError(
            f"{type(model).__name__} does not support --gradient-checkpointing",
            "Leave it out; --gradient-accumulation also saves memory.",
        )
    arguments = TrainingArguments(
        output_dir=scratch,
        max_steps=spec.steps,
        per_device_train_batch_size=spec.batch_size // process_state().num_processes // memory.accumulation,
        per_device_eval_batch_size=spec.batch_size // memory.accumulation,
        gradient_accumulation_steps=memory.accumulation,
        gradient_checkpointing=memory.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if memory.checkpointing else None,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.schedule,
        warmup_steps=spec.warmup_steps,
        weight_decay=spec.weight_decay,
        max_grad_norm=0.0 if choice.second_order else spec.max_grad_norm,
        bf16=spec.dtype == "mixed",
        # Where this is not said, bfloat16 is refused on the CPU, and every process of a launch there trains alone.
        use_cpu=not torch.accelerator.is_available(),
        seed=spec.seed,
        # The sampler's own seed: whatever variant and adapters drew before, the data comes in the same order.
        data_seed=spec.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="steps",
        eval_steps=spec.eval_every,
        eval_on_start=not recorder.evaluations,
        logging_strategy="steps",
        logging_steps=1,
        logging_first_step=True,
        # The filter replaces a loss that is not finite by the mean of earlier ones, which would hide a divergence.
        logging_nan_inf_filter=False,
        save_strategy="no",
        **tracking.arguments(spec),
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        log_level="error",
        log_level_replica="error",
    )
    # Outside `accelerate launch` the Trainer would spread a batch over all GPUs by DataParallel, which changes its
    # size.
    arguments._n_gpu = min(1, arguments.n_gpu)
    trainer = (SecondOrderTrainer if choice.second_order else AttackTrainer)(
        choice,
        spec.task,
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset={ATTACK: data.held_out} | ({RETAINED: data.retained} if data.retained is not None else {}),
        data_collator=data.collate,
        callbacks=[recorder, *tracking.callbacks(spec)],
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
