"""``specdef attack``, the conditions of its ``--fail-if``, and ``specdef compare``."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.markdown import Markdown

from specdef_cli.attack.options import CHOICES, LOWERED, AttackOptions, load_suite, suite_names
from specdef_cli.checkpoint.check import require_card, require_models
from specdef_cli.cli.attack_screens import RunProgress, attack_listing, listing_tables, plan_screen, remarks
from specdef_cli.cli.options import takes
from specdef_cli.cli.output import Output
from specdef_cli.errors import WrongUsage, require_extra
from specdef_cli.option import option

if TYPE_CHECKING:
    from specdef_cli.attack.results import AttackReport
    from specdef_cli.report import Finding


@dataclass(frozen=True)
class Flags:
    suite: str | None = option(
        None, "quick, standard, full, or a TOML file of your own.", metavar="NAME", group="Attacks"
    )
    expand: str | None = option(None, "Attack a grown model too, as --variant width:2.", metavar="2x", group="Attacks")
    list_all: bool = option(False, "List what these options accept, and exit.", "--list", group="Attacks")
    fail_if: tuple[str, ...] = option(
        (), "Exit with 1 if an uninformed attack meets this.", metavar="CONDITION", group="Output"
    )
    card: bool = option(False, "Write the findings into the model card.", group="Output")
    dry_run: bool = option(False, "Print the plan and the time it needs; run nothing.", group="Output")


@takes(AttackOptions)
def attack_command(
    flags: Flags,
    output: Output,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or Hub id to attack.")] = "hardened",
    **given: Any,
) -> None:
    """Fine-tune a hardened model and its base; report how far each attack got.

    Examples:

      specdef attack hardened --expand 2x

      specdef attack hardened --time-limit 45m --jobs 4

      specdef attack hardened --dataset notes.jsonl --training lora --steps 200
    """
    if flags.list_all:
        listing = attack_listing()
        output.data(listing, Group(*listing_tables(listing)))
        return
    require_extra("attack", "attacks")
    # Validate first: importing torch takes seconds.
    conditions = [Condition.parse(text) for text in flags.fail_if]
    if any(condition.metric == "refusals" for condition in conditions) and "prompts" not in given:
        raise WrongUsage("--fail-if refusals needs prompts that the model refuses", "Give --prompts FILE.")
    options = _options(flags, model, given)
    require_models(options, options.control, "--control")
    if flags.card:
        require_card(options)
    options.require_present()

    from specdef_cli import Forecast, attack, is_main_process, plan_attack
    from specdef_cli.report.document import report_dict
    from specdef_cli.report.files import write_report
    from specdef_cli.report.text import attacks_table, closing, edits_table, runs_table

    if flags.dry_run:
        forecast = plan_attack(options)
        output.data(forecast, plan_screen(forecast))
        return
    planned: list[str] = []

    def show_plan(forecast: Forecast) -> None:
        planned.extend(remarks(forecast))
        output.show(plan_screen(forecast))

    with output.progress("attacking") as bar:
        report = attack(options, on_progress=RunProgress(bar).show, on_plan=None if output.quiet else show_plan)
    written = write_report(report, options.out)
    if not is_main_process():
        return
    for text in remarks(report):
        if text not in planned:
            output.note(text)
    table = runs_table(report) if output.verbose else attacks_table(report)
    tables = [table] if any(not run.spec.is_edit for run in report.runs) else []
    edits = edits_table(report)
    tables += [edits] if edits is not None else []
    output.data(report_dict(report), Group(*tables, "", *closing(report, written[0])), written=written[0])
    if output.as_json:
        output.note(f"report: {written[0]}")
    if flags.card:
        from specdef_cli.certify.card import attacks_on_card
        from specdef_cli.report.document import REPORT_NAME

        attacks_on_card(options, options.out / REPORT_NAME)
    failures = dict.fromkeys(line for condition in conditions for line in condition.failures(report))
    for line in failures:
        output.note(f"failed: {line}")
    if failures:
        raise typer.Exit(1)


def _options(flags: Flags, model: str, given: dict[str, Any]) -> AttackOptions:
    """The options of an attack; what the user gave stays, by a flag or in a suite of the user's own."""
    if flags.expand is not None and flags.suite is not None:
        raise WrongUsage(
            f"--expand cannot be given with --suite {flags.suite}, which decides the variants",
            "Leave it out, or copy the suite's file and add width:2 to its variants.",
        )
    if flags.expand is not None:
        given["variants"] = (*given.get("variants", ()), f"width:{flags.expand.removeprefix('width:')}")
    suite = flags.suite
    if "time_limit" in given and suite is None and not given.keys() & CHOICES:
        suite = "quick"  # what everybody tries, and what usually gets through
    chosen = load_suite(suite) if suite is not None else None
    budget: dict[str, Any] = {str(name): value for name, value in (chosen.budget if chosen else {}).items()} | given
    kept = given if chosen is None or suite in suite_names() else budget
    free = tuple(name for name in LOWERED if name not in kept)
    return AttackOptions(**budget, model=model, suite=chosen, free=free)


