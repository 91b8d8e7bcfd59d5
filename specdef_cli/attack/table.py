"""Tables of attacks: what comes with the package, and what other installed packages add.

A table maps names to rows. A row is data: it names the function or the class it stands for as ``package.module:name``,
so that nothing is imported before it is used. Another package adds a row by an entry point of the table's group, whose
object is a row (``docs/add-an-attack.md``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, Protocol, TypeVar

from specdef_cli.errors import SpecDefError, WrongUsage, first_line


class Row(Protocol):
    """What every row has."""

    @property
    def name(self) -> str:
        """What users call it."""

    @property
    def help(self) -> str:
        """One line for ``--help``."""


RowType = TypeVar("RowType", bound=Row)


class Table(Mapping[str, RowType], Generic[RowType]):
    """Rows by name: the package's own in their order, then those of other packages."""

    def __init__(self, kind: str, group: str, row_type: type[RowType], rows: Iterable[RowType]) -> None:
        self.kind = kind
        self.group = group
        self._row_type = row_type
        self._rows = {row.name: row for row in rows}

    @cached_property
    def _added(self) -> dict[str, EntryPoint]:
        """The entry points of other packages, not yet loaded."""
        return {point.name: point for point in sorted(entry_points(group=self.group), key=lambda point: point.name)}

    def __getitem__(self, name: str) -> RowType:
        if name not in self._rows:
            self._rows[name] = self._load(self._added[name])
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys((*self._rows, *self._added))

    def __len__(self) -> int:
        return len({*self._rows, *self._added})

    def choose(self, name: str) -> RowType:
        """Look up a name that a user gave."""
        if name not in self:
            raise WrongUsage(f"{self.kind} {name!r} is unknown", f"Choose one of: {', '.join(self)}.")
        return self[name]

    def __contains__(self, name: object) -> bool:
        return name in self._rows or name in self._added

    def _load(self, point: EntryPoint) -> RowType:
        origin = f"{self.kind} {point.name!r} of the package {point.dist.name if point.dist else point.value}"
        try:
            row = point.load()
        except Exception as error:  # code of another package: anything can happen when it is imported
            raise SpecDefError(
                f"the {origin} cannot be imported: {first_line(error)}", "Repair or uninstall it."
            ) from error
        if not isinstance(row, self._row_type) or row.name != point.name:
            raise SpecDefError(
                f"the {origin} is {row!r}, not a {self._row_type.__name__} of that name",
                "Repair the package's entry point, or uninstall it.",
            )
        return row


@dataclass(frozen=True)
class Factor:
    """The number after the colon in ``width:2`` and ``lora:16``."""

    meaning: str
    default: float
    above: float = 0.0  # it is larger than this
    whole: bool = True  # whether it is a whole number

    def check(self, value: float) -> float:
        """``value`` itself, as an ``int`` where it is a whole number."""
        if not (math.isfinite(value) and value > self.above) or (self.whole and value != int(value)):
            kind = "a whole number" if self.whole else "a number"
            raise WrongUsage(
                f"{self.meaning} {value:g} is not {kind} above {self.above:g}", f"Give e.g. {self.default:g}."
            )
        return int(value) if value == int(value) else float(value)


def parse_number(owner: str, text: str) -> float:
    """Read a number as users write it behind a colon: ``2``, ``1.5``, ``2x``, ``2×``."""
    try:
        return float(text.strip().rstrip("xX×"))
    except ValueError:
        raise WrongUsage(f"{text!r} is not a number for {owner}", f"Write it like {owner}:2.") from None


def checked_factor(owner: str, factor: Factor | None, value: float | None) -> float | None:
    """Check the factor that a user gave, or take the row's default."""
    if factor is None:
        if value is not None:
            raise WrongUsage(f"the {owner} takes no factor, and was given {value:g}", "Leave out the part after ':'.")
        return None
    return factor.check(factor.default if value is None else value)


class NotApplicable(SpecDefError):
    """The model has nothing that a variant works on, or nothing of what was to be trained."""
