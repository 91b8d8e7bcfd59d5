"""Fields of the classes of options: a default, and what the command line and the JSON schema say about them.

    steps: int = option(30, "Optimizer steps of every run.")

A field without this is for programs alone, or the command has a parameter of its own that says it in another way.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specdef_cli.errors import SpecDefError


@dataclass(frozen=True)
class Spelling:
    """How a field is spelled on the command line.

    Attributes:
        names: Flags, as typer declares them; none means the field's own name.
        metavar: What stands for the value.
        shown_default: What a default of ``None`` or of nothing comes to.
    """

    names: tuple[str, ...] = ()
    metavar: str | None = None
    shown_default: str | None = None


def option(
    default: Any, description: str, *names: str, metavar: str | None = None, shown_default: str | None = None
) -> Any:
    """A field that the command line takes.

    Args:
        default: The one that holds, for programs and on the command line.
        description: A line for ``--help`` and for the schema.
        names, metavar, shown_default: As :class:`Spelling` has them.
    """
    spelling = Spelling(names, metavar, shown_default)
    # pydantic takes the description from here.
    return dataclasses.field(default=default, metadata={"description": description, "spelling": spelling})


def options_of(model: type) -> Mapping[str, dataclasses.Field[Any]]:
    """The fields of a class that the command line takes, by name; its own come before those that it inherits."""
    fields = sorted(dataclasses.fields(model), key=lambda field: field.name not in inspect.get_annotations(model))
    return {field.name: field for field in fields if "spelling" in field.metadata}


def flag_of(model: type, name: str) -> str:
    """The flag that sets a field, for messages: ``--weight-decay``."""
    field = options_of(model).get(name)
    names = field.metadata["spelling"].names if field else ()
    return names[0].split("/")[0] if names else f"--{name.replace('_', '-')}"


def require_positive(options: Any, *names: str) -> None:
    """Refuse whole numbers below 1 among the fields of a class of options.

    Raises:
        SpecDefError: naming the flag and the number.
    """
    for name in names:
        value = getattr(options, name)
        if value < 1:
            raise SpecDefError(f"{flag_of(type(options), name)} {value} is not positive", "Give 1 or more.")
