"""Fields of the classes of options: a default, and what the command line and the JSON schema say about them.

    steps: int = option(30, "Optimizer steps of every run.")

Fields without option() are for Python alone, or set by a parameter of the command. Durations and sizes are read here.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from numbers import Integral, Real
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args, get_origin, get_type_hints

from specdef_cli.errors import SpecDefError, WrongUsage, clean_token


def option(
    default: Any,
    description: str,
    *names: str,
    metavar: str | None = None,
    shown_default: str | None = None,
    group: str | None = None,
    envvar: str | None = None,
    parse: Callable[[Any], Any] | None = None,
    at_least: float | None = None,
    above: float | None = None,
) -> Any:
    """A field that the command line takes; ``description`` is its line in ``--help`` and in the schema.

    Args:
        names: Flags, as typer declares them; by default the field's own name.
        shown_default: The text for a default of ``None`` or of nothing.
        group: Its group in ``--help``, with words after `` / `` that several options of one row share.
        envvar: The environment variable that gives it, too.
        parse: Makes its value of the text or number that people write; its parameter's type says which.
        at_least, above: Bounds of a number, or of each of several.
    """
    shown = {"names": names, "metavar": metavar, "shown_default": shown_default, "group": group, "envvar": envvar}
    # pydantic takes the description from here.
    bounds = {"at_least": at_least, "above": above}
    return dataclasses.field(default=default, metadata={"description": description, **shown, "parse": parse, **bounds})


def written_type(parse: Callable[[Any], Any]) -> Any:
    """The type of what people write, of which a field's value is made."""
    return next(iter(get_type_hints(parse).values()))


def options_of(model: type) -> Mapping[str, dataclasses.Field[Any]]:
    """The fields of a class that the command line takes, by name; its own come before those that it inherits."""
    fields = sorted(dataclasses.fields(model), key=lambda field: field.name not in inspect.get_annotations(model))
    return {field.name: field for field in fields if "names" in field.metadata}


def flag_of(model: type, name: str) -> str:
    """The flag that sets a field, for messages: ``--weight-decay``."""
    field = options_of(model).get(name)
    names = field.metadata["names"] if field else ()
    return names[0].split("/")[0] if names else f"--{name.replace('_', '-')}"


def as_declared(options: Any) -> None:
    """Make the values of a class of options those that its fields declare, as programs write them by hand.

    Sizes and durations are parsed. Text becomes a path where only a path is meant. A list becomes a tuple, and so does
    what stands alone where several are meant. The command line checks choices and types itself; here a word that is
    none would be taken for the default.
    """
    hints = get_type_hints(type(options))
    for field in dataclasses.fields(options):
        name, declared, value = field.name, hints[field.name], getattr(options, field.name)
        parse = field.metadata.get("parse")
        if parse is not None and isinstance(value, int if written_type(parse) is int else str):
            object.__setattr__(options, name, parse(value))
            continue
        if isinstance(value, Path):  # no shell expands --out=~/here
            object.__setattr__(options, name, value.expanduser())
        kinds = (declared,) if get_origin(declared) in (Literal, tuple) else get_args(declared) or (declared,)
        several = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple), None)
        if several is not None and isinstance(value, list | Real):
            value = tuple(value) if isinstance(value, list) else (value,)
            object.__setattr__(options, name, value)
        item = several or next((kind for kind in kinds if {*kinds} <= {kind, type(None)}), None)
        numbers: dict[Any, tuple[type, str]] = {int: (Integral, "a whole number"), float: (Real, "a number")}
        number, called = numbers.get(item, (object, ""))
        at_least, above = (field.metadata.get(bound) for bound in ("at_least", "above"))
        if at_least is not None or above is not None:
            called += f" of at least {at_least}" if above is None else f" above {above}"
        for each in value if several is not None and isinstance(value, tuple) else (value,):
            if each is None and type(None) in kinds:
                continue
            if not isinstance(each, number) or not _within(each, at_least, above):
                raise WrongUsage(
                    f"{flag_of(type(options), name)} {each if isinstance(each, Real) else repr(each)} is not {called}",
                    f"Give {called}.",
                )
        if not isinstance(value, str):
            continue
        choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        if choices and value not in choices:
            raise WrongUsage(
                f"{flag_of(type(options), name)} {value!r} is unknown", f"Choose one of: {', '.join(choices)}."
            )
        if str in kinds:
            continue
        if Path in kinds:
            object.__setattr__(options, name, Path(value).expanduser())
        elif several is not None:
            object.__setattr__(options, name, (value,))


