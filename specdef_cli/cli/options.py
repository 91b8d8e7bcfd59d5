"""Options of commands: those that several share, those that derive from a class, and their page of ``--help``."""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, is_dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from specdef_cli.option import option, options_of, written_type

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A directory, or a Hub id org/name[@revision].")]


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Options of commands that upload."""

    private: bool = option(False, "Make the repository private if it is new.", group="Upload")
    create_pr: bool = option(False, "Upload as a pull request.", group="Upload")


Command = Callable[..., None]


def takes(*models: type, without: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """Give a command a parameter for every option of ``models``, in place of its ``**given``.

    ``given`` then holds what the user gave and nothing else, so that the defaults of ``models`` hold, which ``--help``
    shows. A list arrives as the tuple that a frozen class holds. A parameter whose type is a class of options
    (``output: Output``) stands for the options of that class, and gets one that is made of them.
    """

    def decorate(command: Command) -> Command:
        declared = inspect.signature(command, eval_str=True).parameters
        made: dict[str, Any] = {
            name: each.annotation for name, each in declared.items() if is_dataclass(each.annotation)
        }
        own = {name: each for name, each in declared.items() if name not in made and name != "given"}
        derived = {
            name: _parameter(field, get_type_hints(model)[name])
            for model in (*models, *made.values())
            for name, field in options_of(model).items()
            if model not in models or name not in without
        }

        @functools.wraps(command)
        def run(context: typer.Context, **arguments: Any) -> None:
            given: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) and name not in own else value
                for name, value in arguments.items()
                if name in own or context.get_parameter_source(name).name != "DEFAULT"  # type: ignore[union-attr]
            }
            for name, kind in made.items():
                given[name] = kind(**{each: given.pop(each) for each in options_of(kind) if each in given})
            given["output"].begin()
            command(**given)

        context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in {**derived, **own}.values()]
        run.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in (context, *parameters)}
        return run

    return decorate


def _parameter(field: Field[Any], hint: Any) -> inspect.Parameter:
    given, parse, metavar = field.metadata, field.metadata["parse"], field.metadata["metavar"]
    kind: Any = _first(hint) if parse is None else written_type(parse)
    many = get_origin(kind) is tuple
    if many:
        item: Any = _first(get_args(kind)[0])
        kind = list[item]
        metavar = f"{metavar or item.__name__.upper()}…"
    names = given["names"] or ((f"--{field.name.replace('_', '-')}",) if kind is bool else ())
    shown = typer.Option(
        *names,
        help=given["description"],
        metavar=metavar,
        show_default=given["shown_default"] or True,
        rich_help_panel=given["group"],
        envvar=given["envvar"],
        show_envvar=False,
    )
    default = None if parse is not None else field.default or None if many else field.default
    if default is None:
        kind |= None
    annotation: Any = Annotated[kind, shown]
    if default is MISSING:
        default = inspect.Parameter.empty
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _first(hint: Any) -> Any:
    """The first member of a union, from which the others are made."""
    return get_args(hint)[0] if get_origin(hint) in (Union, UnionType) else hint


GROUPS = ("Model", "Data", "Attacks", "Budget", "Measurements", "Method", "Upload", "Output")
"""In their order; an option without a group, such as ``--help``, stands in the last one."""

LEGEND = "Defaults are in brackets; an option with … can be repeated."
WIDEST_FLAG = 24
SHARED = " / "
DEFAULT = re.compile(r"default: (.*?)(?:; required)?\]$")


class GroupedCommand(TyperCommand):
    """A command that shows its options in groups."""

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write the first paragraph, the examples, and what else the docstring says."""
        paragraphs = [part.strip().replace("\b\n", "") for part in (self.help or "").split("\n\n")]
        examples = [part for part in paragraphs if part.startswith("specdef ")]
        texts = [part for part in paragraphs if part not in (*examples, "Examples:")]
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(" ".join(" ".join(texts).split()))
            formatter.write_text(LEGEND)
        if examples:
            with formatter.section("Examples"):
                for example in examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{example}\n")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section a group, all with one width of flags."""
        shown = [parameter for parameter in self.get_params(ctx) if not getattr(parameter, "hidden", False)]
        shown.sort(key=lambda parameter: parameter.param_type_name)  # arguments before options
        for group in GROUPS:
            members = [parameter for parameter in shown if _group(parameter)[0] == group]
            if members:
                with formatter.section(group):
                    for flags, text in _rows(members, ctx):
                        _write_row(formatter, flags, text)


def _group(parameter: Any) -> tuple[str, str]:
    """The group of a parameter, and the words that it shares with others."""
    default = "Model" if parameter.param_type_name == "argument" else GROUPS[-1]
    group, _, words = (getattr(parameter, "rich_help_panel", None) or default).partition(SHARED)
    return group, words


def _rows(members: Sequence[Any], ctx: Any) -> Iterator[tuple[str, str]]:
    """Flags and text of every row; rows of several options come last."""
    rows: dict[str, list[Any]] = {}
    for parameter in members:
        rows.setdefault(_group(parameter)[1] or parameter.name, []).append(parameter)
    for words, alike in sorted(rows.items(), key=lambda row: len(row[1]) > 1):
        if len(alike) == 1:
            words = str(alike[0].help or "")
        flags = _flags(alike, ctx)
        text = words.removesuffix(".")
        defaults = list(dict.fromkeys(filter(None, (_default(each, ctx) for each in alike))))
        yield flags, " ".join([text, *([f"[{', '.join(defaults)}]"] if defaults else [])])


def _flags(parameters: Sequence[Any], ctx: Any) -> str:
    """Flags and their values; a kind of value that all of them have stands once, at the end."""
    values = ["" if _is_flag(each) else str(each.display_type_rich(ctx=ctx)) for each in parameters]
    if len(set(values)) == 1:
        return " ".join([", ".join(map(_names, parameters)), *filter(None, values[:1])])
    return ", ".join(f"{_names(each)} {value}".rstrip() for each, value in zip(parameters, values, strict=True))


def _is_flag(parameter: Any) -> bool:
    return parameter.param_type_name == "argument" or parameter.is_flag


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.metavar)
    if parameter.secondary_opts:  # all of them are on by default
        return ", ".join(f"--[no-]{name.removeprefix('--')}" for name in parameter.opts)
    return ", ".join(sorted(parameter.opts, key=lambda name: name.startswith("--")))


def _default(parameter: Any, ctx: Any) -> str:
    """Click's text after ``default:``, without parentheses."""
    if getattr(parameter, "secondary_opts", ()):
        return ""
    found = DEFAULT.search(parameter.get_help_record(ctx)[1])
    return found[1].strip("()").removesuffix(".0") if found else ""


def _write_row(formatter: Any, flags: str, text: str) -> None:
    """Write flags and text on one line if they fit, else the text below, behind the column of flags."""
    indent = " " * formatter.current_indent
    column = " " * (len(indent) + WIDEST_FLAG + 2)
    fill = functools.partial(textwrap.fill, width=formatter.width, subsequent_indent=column, break_on_hyphens=False)
    head = f"{indent}{flags}  "
    if len(head) <= len(column) or len(head + text) <= formatter.width:
        formatter.write(fill(text, initial_indent=head.ljust(len(column))) + "\n")
    else:
        formatter.write(fill(flags, initial_indent=indent, subsequent_indent=indent) + "\n")
        formatter.write(fill(text, initial_indent=column) + "\n")
