"""What ``specdef attack --help`` says below its options: the tables of attacks, other packages' rows included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

if TYPE_CHECKING:
    from specdef_cli.attack.table import Factor


class ListingCommand(TyperCommand):
    """A command whose epilog lists the tables. They are read when help is shown, and not before."""

    @property
    def epilog(self) -> str | None:
        """The tables as Markdown, for the page of commands."""
        return "\n\n".join(
            "\n\n".join((f"{heading}:", *(f"* {name}: {description}" for name, description in rows)))
            for heading, rows in attack_listing()
        )

    @epilog.setter
    def epilog(self, value: Any) -> None:
        """The base class sets what it was given, which is nothing."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the tables below the options, in their form."""
        for heading, rows in attack_listing():
            with formatter.section(heading):
                formatter.write_dl(rows)


def attack_listing() -> list[tuple[str, list[tuple[str, str]]]]:
    """Variants, trainings and optimizers: a heading, and of each its name and its help line."""
    from specdef_cli.attack.optimizers.table import OPTIMIZERS
    from specdef_cli.attack.trainings.table import TRAININGS
    from specdef_cli.attack.variants.table import VARIANTS

    def numbered(name: str, number: Factor | None) -> str:
        return name if number is None else f"{name}:{number.default:g}"

    return [
        (
            "Variants (--variant), by themselves or with a factor",
            [(numbered(row.name, row.factor), row.help) for row in VARIANTS.values()],
        ),
        (
            "Trainings (--training), where it says so with a size and with names",
            [(numbered(row.name, row.size), row.help) for row in TRAININGS.values()],
        ),
        ("Optimizers (--optimizer)", [(row.name, row.help) for row in OPTIMIZERS.values()]),
    ]
