"""Suites: which attacks belong together, as data.

A suite is a TOML file that a user can copy and edit. Each ``[[attacks]]`` table stands for every combination of what it
lists: what is trained × with which optimizer × after which change to the model, over learning rates, each named as on
the command line. ``[budget]`` gives what a run may cost; flags of the command line win over it. The ones that come with
the package are in ``suites/``.

``every`` stands for every row of a table.

    [budget]
    steps = 30

    [[attacks]]
    trainings = ["full", "lora:16", { training = "full@*norm*", name = "norms" }]
    optimizers = ["adamw", "sgd"]
    variants = ["plain", "informed", "width:2"]
    learning_rates = "search"
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from specdef_cli.attack.optimizers.table import OPTIMIZERS
from specdef_cli.attack.trainings.table import TRAININGS, Training
from specdef_cli.attack.variants.table import INFORMED, Variant
from specdef_cli.errors import SpecDefError, WrongUsage

EVERY = "every"
"""In a suite: all trainings, or all optimizers, that there are."""

RatePolicy = Literal["grid", "search"]
BUDGET = ("steps", "batch_size", "sequence_length", "eval_every", "eval_sequences", "seeds")


@dataclass(frozen=True)
class AttackTable:
    """One ``[[attacks]]`` table: every combination of its lists."""

    trainings: tuple[Training, ...] = (Training(),)
    optimizers: tuple[str, ...] = ("adamw",)  # names of specdef_cli.attack.optimizers.table.OPTIMIZERS
    variants: tuple[Variant | Literal["informed"], ...] = (Variant(),)
    """What is done to the model first; ``informed`` is what undoes this model's hardening."""
    learning_rates: tuple[float, ...] | RatePolicy = "grid"
    """The rates themselves, or how they are found: decades, or decades and then a search."""
    models: Literal["any", "chat"] = "any"  # chat for models with a chat template alone


@dataclass(frozen=True)
class Suite:
    """Attacks and their budget."""

    name: str
    attacks: tuple[AttackTable, ...]
    budget: dict[str, int] = field(default_factory=dict)  # some of the options named in BUDGET
    description: str = ""  # one line for --list


COPY = "Copy one of the package's suites (attack/suites/) and edit it."


def suite_names() -> tuple[str, ...]:
    """The suites that come with the package."""
    return tuple(sorted(path.name.removesuffix(".toml") for path in (files("specdef_cli.attack") / "suites").iterdir()))


def load_suite(name: str) -> Suite:
    """Read a suite that comes with the package, or a file of the user's."""
    if name in suite_names():
        text = (files("specdef_cli.attack") / "suites" / f"{name}.toml").read_text(encoding="utf-8")
    else:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise WrongUsage(
                f"no suite {name!r} found", f"Choose one of {', '.join(suite_names())}, or give a TOML file."
            ) from error
        except UnicodeDecodeError as error:
            raise SpecDefError(f"{name} is not a suite: {error}", COPY) from error
    try:
        return parse_suite(tomllib.loads(text), Path(name).stem)
    except WrongUsage as error:  # a value of the file, not of the command line
        raise SpecDefError(f"{name}: {error.problem}", error.hint) from error
    except (tomllib.TOMLDecodeError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise SpecDefError(f"{name} is not a suite: {error}", COPY) from error


def parse_suite(data: dict[str, Any], name: str) -> Suite:
    """A suite from the contents of its file.

    Raises:
        TypeError, KeyError, ValueError: It has another shape.
    """
    unknown = set(data) - {"description", "budget", "attacks"}
    if unknown:
        raise ValueError(f"table {min(unknown)!r} is unknown")
    budget = data.get("budget", {})
    for key, value in budget.items():
        if key not in BUDGET or type(value) is not int or value < 1:
            raise ValueError(f"{key} = {value!r} in [budget]; it holds whole numbers for {', '.join(BUDGET)}")
    tables = tuple(_table(table) for table in data["attacks"])
    if not tables:
        raise ValueError("it has no attacks")
    return Suite(name, tables, budget, str(data.get("description", "")))


def _table(table: dict[str, Any]) -> AttackTable:
    optimizers = _all_of(OPTIMIZERS, table.pop("optimizers", ("adamw",)))
    for optimizer in optimizers:
        OPTIMIZERS.choose(optimizer)
    variants: tuple[Variant | Literal["informed"], ...] = tuple(
        INFORMED if variant == INFORMED else Variant.parse(variant) for variant in table.pop("variants", ("plain",))
    )
    trainings = tuple(_training(entry) for entry in _all_of(TRAININGS, table.pop("trainings", ("full",))))
    rates = table.pop("learning_rates", "grid")
    models = table.pop("models", "any")
    if models not in ("any", "chat"):
        raise ValueError(f"models = {models!r} is neither any nor chat")
    if table:
        raise ValueError(f"[[attacks]] has no key {min(table)!r}")
    if isinstance(rates, list):
        rates = tuple(float(rate) for rate in rates)
        if not rates or min(rates) <= 0:
            raise ValueError(f"learning_rates = {list(rates)}; they are positive numbers")
    elif rates not in get_args(RatePolicy):
        raise ValueError(f"learning_rates = {rates!r} is neither a list nor one of {', '.join(get_args(RatePolicy))}")
    return AttackTable(trainings, optimizers, variants, rates, models)


def _all_of(rows: Iterable[str], asked: Iterable[Any]) -> tuple[Any, ...]:
    """What was asked for, with the names of all rows in the place of ``every``."""
    return tuple(name for entry in asked for name in (rows if entry == EVERY else (entry,)))


def _training(entry: str | dict[str, str]) -> Training:
    """A training, or ``{ training = …, name = … }`` for one that the report calls something else."""
    if isinstance(entry, str):
        return Training.parse(entry)
    if set(entry) != {"training", "name"}:
        raise ValueError(f"{entry} has not the keys training and name")
    return replace(Training.parse(entry["training"]), name=entry["name"])
