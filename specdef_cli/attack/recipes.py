"""What is trained: every parameter, those a glob names, or adapters."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

from specdef_cli.attack.expansions import hardened_paths, original_name
from specdef_cli.attack.spec import RunSpec
from specdef_cli.errors import SpecDefError

_PEFT_TASKS = {"causal-lm": TaskType.CAUSAL_LM, "sequence-classification": TaskType.SEQ_CLS}


def apply_recipe(model: nn.Module, spec: RunSpec) -> nn.Module:
    """Set which parameters train. What a variant has frozen stays frozen.

    Returns:
        The model, or PEFT's wrapper around it.

    Raises:
        SpecDefError: A glob or a LoRA target matches nothing, or nothing is left to train.
    """
    if spec.recipe == "lora":
        return _with_adapters(model, spec)
    if spec.train:
        train_only(model, spec.train)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SpecDefError(
            f"nothing is left to train by --train {' '.join(spec.train)} on this variant",
            "Choose other parameters, or another variant.",
        )
    return model


def train_only(model: nn.Module, globs: Iterable[str]) -> None:
    """Freeze every parameter that no glob names.

    Factors answer to the original layer's name too, so that one glob means the same on the control and on the
    hardened model.

    Raises:
        SpecDefError: A glob names no parameter.
    """
    layers = hardened_paths(model)
    patterns = tuple(globs)
    unused = set(patterns)
    for name, parameter in model.named_parameters():
        names = {name, original_name(name, layers)}
        hits = {pattern for pattern in patterns if any(fnmatchcase(each, pattern) for each in names)}
        unused -= hits
        parameter.requires_grad_(parameter.requires_grad and bool(hits))
    if unused:
        examples = [name for name, _ in model.named_parameters()]
        raise SpecDefError(
            f"--train {min(unused)} names no parameter of {type(model).__name__}",
            f"Write it like {examples[len(examples) // 2]}, with * for any part.",
        )


def _with_adapters(model: nn.Module, spec: RunSpec) -> nn.Module:
    assert spec.lora_rank is not None
    assert spec.lora_alpha is not None
    config = LoraConfig(
        task_type=_PEFT_TASKS[spec.task],
        r=spec.lora_rank,
        lora_alpha=spec.lora_alpha,
        target_modules=list(spec.lora_targets) or "all-linear",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise SpecDefError(
            f"LoRA cannot be put on {','.join(spec.lora_targets) or 'all-linear'}: {str(error).splitlines()[0]}",
            "Name linear layers of this model with --lora-targets.",
        ) from error
