"""Parameters of a command that derive from the fields of its class of options (:mod:`specdef_cli.option`)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import Field
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from specdef_cli.option import options_of

Command = Callable[..., None]


def takes(*models: type) -> Callable[[Command], Command]:
    """Give a command, in place of its ``**given``, a parameter for every option of ``models`` that it does not declare.

    ``given`` then holds what the user gave and nothing else, so that the defaults of ``models`` hold, which ``--help``
    shows. A list arrives as the tuple that a frozen class holds. A declared parameter stands in ``--help`` where the
    option of its name does.
    """

    def decorate(command: Command) -> Command:
        declared = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        own = {parameter.name: parameter for parameter in declared}
        derived = [
            own.get(name) or _parameter(field, get_type_hints(model)[name])
            for model in models
            for name, field in options_of(model).items()
        ]
        derived += [parameter for parameter in declared if parameter not in derived]

        @functools.wraps(command)
        def run(context: typer.Context, **arguments: Any) -> None:
            given = {
                name: tuple(value) if isinstance(value, list) and name not in own else value
                for name, value in arguments.items()
                if name in own or context.get_parameter_source(name).name != "DEFAULT"  # type: ignore[union-attr]
            }
            command(**given)

        context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (context, *derived)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _parameter(field: Field[Any], hint: Any) -> inspect.Parameter:
    spelling, description = field.metadata["spelling"], field.metadata["description"]
    kind: Any = _first(hint)
    many = get_origin(kind) is tuple
    metavar = spelling.metavar
    if many:
        item: Any = _first(get_args(kind)[0])
        kind = list[item]
        metavar = f"{metavar or item.__name__.upper()}…"
    names = spelling.names or ((f"--{field.name.replace('_', '-')}",) if kind is bool else ())
    shown = typer.Option(
        *names,
        help=description,
        metavar=metavar,
        show_default=spelling.shown_default or True,
        rich_help_panel=spelling.group,
    )
    default = field.default or None if many else field.default
    if default is None:
        kind |= None
    annotation: Any = Annotated[kind, shown]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _first(hint: Any) -> Any:
    """The first member of a union: what else programs may give is made from that one."""
    return get_args(hint)[0] if get_origin(hint) in (Union, UnionType) else hint
