"""IA³ (Liu et al. 2022, arXiv 2205.05638): a trained factor for each channel."""

from __future__ import annotations

from peft import IA3Config
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD,
)
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as DEFAULT_TARGETS,
)
from torch import nn

from specdef_cli.attack.target import Task
from specdef_cli.attack.trainings.adapters import PEFT_TASKS, model_type, module_paths, with_adapters
from specdef_cli.attack.trainings.table import Training


def train_ia3(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """IA³ where PEFT puts it on this architecture, or on the modules named; of an inserted pair, on W~.

    PEFT knows the usual architectures, and that IA³ scales what an MLP's last linear reads.
    """

    def config() -> IA3Config:
        family = model_type(model)
        return IA3Config(
            task_type=PEFT_TASKS[task],
            target_modules=_paths(model, training.where or tuple(DEFAULT_TARGETS.get(family) or ())) or None,
            feedforward_modules=_paths(model, tuple(FEEDFORWARD.get(family) or ())),
        )

    return with_adapters(model, training, config)


def _paths(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    return module_paths(model, names, ("inflated",))
