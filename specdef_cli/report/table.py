"""The report in the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from specdef_cli.attack.results import CONTROL_SHARE, Attack, AttackReport, RunResult
from specdef_cli.report.findings import (
    Finding,
    findings,
    growth_words,
    number,
    outcome_words,
    percent,
    rate,
    steps_words,
)

MOST_RUNS = 60
"""With more runs than this each attack gets one row, at its best learning rate; the files have them all."""


def summary_table(report: AttackReport) -> Table:
    """One row for each run, or for each attack where there are many. Cells are :class:`Text`, so nothing in a name is
    taken for markup.
    """
    return _runs_table(report) if len(report.runs) <= MOST_RUNS else _attacks_table(report)


def _runs_table(report: AttackReport) -> Table:
    """The best run of each attack is bold."""
    table = _table(report, "η", "start", "best", "final", "steps to control", "|g|", "params")
    table.add_column("outcome")
    for attack in report.attacks:
        for run in attack.runs:
            strongest = run.spec.learning_rate == attack.best_learning_rate
            _add(table, _run_cells(report, attack, run), "bold" if strongest else "")
        table.add_section()
    return table


def _run_cells(report: AttackReport, attack: Attack, run: RunResult) -> tuple[str, ...]:
    return (
        run.spec.label + (f" · seed {run.spec.seed}" if len(attack.at(run.spec.learning_rate)) > 1 else ""),
        rate(run.spec.learning_rate),
        number(run.start),
        number(run.best),
        number(run.final),
        steps_words(report, run),
        "–" if run.first_grad_norm is None else f"{run.first_grad_norm:.2g}",
        f"{report.parameters_times(run):.2f}×",
        outcome_words(run),
    )


def _attacks_table(report: AttackReport) -> Table:
    table = _table(report, "runs", "best η", "start", "best", "of control", "steps to control", "params")
    table.add_column("verdict")
    knowledge = None
    for finding in findings(report):
        if knowledge not in (None, (finding.attack.subject, finding.attack.knowledge)):
            table.add_section()
        knowledge = (finding.attack.subject, finding.attack.knowledge)
        _add(table, _attack_cells(report, finding), "bold" if finding.verdict == "not slowed" else "")
    return table


def _attack_cells(report: AttackReport, finding: Finding) -> tuple[str, ...]:
    return (
        finding.attack.label,
        str(len(finding.attack.runs)),
        rate(finding.learning_rate),
        number(finding.start),
        number(finding.best),
        percent(finding.share),
        steps_words(report, finding.attack.best_run),
        f"{finding.parameters_times:.2f}×",
        finding.verdict,
    )


def _table(report: AttackReport, *headings: str) -> Table:
    lines = [
        f"loss: held-out. steps to control: until {CONTROL_SHARE:.0%} of the control's best progress is made. "
        "|g|: gradient norm at step 1. params: model parameters over the control's.",
        *growth_words(report),
    ]
    table = Table(caption=Text("\n".join(lines)), caption_justify="left")
    table.add_column("run", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=heading != "steps to control")
    return table


def _add(table: Table, cells: Iterable[str], style: str) -> None:
    table.add_row(*(Text(cell, style=style) for cell in cells))
