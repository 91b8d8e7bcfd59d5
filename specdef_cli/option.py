"""Fields of the classes of options: a default, and what the command line and the JSON schema say about them.

    steps: int = option(30, "Optimizer steps of every run.")

Fields without option() are for Python alone, or set by a parameter of the command.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from specdef_cli.errors import WrongUsage


@dataclass(frozen=True)
class Spelling:
    """How a field is spelled on the command line.

    Attributes:
        names: Flags, as typer declares them; none means the field's own name.
        metavar: What stands for the value.
        shown_default: What a default of ``None`` or of nothing comes to.
        group: Its group in ``--help``, with words after `` / `` that several options of one row share.
    """

    names: tuple[str, ...] = ()
    metavar: str | None = None
    shown_default: str | None = None
    group: str | None = None


def option(
    default: Any,
    description: str,
    *names: str,
    metavar: str | None = None,
    shown_default: str | None = None,
    group: str | None = None,
) -> Any:
    """A field that the command line takes.

    Args:
        description: A line for ``--help`` and for the schema.
    """
    spelling = Spelling(names, metavar, shown_default, group)
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
    """Refuse whole numbers below 1 among the fields of a class of options."""
    for name in names:
        value = getattr(options, name)
        if value < 1:
            raise WrongUsage(f"{flag_of(type(options), name)} {value} is not positive", "Give 1 or more.")


def as_declared(options: Any) -> None:
    """Make the values of a class of options those that its fields declare, as programs write them by hand.

    Text becomes a path where only a path is meant, and the only element where several texts are. The command line
    checks choices itself; here a word that is none would be taken for the default.
    """
    for name, declared in get_type_hints(type(options)).items():
        value = getattr(options, name)
        if not isinstance(value, str):
            continue
        kinds = (declared,) if get_origin(declared) in (Literal, tuple) else get_args(declared) or (declared,)
        choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        if choices and value not in choices:
            raise WrongUsage(
                f"{flag_of(type(options), name)} {value!r} is unknown", f"Choose one of: {', '.join(choices)}."
            )
        if str in kinds:
            continue
        if Path in kinds:
            object.__setattr__(options, name, Path(value))
        elif any(get_origin(kind) is tuple for kind in kinds):
            object.__setattr__(options, name, (value,))
