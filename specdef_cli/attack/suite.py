"""Suites: which attacks belong together, as data.

A suite is a TOML file that a user can copy and edit. Each ``[[attacks]]`` table stands for every combination of what it
lists: what is trained × with which optimizer × after which change to the model, over learning rates. ``[budget]`` gives
what a run may cost; flags of the command line win over it. The ones that come with the package are in ``suites/``.

    [budget]
    steps = 30

    [[attacks]]
    training = ["full", "lora", { method = "full", parameters = ["*norm*"], name = "norms" }]
    optimizers = ["adamw", "sgd"]
    variants = ["plain", "informed"]
    learning_rates = "search"
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from specdef_cli.attack.optimizers import optimizer_choice
from specdef_cli.attack.spec import Variant
from specdef_cli.attack.training import Training
from specdef_cli.errors import SpecDefError

Keyword = Literal[
    "full", "bitfit", "groups", "lora", "lora-default", "lora-inflated", "lora-compensation", "lora-around", "dora",
    "ia3", "prompt",
]  # fmt: skip
"""Trainings by name: ``lora`` is on every linear, ``lora-default`` where PEFT puts it; ``bitfit`` trains the biases;
``groups`` stands for each kind of parameter alone.
"""

RatePolicy = Literal["grid", "search"]
BUDGET = ("steps", "batch_size", "sequence_length", "eval_every", "eval_sequences", "seeds")


@dataclass(frozen=True)
class AttackTable:
    """One ``[[attacks]]`` table: every combination of its lists.

    Attributes:
        training: What is trained, by keyword or spelled out.
        optimizers: Names of :data:`specdef_cli.attack.optimizers.OPTIMIZERS`.
        variants: What is done to the model first; ``informed`` is what undoes this model's hardening.
        learning_rates: The rates themselves, or how they are found: decades, or decades and then a search.
    """

    training: tuple[Keyword | Training, ...] = ("full",)
    optimizers: tuple[str, ...] = ("adamw",)
    variants: tuple[Variant | Literal["informed"], ...] = (Variant(),)
    learning_rates: tuple[float, ...] | RatePolicy = "grid"


@dataclass(frozen=True)
class Suite:
    """Attacks and their budget.

    Attributes:
        name: What the report calls it.
        attacks: The tables, in order.
        budget: Some of the options named in :data:`BUDGET`.
    """

    name: str
    attacks: tuple[AttackTable, ...]
    budget: dict[str, int] = field(default_factory=dict)


def suite_names() -> tuple[str, ...]:
    """The suites that come with the package."""
    return tuple(sorted(path.name.removesuffix(".toml") for path in (files("specdef_cli.attack") / "suites").iterdir()))


def load_suite(name: str) -> Suite:
    """Read a suite that comes with the package, or a file of the user's.

    Raises:
        SpecDefError: There is no such suite, or the file is not one.
    """
    if name in suite_names():
        text = (files("specdef_cli.attack") / "suites" / f"{name}.toml").read_text(encoding="utf-8")
    else:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise SpecDefError(
                f"there is no suite {name!r}", f"Choose one of {', '.join(suite_names())}, or give a TOML file."
            ) from error
    try:
        return parse_suite(tomllib.loads(text), Path(name).stem)
    except (tomllib.TOMLDecodeError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise SpecDefError(
            f"{name} is not a suite: {error}", "Copy one of the package's suites (attack/suites/) and edit it."
        ) from error


def parse_suite(data: dict[str, Any], name: str) -> Suite:
    """A suite from the contents of its file.

    Raises:
        SpecDefError: A name in it is unknown.
        TypeError, KeyError, ValueError: It has another shape.
    """
    unknown = set(data) - {"budget", "attacks"}
    if unknown:
        raise ValueError(f"there is no table {min(unknown)!r}")
    budget = data.get("budget", {})
    for key, value in budget.items():
        if key not in BUDGET or type(value) is not int or value < 1:
            raise ValueError(f"{key} = {value!r} in [budget]; it holds whole numbers for {', '.join(BUDGET)}")
    tables = tuple(_table(table) for table in data["attacks"])
    if not tables:
        raise ValueError("it has no attacks")
    return Suite(name, tables, budget)


def _table(table: dict[str, Any]) -> AttackTable:
    optimizers = tuple(table.pop("optimizers", ("adamw",)))
    for optimizer in optimizers:
        optimizer_choice(optimizer)
    variants = tuple(
        "informed" if variant == "informed" else Variant.parse(variant) for variant in table.pop("variants", ("plain",))
    )
    training = tuple(_training(entry) for entry in table.pop("training", ("full",)))
    rates = table.pop("learning_rates", "grid")
    if table:
        raise ValueError(f"[[attacks]] has no key {min(table)!r}")
    if isinstance(rates, list):
        rates = tuple(float(rate) for rate in rates)
        if not rates or min(rates) <= 0:
            raise ValueError(f"learning_rates = {list(rates)}; they are positive numbers")
    elif rates not in get_args(RatePolicy):
        raise ValueError(f"learning_rates = {rates!r} is neither a list nor one of {', '.join(get_args(RatePolicy))}")
    return AttackTable(training, optimizers, variants, rates)  # type: ignore[arg-type]


def _training(entry: str | dict[str, Any]) -> Keyword | Training:
    if isinstance(entry, dict):
        return Training.from_dict(entry)
    if entry not in get_args(Keyword):
        raise ValueError(f"training {entry!r} is none of {', '.join(get_args(Keyword))}")
    return entry  # type: ignore[return-value]