_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_FRACTIONS = ("share_of_control", "refusals")
_METRICS = {
    "steps_to_control": "steps_to_control",
    "share_of_control": "share",
    "best_loss": "best",
    "refusals": "refusals",
}
"""The field of a finding that a condition compares, by its name there."""


@dataclass(frozen=True)
class Condition:
    """``metric operator value``, as the user wrote it."""

    text: str
    metric: str
    operator: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Condition:
        match = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*", text)
        try:
            if match is None or match[1] not in _METRICS:
                raise ValueError
            condition = cls(text, match[1], match[2], float(match[3]))
            if condition.metric in _FRACTIONS and abs(condition.value) > 2:  # 20 for 20 % is a gate that never fails
                raise ValueError
            return condition
        except ValueError as error:
            raise WrongUsage(
                f"--fail-if {text!r} is not a condition",
                f"Write a metric ({', '.join(_METRICS)}), one of {' '.join(_OPERATORS)} and a number, e.g. "
                f"'steps_to_control<500'; {' and '.join(_FRACTIONS)} are fractions, 0.2 for 20 %.",
            ) from error

    def failures(self, report: AttackReport) -> tuple[str, ...]:
        """Say why a gate on this condition fails, one line each; what was not measured fails it too."""
        from specdef_cli.report import findings

        failed = [f"{label} was not reached within --time-limit" for label in report.not_reached]
        plain = [found for found in findings(report) if found.attack.subject == "model"]
        plain = [found for found in plain if found.knowledge == "none" and self._concerns(found)]
        for finding in plain:
            value: float | None = getattr(finding, _METRICS[self.metric])
            if self.metric == "steps_to_control" and value is None and finding.share is not None:
                value = float("inf")  # within the budget the control was never reached
            if value is None:
                failed.append(f"{finding.label}: {self.metric} was not measured, as {_why(finding)}")
            elif _OPERATORS[self.operator](value, self.value):
                failed.append(f"{finding.label} meets {self.text}")
        return tuple(failed) or ((f"no attack was measured for {self.text}",) if not plain else ())

    def _concerns(self, finding: Finding) -> bool:
        """Whether the condition applies: an edit has no steps or loss, and a broken model no answers."""
        if finding.edit is None:
            return True
        return self.metric == "share_of_control" or (self.metric == "refusals" and finding.verdict != "broken")


def _why(finding: Finding) -> str:
    if finding.start is not None and finding.share is not None:
        return "its best run diverged, or no --prompts were given"
    return "its start is not finite" if finding.start is None else "the control learned nothing by the same recipe"


@takes()
def compare_command(
    reports: Annotated[
        list[Path], typer.Argument(metavar="REPORT…", help="report.json of each model, or the directory it is in.")
    ],
    output: Output,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown, for a page or a model card.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Put attack reports side by side: one row per attack, one column per model.

    Examples:

      specdef compare fold-attack scale-attack

      specdef compare fold-attack/report.json scale-attack/report.json --markdown
    """
    require_extra("report", "reports")
    from specdef_cli.report.document import compare, comparison_markdown, read_report

    comparison = compare([read_report(path) for path in reports])
    text = comparison_markdown(comparison)
    if markdown and not output.as_json:
        print(text, end="")
        return
    output.data(comparison, Markdown(text))
