"""Parameters of commands derive from their classes of options: names, defaults, and what arrives."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from specdef_cli.attack.options import AttackOptions
from specdef_cli.certify import CertifyOptions
from specdef_cli.cli.options import takes
from specdef_cli.cli.output import Output
from specdef_cli.hardening.options import Factors, Fold, HardenOptions, Scale
from specdef_cli.option import flag_of, option, options_of
from tests.commands import call_cli


@dataclass(frozen=True, kw_only=True)
class Inherited:
    decay: float = option(0.25, "Decay.")


@dataclass(frozen=True, kw_only=True)
class Options(Inherited):
    steps: int = option(37, "Steps.", "--steps", "-s")
    rates: tuple[float, ...] = option((), "Rate.", "--lr", shown_default="decades")
    names: tuple[str | Path, ...] | None = option(None, "Name.", "--name")
    kind: Literal["one", "two"] | None = option(None, "Kind.")
    fast: bool = option(False, "Fast.")
    card: bool = option(True, "Write a card.", "--card/--no-card")
    limit: float = option(3.5, "Not taken: the command has its own.")
    inner: int = 4


@pytest.fixture
def command() -> tuple[typer.Typer, list[dict[str, Any]]]:
    """A command with these options, and what it was called with."""
    app, taken = typer.Typer(rich_markup_mode=None), []

    @app.command()
    @takes(Options)
    def run(output: Output, place: Annotated[str, typer.Argument()] = "here", limit: str = "4m", **given: Any) -> None:
        """Do it."""
        taken.append({"place": place, "limit": limit, **given})

    return app, taken


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}),
        ("--steps 37", {"steps": 37}),  # given, though it is the default
        ("-s 5 --decay 1", {"steps": 5, "decay": 1.0}),
        ("--lr 1e-3 --lr 1", {"rates": (1e-3, 1.0)}),
        ("--name a --name b --kind two", {"names": ("a", "b"), "kind": "two"}),
        ("--fast --no-card", {"fast": True, "card": False}),
        ("there --limit 2m", {"place": "there", "limit": "2m"}),
    ],
)
def test_what_is_given_arrives_and_nothing_else(command: Any, arguments: str, expected: dict[str, Any]) -> None:
    app, taken = command
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 0, result.output
    assert taken == [{"place": "here", "limit": "4m"} | expected]


@pytest.mark.parametrize("arguments", ["--steps x", "--kind three", "--inner 3", "--limit", "--no-fast"])
def test_what_no_field_takes_is_refused(command: Any, arguments: str) -> None:
    assert CliRunner().invoke(command[0], arguments.split()).exit_code == 2


def test_help_shows_what_the_fields_say(command: Any) -> None:
    said = " ".join(CliRunner().invoke(command[0], ["--help"], env={"COLUMNS": "200"}).stdout.split())
    assert "--lr FLOAT… Rate. [default: (decades)]" in said
    assert "3.5" not in said
    assert said.index("--steps") < said.index("--decay")  # what is inherited comes after


COMMANDS: dict[str, tuple[type, ...]] = {
    "attack": (AttackOptions,), "certify": (CertifyOptions,), "harden": (HardenOptions, Fold, Scale, Factors)
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_every_option_with_the_default_that_holds(name: str) -> None:
    said = call_cli(name, "--help", width=80).stdout.partition("Model:")[2]
    rows = [" ".join(row.split()) for row in re.split(r"\n  (?=\S)", said)]
    without = {"manifest"} if name == "harden" else set()
    owned = [(model, field) for model in COMMANDS[name] for field in options_of(model).values()]
    options = [(model, field) for model, field in owned if field.name not in without]
    for owner, field in options:
        flag = flag_of(owner, field.name)
        row = next(row for row in rows if flag in re.split(r"[ ,]+", row.replace("--[no-]", "--")))
        if " / " not in (field.metadata["group"] or ""):
            assert str(field.metadata["description"]).removesuffix(".") in row
        if field.default and not isinstance(field.default, bool):
            shown = field.metadata["shown_default"] or getattr(field.default, "method", field.default)
            assert str(shown).removesuffix(".0") in row.rpartition("[")[2]
    assert len(options) >= 8
    hidden = {field.name for field in dataclasses.fields(COMMANDS[name][0])} - options_of(COMMANDS[name][0]).keys()
    assert "model" in hidden
