"""Accuracy on tasks of the LM Evaluation Harness (WMDP, MMLU, …), of the model as a run left it.

Optional, because it costs many times what a short run does: ``pip install specdef-cli[eval]``.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from specdef_cli.errors import SpecDefError, require_extra

BATCH_SIZE = 8


def require_harness() -> None:
    """Check that lm-eval can be imported."""
    require_extra("eval", "accuracies on tasks")


def task_accuracy(
    model: nn.Module, tokenizer: Any, tasks: tuple[str, ...], *, task_directory: Path | None = None
) -> dict[str, float]:
    """The accuracy on each task, between 0 and 1.

    Args:
        tasks: Names of tasks that report ``acc``.
        task_directory: A directory with tasks of the user's, as lm-eval's ``--include_path``.
    """
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
