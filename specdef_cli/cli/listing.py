"""``specdef attack --list``: the tables of attacks, other packages' rows included."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from specdef_cli.attack.table import Factor


@dataclass(frozen=True)
class Entry:
    """One thing that an option takes: its spelling, with its usual number, and what it is."""

    name: str
    help: str


@dataclass(frozen=True)
class Listing:
    """Everything that ``attack`` can run, by the option that takes it."""

    variants: tuple[Entry, ...]
    trainings: tuple[Entry, ...]
    optimizers: tuple[Entry, ...]
    suites: tuple[Entry, ...]


def attack_listing() -> Listing:
    """Read the tables."""
    from specdef_cli.attack.optimizers import OPTIMIZERS
    from specdef_cli.attack.options import load_suite, suite_names
    from specdef_cli.attack.trainings import TRAININGS
    from specdef_cli.attack.variants import VARIANTS

    suites = {name: load_suite(name) for name in suite_names()}
    return Listing(
        variants=tuple(Entry(_numbered(row.name, row.factor), row.help) for row in VARIANTS.values()),
        trainings=tuple(Entry(_numbered(row.name, row.size), row.help) for row in TRAININGS.values()),
        optimizers=tuple(Entry(row.name, row.help) for row in OPTIMIZERS.values()),
        suites=tuple(Entry(name, suite.description) for name, suite in suites.items()),
    )


def listing_tables(listing: Listing) -> Iterable[Table | str]:
    """The listing as the terminal shows it."""
    from rich.table import Table
    from rich.text import Text

    headings = (
        ("--variant", "what is done to the model first", listing.variants),
        ("--training", "what is trained: NAME, NAME:SIZE or NAME@NAMES", listing.trainings),
        ("--optimizer", "", listing.optimizers),
        ("--suite", "", listing.suites),
    )
    for flag, words, entries in headings:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        for entry in entries:
            table.add_row(Text(f"  {entry.name}"), Text(entry.help))
        yield f"{flag}: {words}" if words else flag
        yield table
        yield ""


def _numbered(name: str, number: Factor | None) -> str:
    return name if number is None else f"{name}:{number.default:g}"
