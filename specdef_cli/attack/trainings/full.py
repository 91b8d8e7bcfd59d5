"""Train the model's own parameters: all of them, those that globs name, or all but those that globs with ! name."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from specdef_cli.attack.errors import NotApplicable
from specdef_cli.attack.target import Task
from specdef_cli.attack.trainings.table import Training
from specdef_cli.attack.variants.channel_rates import parameter_name
from specdef_cli.attack.variants.inserted_layers import hardened_paths, original_name


def train_parameters(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """Freeze every parameter that the training does not name.

    Raises:
        NotApplicable: A glob names no parameter, or nothing is left to train.
    """
    if training.where:
        train_only(model, training.where)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise NotApplicable(
            f"nothing is left to train by --training {training} on this variant",
            "Choose other parameters, or another variant.",
        )
    return model


def train_only(model: nn.Module, globs: Iterable[str]) -> None:
    """Freeze every parameter that no glob names, and every one that a glob with ``!`` in front names.

    Factors answer to the original layer's name too, so that one glob means the same on the control and on the
    hardened model.

    Raises:
        NotApplicable: A glob names no parameter.
    """
    layers = hardened_paths(model)
    patterns = tuple(globs)
    wanted = tuple(pattern for pattern in patterns if not pattern.startswith("!")) or ("*",)
    frozen = tuple(pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!"))
    unused = {pattern.removeprefix("!") for pattern in patterns}
    for full_name, parameter in model.named_parameters():
        name = parameter_name(full_name)
        names = {name, original_name(name, layers)}
        hits, misses = (
            {pattern for pattern in some if any(fnmatchcase(candidate, pattern) for candidate in names)}
            for some in (wanted, frozen)
        )
        unused -= hits | misses
        parameter.requires_grad_(parameter.requires_grad and bool(hits) and not misses)
    if unused:
        examples = [name for name, _ in model.named_parameters()]
        raise NotApplicable(
            f"{min(unused)} names no parameter of {type(model).__name__}",
            f"Write it like {examples[len(examples) // 2]}, with * for any part.",
        )
