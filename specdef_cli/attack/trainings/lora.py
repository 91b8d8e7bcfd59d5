"""LoRA (Hu et al. 2021, arXiv 2106.09685) and DoRA (Liu et al. 2024, arXiv 2402.09353), and where they are put.

α is twice the rank, as is usual; the learning rate's search makes up for any other scale.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import Linear
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS,
)
from torch import nn

from specdef_cli.attack.target import Target, Task
from specdef_cli.attack.trainings.adapters import (
    FACTORS,
    PEFT_TASKS,
    linear_paths,
    model_type,
    module_paths,
    with_adapters,
)
from specdef_cli.attack.trainings.table import Training
from specdef_cli.runtime import SpecDefLinear, SpecDefScaled


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
        return _config(training, task, module_paths(model, names, FACTORS))

    return with_adapters(model, training, config)


def train_lora_inflated(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """LoRA on the inflated factors of the pairs named, and on the same layers of a control."""
    targets = module_paths(model, training.where, ("inflated",))
    return with_adapters(model, training, lambda: _config(training, task, targets))


def train_lora_compensation(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """LoRA on the compensations of the pairs named, and on the same layers of a control."""
    targets = module_paths(model, training.where, ("compensation",))
    return with_adapters(model, training, lambda: _config(training, task, targets))


def train_lora_around(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """LoRA in parallel to each pair named, and on the same layers of a control."""

    def config() -> LoraConfig:
        made = _config(training, task, list(training.where))
        # PEFT wraps a pair as if it were one linear layer: it has the sizes and the dtype of one.
        made._register_custom_module({SpecDefLinear: Linear, SpecDefScaled: Linear})
        return made

    return with_adapters(model, training, config)


def on_inserted_layers(training: Training, target: Target) -> tuple[Training, ...]:
    """The training with the target's factors spelled out, so that a control is trained at the same places."""
    where = training.where or target.factored
    return (Training(training.method, training.size, where, training.name),) if where else ()


def _config(training: Training, task: Task, targets: list[str] | str, **more: Any) -> LoraConfig:
    rank = int(training.size or 0)
    return LoraConfig(task_type=PEFT_TASKS[task], r=rank, lora_alpha=2 * rank, target_modules=targets, **more)
