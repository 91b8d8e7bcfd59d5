"""transformers' Trainer with everything that is not training turned off, and the callback that writes a run down.

The callback reads values that the Trainer has computed for its own log and computes none, so that a recorded run costs
what the same run costs by hand.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
from transformers.trainer_utils import EvalLoopOutput

from specdef_cli.attack.data.split import AttackData
from specdef_cli.attack.one_run import (
    BATCHES_BEYOND_TWICE,
    BEYOND_TWICE,
    DEAD,
    DIVERGENCE_FACTOR,
    Divergence,
    DivergenceReason,
    EvalPoint,
    RunSpec,
    TrainPoint,
)
from specdef_cli.attack.optimizers import OPTIMIZERS, OptimizerChoice
from specdef_cli.attack.optimizers.own import build_optimizer
from specdef_cli.attack.options import AttackOptions
from specdef_cli.attack.search import Lead, is_hopeless
from specdef_cli.attack.target import Task
from specdef_cli.errors import SpecDefError
from specdef_cli.model.loading import process_state

BATCHES = 2
"""So many batches in a row beyond twice the first one's loss are no chance."""

ATTACK, RETAINED = "attack", "retained"
"""What the data sets that are evaluated are called in the Trainer's metrics."""

CONSTANT = "constant"
"""The metric that says whether all outputs were the same."""


EventKind = Literal["run-start", "step", "run-end", "run-reused"]


@dataclass(frozen=True)
class ProgressEvent:
    """Something happened that a progress bar wants to show."""

    kind: EventKind
    done: int
    runs: int  # known of so far; a search adds to them
    label: str
    step: int
    steps: int
    loss: float | None = None  # the training loss of the last step, where there is a finite one
    diverged: bool = False  # only at the end of a run


ProgressHook = Callable[[ProgressEvent], None]


class Recorder(TrainerCallback):
    """Curves of one run.

    Args:
        lead: What the search that this run belongs to has found: the run ends once it cannot get further, and is not
            evaluated at step 0 where that is known. ``None`` for a run that is made in full.
    """

    def __init__(
        self, on_step: Callable[[int, float | None], None], stop_at_divergence: bool = True, lead: Lead | None = None
    ) -> None:
        self.train: list[TrainPoint] = []
        self.evaluations: list[EvalPoint] = [lead.start] if lead is not None and lead.start is not None else []
        self.divergence: Divergence | None = None
        self.stopped: int | None = None
        self._lead = lead
        self._stop_at_divergence = stop_at_divergence
        self._ended = False
        self._on_step = on_step
        self._began = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs or self._ended:
            return
        loss, grad_norm = finite(logs["loss"]), finite(logs.get("grad_norm"))
        self.train.append(TrainPoint(state.global_step, loss, grad_norm))
        if loss is None:
            self._diverged(state, control, "training loss is not finite")
        elif self._lead is not None and self._batches_beyond_twice():
            self._diverged(state, control, BATCHES_BEYOND_TWICE)
        self._on_step(state.global_step, loss)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not metrics:
            return
        if f"eval_{RETAINED}_loss" in metrics:
            # The Trainer evaluates the data sets one after the other, the attack's first.
            retained = finite(metrics[f"eval_{RETAINED}_loss"])
            self.evaluations[-1] = replace(self.evaluations[-1], retained=retained)
            return
        if self._ended:
            return
        dead = bool(metrics.get(f"eval_{ATTACK}_{CONSTANT}")) and state.global_step > 0
        # What says the same of every input has learned nothing, also where its loss is below a bad start.
        loss = None if dead else finite(metrics[f"eval_{ATTACK}_loss"])
        self.evaluations.append(EvalPoint(state.global_step, loss, time.perf_counter() - self._began))
        start = self.evaluations[0].loss
        if loss is None:
            self._diverged(state, control, DEAD if dead else "held-out loss is not finite")
        elif start is not None and loss > DIVERGENCE_FACTOR * start:
            self._diverged(state, control, BEYOND_TWICE)
        elif self._lead is not None and is_hopeless(self.evaluations, state.max_steps, self._lead.progress):
            self.stopped = state.global_step
            self._end(control)

    def _batches_beyond_twice(self) -> bool:
        first, last = self.train[0].loss, self.train[-BATCHES:]
        return first is not None and all(
            point.loss is not None and point.loss > DIVERGENCE_FACTOR * first for point in last
        )

    def _diverged(self, state: TrainerState, control: TrainerControl, reason: DivergenceReason) -> None:
        ends = self._stop_at_divergence or reason != BEYOND_TWICE
        if self.divergence is None or ends:
            self.divergence = Divergence(state.global_step, reason)
        if ends:
            self._end(control)

    def _end(self, control: TrainerControl) -> None:
        self._ended = True
        control.should_training_stop = True
        control.should_evaluate = False


