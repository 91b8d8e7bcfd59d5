"""PiSSA (Meng et al. 2024, arXiv 2404.02948): LoRA that begins with the largest singular directions of the weights.

Hardening is made of large singular values, so here the adapters hold what it inflated, and the frozen rest is small.
"""

from __future__ import annotations

from peft import LoraConfig
from torch import nn

from specdef_cli.attack.target import Task
from specdef_cli.attack.trainings.adapters import PEFT_TASKS, linear_paths, with_adapters
from specdef_cli.attack.trainings.table import Training


def train_pissa(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """PiSSA on every linear, or on those named; of an inserted pair, on both factors.

    The frozen rest is rounded in the weights' dtype: beside factors beyond 2^24 nothing of the other channels is left,
    so a fold may be broken before its first step.
    """
    rank = int(training.size or 0)
    targets = linear_paths(model, training.where)
    return with_adapters(
        model,
        training,
        lambda: LoraConfig(
            task_type=PEFT_TASKS[task], r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="pissa"
        ),
    )