def _within(value: Any, at_least: float | None, above: float | None) -> bool:
    """Whether a number is finite and within its bounds; what has none is."""
    if at_least is None and above is None:
        return True
    return math.isfinite(value) and (value >= at_least if at_least is not None else value > above)


@dataclass(frozen=True)
class Source:
    """A model, where it is found, and what it may do: the first options of most commands."""

    model: str | Path
    """A directory, or a Hub id ``org/name[@revision]``."""
    _: KW_ONLY
    manifest: Path | None = option(
        None, "specdef.json.", metavar="FILE", shown_default="the directory's", group="Model"
    )
    """Of a hardened model, where it does not lie in its directory."""
    revision: str | None = option(
        None, "Branch, tag or commit.", metavar="NAME", shown_default="main", group="Model / On the Hub."
    )
    token: str | None = option(
        None, "Hub token.", metavar="TOKEN", shown_default="HF_TOKEN, else the login", group="Model / On the Hub.",
        envvar="HF_TOKEN",
    )  # fmt: skip
    subfolder: str | None = option(
        None, "Folder in MODEL that the model is in.", metavar="DIR", group="Model / Folder that the model is in."
    )
    trust_remote_code: bool = option(False, "Run Python code that comes with the model.", group="Model")

    def __post_init__(self) -> None:
        as_declared(self)
        token = clean_token(self.token)
        if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
            raise WrongUsage("the token holds white space or characters that no token has", "Check --token, HF_TOKEN.")
        object.__setattr__(self, "token", token)
        model, subfolder = in_subfolder(self.model, self.subfolder)
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "subfolder", subfolder)


def in_subfolder(model: str | Path, subfolder: str | None) -> tuple[str | Path, str | None]:
    """Resolve a subfolder: of a local directory, the folder itself; of a repository, its name there."""
    if subfolder is None:
        return model, None
    parts = PurePosixPath(subfolder).parts
    if not parts or ".." in parts or parts[0] == "/" or "\\" in subfolder:
        raise WrongUsage(f"the subfolder {subfolder!r} does not lie in {model}", "Name a folder of it, such as unet.")
    inside = "/".join(parts)
    if not (str(model) and Path(model).expanduser().is_dir()):
        return model, inside
    folder = Path(model).expanduser() / inside
    if not folder.is_dir():
        raise SpecDefError(f"{model} has no folder {inside}", "Check --subfolder, or leave it out.")
    return str(folder), None


def into_folder(options: Any, name: str) -> None:
    """Place the second model that a class of options has under ``name`` in its folder, ``NAME_subfolder``."""
    model, subfolder = getattr(options, name), getattr(options, f"{name}_subfolder")
    if model is None and subfolder is not None:
        raise WrongUsage(
            f"--{name}-subfolder is a folder of --{name}, which is not given", f"Give --{name} {name.upper()}."
        )
    if model is not None:
        model, subfolder = in_subfolder(model, subfolder)
        object.__setattr__(options, name, model)
        object.__setattr__(options, f"{name}_subfolder", subfolder)


def parse_duration(text: str, option: str = "--time-limit") -> float:
    """Seconds of a duration as users write it: ``45m``, ``1h30m``, ``90s``."""
    match = re.fullmatch(r"\s*(?:(\d+(?:\.\d+)?)h)?\s*(?:(\d+(?:\.\d+)?)m(?:in)?)?\s*(?:(\d+(?:\.\d+)?)s)?\s*", text)
    parts = match.groups() if match else ()
    seconds = sum(float(part or 0) * unit for part, unit in zip(parts, (3600, 60, 1), strict=bool(parts)))
    if not 0 < seconds < math.inf:
        raise WrongUsage(f"{option} {text!r} is not a duration", "Write it like 45m, 1h30m or 90s.")
    return seconds


def in_words(seconds: float) -> str:
    """A duration for people: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB`` or ``500MB``."""
    unit = text.strip().upper().lstrip("0123456789.")
    number = text.strip()[: len(text.strip()) - len(unit)]
    try:
        size = int(float(number) * UNITS[unit.strip()])
    except (KeyError, ValueError, OverflowError) as error:
        raise WrongUsage(f"{text!r} is not a size", "Write it like 5GB or 500MB.") from error
    if size <= 0:
        raise WrongUsage(f"{text!r} is not a positive size", "Write it like 5GB or 500MB.")
    return size
