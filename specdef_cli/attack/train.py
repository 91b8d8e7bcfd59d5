"""One run: a fresh model, what its variant does to it, what its training trains, and transformers' Trainer.

Nothing here knows of plans, files or reports.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import set_seed

from specdef_cli.attack.data.split import AttackData
from specdef_cli.attack.one_run import RunResult, RunSpec
from specdef_cli.attack.optimizers import OPTIMIZERS
from specdef_cli.attack.options import AttackOptions
from specdef_cli.attack.prompts import Prompts, behaviour_of, reference_of, try_edits
from specdef_cli.attack.search import Lead
from specdef_cli.attack.tasks import auto_class
from specdef_cli.attack.trainer import Recorder, make_trainer
from specdef_cli.errors import SpecDefError
from specdef_cli.model import SpecDefLinear, SpecDefScaled
from specdef_cli.model.loading import new_objects_only, process_state, without_progress_bars
from specdef_cli.model.opened import OpenedModel


def load_for_training(spec: RunSpec, model: OpenedModel, data: AttackData) -> nn.Module:
    """Load a checkpoint afresh, with the task's head, in the dtype of training.

    What undoes a hardening gets float32, as float16 does not hold what is to be undone.
    """
    arguments: dict[str, Any] = {}
    loader = auto_class(spec.task, model.checkpoint.config)
    if data.problem is not None:
        arguments |= {"configure": data.configure, "ignore_mismatched_sizes": data.resize_head}
    if OPTIMIZERS.choose(spec.optimizer).second_order:
        arguments["attn_implementation"] = "eager"  # the fused kernels have no second derivative
    dtype: Any = {"auto": "auto", "mixed": torch.float32}.get(spec.dtype) or getattr(torch, spec.dtype)
    if dtype is torch.float16 and spec.variant.choice.informed is not None:
        dtype = torch.float32
    loaded: nn.Module = model.load(auto_class=loader, dtype=dtype, **arguments)
    return loaded


def apply_variant(spec: RunSpec, model: Any, opened: OpenedModel, data: AttackData) -> None:
    """Change a loaded model as its variant says; a classifier with a new head, before that is put on.

    What undoes a fold reads the scales of the last norm off the published head.
    """
    if spec.variant.choice.function is None:
        return
    named = opened.checkpoint.config.get("architectures") or ()
    published = model
    if data.problem is not None and (data.resize_head or type(model).__name__ not in named):
        published = opened.load(dtype=model.dtype).to(model.device)
    same = type(published.base_model) is type(model.base_model) and model.base_model is not model
    spec.variant.apply(published if same else model, spec.seed)
    for name, part in published.base_model.named_children() if same else ():  # of which one may lack a pooler
        setattr(model.base_model, name, part)


def leave_to_fsdp(model: nn.Module) -> None:
    """Make a model on the CPU fit for sharding: it goes to the devices in parts, and nothing in it stays whole.

    Accelerate hands out rank 0's state, and takes for granted that each tensor of it was sharded; tombstones are
    buffers, and buffers are not.
    """
    for module in model.modules():
        if isinstance(module, SpecDefLinear | SpecDefScaled):
            module.register_buffer("weight", module.weight, persistent=False)


BATCH_SIZE = 8


def task_accuracy(
    model: nn.Module, tokenizer: Any, tasks: tuple[str, ...], *, task_directory: Path | None = None
) -> dict[str, float]:
    """The accuracy on each task, between 0 and 1."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _task_manager(task_directory)
    for task in tasks:
        if task not in manager.all_tasks:
            raise SpecDefError(
                f"lm-eval has no task {task!r}", "`lm-eval ls tasks` lists them; --eval-task-path adds your own."
            )
    training = model.training
    found = simple_evaluate(
        model=HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=BATCH_SIZE),
        tasks=list(tasks),
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
        verbosity="ERROR",
    )
    model.train(training)
    results = (found or {})["results"]
    accuracy = {}
    for task in tasks:
        values = [value for key, value in results.get(task, {}).items() if key.split(",")[0] == "acc"]
        if not values:
            raise SpecDefError(f"lm-eval's task {task!r} reports no accuracy", "Name tasks with the metric acc.")
        accuracy[task] = float(values[0])
    return accuracy


