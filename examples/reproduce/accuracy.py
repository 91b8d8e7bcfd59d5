"""Accuracy of checkpoints as they were released, on tasks of lm-eval: what hardening cost, before any attack.

    python examples/reproduce/accuracy.py BASE HARDENED … --task wmdp_bio --task mmlu --out released.json

Writes ``{"BASE": {"wmdp_bio": 0.5, …}, …}``. Models are evaluated in the dtype that they are stored in, without
examples in the prompt unless a task asks for some, on a GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from specdef_cli.attack.train import task_accuracy
from specdef_cli.checkpoint.resolve import resolve
from specdef_cli.errors import require_extra
from specdef_cli.model import load_model, load_tokenizer, without_progress_bars


def released_accuracy(model: str, tasks: tuple[str, ...], task_directory: Path | None) -> dict[str, float]:
    """The accuracy of one checkpoint, a directory or a Hub id, on each task.

    Raises:
        SpecDefError: It cannot be loaded, or there is no such task.
    """
    directory = resolve(model).directory
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with without_progress_bars():
        loaded = load_model(directory, device=device)
        return task_accuracy(loaded, load_tokenizer(directory), tasks, task_directory=task_directory)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", help="directories or Hub ids")
    parser.add_argument("--task", action="append", required=True, help="task of lm-eval (repeatable)")
    parser.add_argument("--eval-task-path", type=Path, help="directory with tasks of your own")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    require_extra("eval", "accuracies on tasks")
    tasks = tuple(arguments.task)
    found = {model: released_accuracy(model, tasks, arguments.eval_task_path) for model in arguments.models}
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
