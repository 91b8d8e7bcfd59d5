"""LoRA (Hu et al. 2021, arXiv 2106.09685) and DoRA (Liu et al. 2024, arXiv 2402.09353), and where they are put.

α is twice the rank, as is usual; the learning rate's search makes up for any other scale.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS,
)
from torch import nn

from specdef_cli.attack.target import Task
from specdef_cli.attack.trainings.adapters import PEFT_TASKS, linear_paths, model_type, module_paths, with_adapters
from specdef_cli.attack.trainings.table import Training


def train_lora(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """LoRA on every linear, or on those named; of an inserted pair, on both factors."""
    return with_adapters(model, training, lambda: _config(training, task, linear_paths(model, training.where)))


def train_dora(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """As :func:`train_lora`, with the weight's norm trained apart."""
    targets = linear_paths(model, training.where)
    return with_adapters(model, training, lambda: _config(training, task, targets, use_dora=True))


def train_lora_default(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """LoRA where PEFT puts it on this architecture."""

    def config() -> LoraConfig:
        names = tuple(DEFAULT_TARGETS.get(model_type(model), ()))
        if not names:
            raise ValueError(f"PEFT has no default targets for {model_type(model)}")
        return _config(training, task, module_paths(model, names))

    return with_adapters(model, training, config)


def _config(training: Training, task: Task, targets: list[str] | str, **more: Any) -> LoraConfig:
    rank = int(training.size or 0)
    return LoraConfig(task_type=PEFT_TASKS[task], r=rank, lora_alpha=2 * rank, target_modules=targets, **more)