@cache
def _task_manager(task_directory: Path | None) -> Any:
    """lm-eval's index of tasks. It reads more than ten thousand files, which takes longer than a short run does."""
    from lm_eval.tasks import TaskManager

    return TaskManager(verbosity="ERROR", include_path=None if task_directory is None else str(task_directory))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what the libraries print while a model is loaded and trained; errors still come as exceptions."""
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with without_progress_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if not bars:
            datasets.enable_progress_bars()


def _check_passes(spec: RunSpec, state: PartialState, options: AttackOptions) -> None:
    """Refuse what does not split over processes and passes."""
    passes = options.gradient_accumulation
    choice = OPTIMIZERS.choose(spec.optimizer)
    if spec.batch_size % (state.num_processes * passes):
        over = [f"{state.num_processes} processes"] * (state.num_processes > 1)
        over += [f"{passes} passes"] * (passes > 1)
        raise SpecDefError(
            f"--batch-size {spec.batch_size} does not split over {' of '.join(over)}",
            f"Give a multiple of {state.num_processes * passes}.",
        )
    if choice.second_order and state.num_processes > 1:
        raise SpecDefError(
            f"--optimizer {spec.optimizer} differentiates the gradient, which is not possible over "
            f"{state.num_processes} processes",
            "Run it without `accelerate launch`, or choose a first-order optimizer.",
        )
    if choice.second_order and (passes > 1 or options.gradient_checkpointing):
        raise SpecDefError(
            f"--optimizer {spec.optimizer} differentiates the gradient, which needs all of a step's graph",
            "Leave --gradient-accumulation and --gradient-checkpointing out, or choose a first-order optimizer.",
        )


@dataclass(frozen=True)
class TrainRun:
    """Trains the checkpoint that a specification is of. Picklable, for runs in processes of their own.

    Every process of an ``accelerate launch`` calls it and gets the same result.
    """

    control: OpenedModel
    model: OpenedModel
    data: AttackData
    options: AttackOptions  # of them, what changes no curve
    prompts: Prompts | None = None

    def __call__(
        self,
        spec: RunSpec,
        on_step: Callable[[int, float | None], None] = lambda step, loss: None,
        lead: Lead | None = None,
    ) -> RunResult:
        """Run ``spec``; its search ends it once it cannot get further than the lead."""
        opened = (self.control if spec.subject == "control" else self.model).here()
        if spec.is_edit:
            return self._edited(spec, opened, on_step)
        try:
            result = self._trained(spec, opened, Recorder(on_step, spec.stop_at_divergence, lead))
        except IndexError as error:
            # The tokens themselves are known to be in the vocabulary.
            raise SpecDefError(
                f"{opened.directory} cannot be trained on sequences of {spec.sequence_length} tokens: {error}",
                "Give a smaller --sequence-length.",
            ) from error
        if spec.subject == "control" and result.start is None:
            raise SpecDefError(
                f"the held-out loss of the control {opened.directory} is not finite before any training",
                "Repair its weights if they hold NaN or infinity, or train with --dtype float32.",
            )
        return result

    def _trained(self, spec: RunSpec, opened: OpenedModel, recorder: Recorder) -> RunResult:
        state, options = process_state(), self.options
        _check_passes(spec, state, options)
        with quiet(), new_objects_only(), tempfile.TemporaryDirectory(prefix="specdef-attack-") as scratch:
            # Before loading: a classification head that the checkpoint lacks is drawn at random, and must be the same
            # for the control.
            set_seed(spec.seed)
            model = load_for_training(spec, opened, self.data)
            sharded = parse_flag_from_env("ACCELERATE_USE_FSDP")
            if not sharded:
                # The variant where the training will be: an SVD or a product of factors is the accelerator's work.
                model.to(state.device)
            apply_variant(spec, model, opened, self.data)
            if sharded:
                leave_to_fsdp(model)
            if spec.dtype == "float16":
                for parameter in model.parameters():
                    parameter.data = parameter.data.half()
            parameters = sum(parameter.numel() for parameter in model.parameters())
            model = spec.training.apply(model, spec.task)
            trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            trainer = make_trainer(spec, model, self.data, recorder, scratch, options)
            began = time.perf_counter()
            try:
                trainer.train()
            finally:
                for tracker in options.report_to:  # some keep one run open, to which the next would be added
                    getattr(sys.modules.get(tracker), "finish", lambda: None)()
            seconds = time.perf_counter() - began
            accuracy, behaviour = {}, None
            if spec.eval_tasks:
                own = options.eval_task_path
                accuracy = task_accuracy(model, opened.tokenizer(), spec.eval_tasks, task_directory=own)
            if self.prompts is not None and spec.prompts and recorder.divergence is None and recorder.stopped is None:
                before = reference_of(opened, self.prompts, spec.dtype, str(state.device))
                behaviour = behaviour_of(model, self.prompts, before, opened.tokenizer())
            # The Trainer and its model refer to each other; without this two models would be in memory at the next
            # run's loading.
            trainer.accelerator.free_memory()
            del trainer, model
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return RunResult(
            spec,
            tuple(recorder.train),
            tuple(recorder.evaluations),
            recorder.divergence,
            parameters,
            trainable,
            seconds,
            accuracy,
            recorder.stopped,
            behaviour=behaviour,
        )

    def _edited(self, spec: RunSpec, opened: OpenedModel, on_step: Callable[[int, float | None], None]) -> RunResult:
        """Edit the model and question it; nothing is trained."""
        assert self.prompts is not None
        began = time.perf_counter()
        with quiet():
            edits, behaviour, parameters = try_edits(
                spec.variant,
                opened,
                self.prompts,
                dtype=spec.dtype,
                device=str(process_state().device),
                on_strength=lambda number: on_step(number, None),
            )
        seconds = time.perf_counter() - began
        return RunResult(spec, (), (), None, parameters, 0, seconds, edits=edits, behaviour=behaviour)
