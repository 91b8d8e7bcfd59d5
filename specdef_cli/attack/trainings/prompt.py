"""Prompt tuning (Lester, Al-Rfou, Constant 2021, arXiv 2104.08691): trained tokens in front of every sequence."""

from __future__ import annotations

from peft import PromptTuningConfig
from torch import nn

from specdef_cli.attack.target import Task
from specdef_cli.attack.trainings.adapters import PEFT_TASKS, with_adapters
from specdef_cli.attack.trainings.table import Training


def train_prompt(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """So many trained tokens as the training's size says."""
    tokens = int(training.size or 0)
    return with_adapters(
        model, training, lambda: PromptTuningConfig(task_type=PEFT_TASKS[task], num_virtual_tokens=tokens)
    )
