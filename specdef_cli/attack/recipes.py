"""What is trained: every parameter, those a glob names, or adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from peft import IA3Config, LoraConfig, PeftConfig, PromptTuningConfig, TaskType, get_peft_model
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as IA3_FEEDFORWARD,
)
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3_TARGETS,
)
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS,
)
from torch import nn
from transformers import PreTrainedModel

from specdef_cli.attack.channel_rates import parameter_name
from specdef_cli.attack.expansions import hardened_paths, original_name
from specdef_cli.attack.spec import Task
from specdef_cli.attack.training import ADAPTERS, Training
from specdef_cli.errors import SpecDefError
from specdef_cli.runtime import SpecDefLinear

PROMPT_TOKENS = 16

_PEFT_TASKS: dict[Task, TaskType | None] = {
    "causal-lm": TaskType.CAUSAL_LM,
    "seq2seq-lm": TaskType.SEQ_2_SEQ_LM,
    "masked-lm": None,
    "sequence-classification": TaskType.SEQ_CLS,
    "image-classification": None,
}


class NothingToTrain(SpecDefError):
    """The model has nothing of what was to be trained."""


def apply_recipe(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """Set which parameters train. What a variant has frozen stays frozen.

    Returns:
        The model, or PEFT's wrapper around it.

    Raises:
        NothingToTrain: A glob or a target matches nothing, or nothing is left to train.
    """
    if training.method != "full":
        return _with_adapters(model, training, task)
    if training.parameters:
        train_only(model, training.parameters)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise NothingToTrain(
            f"nothing is left to train by --train {' '.join(training.parameters)} on this variant",
            "Choose other parameters, or another variant.",
        )
    return model


def train_only(model: nn.Module, globs: Iterable[str]) -> None:
    """Freeze every parameter that no glob names.

    Factors answer to the original layer's name too, so that one glob means the same on the control and on the
    hardened model.

    Raises:
        NothingToTrain: A glob names no parameter.
    """
    layers = hardened_paths(model)
    patterns = tuple(globs)
    unused = set(patterns)
    for full_name, parameter in model.named_parameters():
        name = parameter_name(full_name)
        names = {name, original_name(name, layers)}
        hits = {pattern for pattern in patterns if any(fnmatchcase(each, pattern) for each in names)}
        unused -= hits
        parameter.requires_grad_(parameter.requires_grad and bool(hits))
    if unused:
        examples = [name for name, _ in model.named_parameters()]
        raise NothingToTrain(
            f"--train {min(unused)} names no parameter of {type(model).__name__}",
            f"Write it like {examples[len(examples) // 2]}, with * for any part.",
        )


def parameter_groups(model: PreTrainedModel) -> tuple[Training, ...]:
    """Each kind of parameter alone: embeddings, norms, the head, and each linear of a block over all blocks.

    What no inflated layer touches trains as if nothing had happened, and this is how to find it.

    Args:
        model: The control; on the meta device is enough.
    """
    groups: dict[str, list[str]] = {}
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if module is head:
                kind = "head"
            elif isinstance(module, nn.Embedding):
                kind = "embeddings"
            elif "norm" in type(module).__name__.lower():
                kind = "norms"
            else:
                # An expert's stacked tensors are parameters of one module; a linear's weight goes by its module.
                parts = [part for part in f"{path}.{name}".split(".") if part not in ("weight", "bias", "")]
                kind = parts[-1]
            glob = re.sub(r"(?<=\.)\d+(?=\.)", "*", f"{path}.{name}".lstrip("."))
            groups.setdefault(kind, []).append(glob)
    known = {name for name, _ in model.named_parameters()}  # a tied parameter goes by its first name alone
    trainings = []
    for kind, globs in groups.items():
        named = tuple(dict.fromkeys(glob for glob in globs if any(fnmatchcase(name, glob) for name in known)))
        if named:
            trainings.append(Training(parameters=named, name=f"{kind} alone"))
    return tuple(trainings)


def _with_adapters(model: nn.Module, training: Training, task: Task) -> nn.Module:
    try:
        return get_peft_model(model, _adapter_config(model, training, task))
    except (ValueError, NotImplementedError, TypeError, AttributeError) as error:
        raise NothingToTrain(
            f"{ADAPTERS[training.method]} cannot be put on {','.join(training.targets) or 'this model'}: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}",
            "Name linear layers of this model with --lora-targets.",
        ) from error


def _adapter_config(model: nn.Module, training: Training, task: Task) -> PeftConfig:
    kind = _PEFT_TASKS[task]
    if training.method == "prompt":
        return PromptTuningConfig(task_type=kind, num_virtual_tokens=PROMPT_TOKENS)
    if training.method == "ia3":
        # PEFT knows where IA³ goes on the usual architectures, and that it scales what an MLP's last linear reads.
        family = getattr(model.config, "model_type", "")
        names, readers = IA3_TARGETS.get(family), IA3_FEEDFORWARD.get(family)
        targets = training.targets or tuple(names or ())
        return IA3Config(
            task_type=kind,
            target_modules=_paths(model, targets, ("inflated",)) or None,
            feedforward_modules=_paths(model, tuple(readers or ()), ("inflated",)),
        )
    config = LoraConfig(
        task_type=kind,
        r=training.rank or 16,
        lora_alpha=training.alpha or 32.0,
        target_modules=_lora_targets(model, training),
        use_dora=training.method == "dora",
    )
    if training.placement == "around":
        # PEFT wraps a pair as if it were one linear layer: it has the sizes and the dtype of one.
        from peft.tuners.lora import Linear

        config._register_custom_module({SpecDefLinear: Linear})
    return config


def _lora_targets(model: nn.Module, training: Training) -> list[str] | str:
    if training.placement == "around":
        return list(training.targets)
    names = training.targets
    if training.peft_default:
        names = tuple(LORA_TARGETS.get(getattr(model.config, "model_type", ""), ()))
        if not names:
            raise ValueError(f"PEFT has no default targets for {getattr(model.config, 'model_type', 'this model')}")
    parts = ("inflated", "compensation") if training.placement == "linears" else (training.placement,)
    return _paths(model, names, parts) if names else "all-linear"


def _paths(model: nn.Module, names: tuple[str, ...], parts: tuple[str, ...]) -> list[str]:
    """Modules by the end of their names, as PEFT takes them; of a hardened layer, the named factors.

    Where a name means none, it is passed on, for PEFT to say so.
    """
    hardened = set(hardened_paths(model))
    modules = [path for path, _ in model.named_modules()]
    found: list[str] = []
    for name in names:
        paths = [path for path in modules if path == name or path.endswith(f".{name}")]
        for path in paths:
            found += [f"{path}.{part}" for part in parts] if path in hardened else [path]
        found += [] if paths else [name]
    return list(dict.fromkeys(found))
