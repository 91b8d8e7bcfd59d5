"""What ``specdef attack --help`` says below its options: the tables of attacks, other packages' rows included."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


class ListingCommand(TyperCommand):
    """A command whose epilog lists the tables. They are read when help is shown, and not before."""

    @property
    def epilog(self) -> str | None:
        """The tables."""
        return attack_listing()

    @epilog.setter
    def epilog(self, value: Any) -> None:
        """The base class sets what it was given, which is nothing."""


def attack_listing() -> str:
    """Variants, trainings and optimizers with their help lines, a paragraph each."""
    from specdef_cli.attack.optimizers.table import OPTIMIZERS
    from specdef_cli.attack.trainings.table import TRAININGS
    from specdef_cli.attack.variants.table import VARIANTS

    paragraphs = ["Variants (--variant), by themselves or with a factor:"]
    for variant in VARIANTS.values():
        factor = "" if variant.factor is None else f":{variant.factor.default:g}"
        paragraphs.append(f"* {variant.name}{factor}: {variant.help}")
    paragraphs.append("Trainings (--training), where it says so with a size and with names:")
    for training in TRAININGS.values():
        size = "" if training.size is None else f":{training.size.default:g}"
        paragraphs.append(f"* {training.name}{size}: {training.help}")
    paragraphs.append("Optimizers (--optimizer):")
    paragraphs += [f"* {optimizer.name}: {optimizer.help}" for optimizer in OPTIMIZERS.values()]
    return "\n\n".join(paragraphs)