def finite(value: float | None) -> float | None:
    """``value`` as a float, or ``None`` if it is NaN, infinite or missing."""
    return float(value) if value is not None and math.isfinite(value) else None


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
        if choice.second_order:  # the gradient's graph stays, for the optimizer to differentiate
            self.accelerator.backward = partial(self.accelerator.backward, create_graph=True)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Train on the model's own loss, and evaluate that of the labels: many models add a router's."""
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
        """Report too whether all inputs gave the same output, as in a dead network."""
        self._constant = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **more)
        found = torch.stack(self._constant).all() if self._constant else torch.tensor(False)
        gathered = self.accelerator.gather(found.to(self.args.device))
        output.metrics[f"{metric_key_prefix}_{CONSTANT}"] = bool(gathered.all())
        return output

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer of the table; called after sharding, with the sharded model."""
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
    """Whether inputs that differ give one output: a boolean scalar. Of tokens, the first sequence tells, unless each
    of them answers with one token.
    """
    read, outputs = inputs["input_ids"] if "input_ids" in inputs else inputs["pixel_values"], logits.detach()
    if logits.ndim > 2 and logits.shape[1] > 1:
        read, outputs = read[0], outputs[0]
    spread, largest = (outputs.amax(0) - outputs.amin(0)).max(), outputs.abs().max()
    return (read != read[0]).any() & (spread <= CONSTANT_WITHIN * largest)


def make_trainer(
    spec: RunSpec,
    model: nn.Module,
    data: AttackData,
    recorder: Recorder,
    scratch: str,
    options: AttackOptions,
) -> Trainer:
    """The Trainer of a run, silent and without checkpoints; of the options, what saves memory and what tracks it."""
    choice = OPTIMIZERS.choose(spec.optimizer)
    accumulation, checkpointing = options.gradient_accumulation, options.gradient_checkpointing
    if checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise SpecDefError(
            f"{type(model).__name__} does not support --gradient-checkpointing",
            "Leave it out; --gradient-accumulation also saves memory.",
        )
    if "tensorboard" in options.report_to:  # it would write where the Trainer does, and that is a scratch directory
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(options.out / "logs" / spec.run_id)
    arguments = TrainingArguments(
        output_dir=scratch,
        max_steps=spec.steps,
        per_device_train_batch_size=spec.batch_size // process_state().num_processes // accumulation,
        per_device_eval_batch_size=spec.batch_size // accumulation,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        learning_rate=spec.learning_rate,
        # Of these two the Trainer's plain one leaves a warm-up out, without a word.
        lr_scheduler_type="constant_with_warmup" if spec.schedule == "constant" else spec.schedule,
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
        report_to=list(options.report_to) or "none",
        run_name=f"{spec.label} · η={spec.learning_rate:g} · seed {spec.seed}" if options.report_to else None,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        log_level="error",
        log_level_replica="error",
    )
    # Outside `accelerate launch` the Trainer would spread a batch over all GPUs by DataParallel, which changes its
    # size.
    arguments._n_gpu = min(1, arguments.n_gpu)
    trainer = AttackTrainer(
        choice,
        spec.task,
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset={ATTACK: data.held_out} | ({RETAINED: data.retained} if data.retained is not None else {}),
        data_collator=data.collate,
        callbacks=[recorder],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
