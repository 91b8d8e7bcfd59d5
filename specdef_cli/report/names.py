"""Attacks as people name them, and as the command line spells them."""

from __future__ import annotations

from specdef_cli.attack.results import Attack


def training_name(attack: Attack) -> str:
    """What is trained and by what, as people say it: ``full fine-tuning with SGD``."""
    label = attack.training.label
    if attack.training.method == "full" and not attack.training.name:
        label = "full fine-tuning" + label.removeprefix("full")
    name = label.replace(" all-linear", " on every linear")
    return name if attack.optimizer == "adamw" else f"{name} with {attack.optimizer}"


def attack_name(attack: Attack) -> str:
    """The whole attack as people say it: ``undone first (rebalanced), full fine-tuning``."""
    variant = attack.variant.label
    if not variant:
        return training_name(attack)
    first = f"undone first ({variant})" if attack.variant.choice.informed is not None else variant
    return first if attack.edit is not None else f"{first}, {training_name(attack)}"


def spelling(attack: Attack) -> str:
    """The flags that run an attack alone."""
    parts = [f"--training {attack.training}"]
    parts += [f"--variant {attack.variant}"] if attack.variant.label else []
    parts += [f"--optimizer {attack.optimizer}"] if attack.optimizer != "adamw" else []
    return " ".join(parts)
