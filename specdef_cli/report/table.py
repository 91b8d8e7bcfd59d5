"""The report in the terminal: one line an attack, or one a run."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from specdef_cli.attack.results import CONTROL_SHARE, Attack, AttackReport
from specdef_cli.attack.run_result import RunResult
from specdef_cli.report.findings import (
    Finding,
    findings,
    growth_words,
    number,
    of_edits,
    outcome_words,
    percent,
    rate,
    steps_words,
)


def attacks_table(report: AttackReport) -> Table:
    """One line for each attack at its best learning rate, in 80 columns. Cells are :class:`Text`, so nothing in a name
    is taken for markup.
    """
    found = [finding for finding in findings(report) if finding.edit is None]
    table = _table(report, "attack", "best η", "loss", "of its\ncontrol", "of best\ncontrol", "steps")
    table.add_column("verdict", no_wrap=True)
    previous = None
    asked = any(finding.refusals is not None for finding in found)
    if asked:
        table.add_column("refusals", justify="right", no_wrap=True)
    for finding in found:
        group = (finding.attack.subject, finding.attack.knowledge)
        if previous not in (None, group):
            table.add_section()
        previous = group
        cells = _attack_cells(report, finding) + ((percent(finding.refusals),) if asked else ())
        _add(table, cells, "bold" if finding.verdict == "not slowed" else "")
    return table


def edits_table(report: AttackReport) -> Table | None:
    """One line for each edit at its best strength; ``None`` where the model was not edited."""
    found = of_edits(findings(report))
    if not found:
        return None
    caption = "left: of the direction between the two kinds of prompts. KL: of the next token, on harmless prompts."
    table = Table(caption=Text(caption), caption_justify="left", pad_edge=False)
    table.add_column("edit, nothing trained")
    asked = any(finding.refusals is not None for finding in found)
    for heading in ("strength", "left", "KL", "of its\ncontrol", *(["refusals"] if asked else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for finding in found:
        edit = finding.edit
        assert edit is not None
        cells = [_name(finding), f"{edit.strength:g}", percent(edit.left), number(edit.kl), percent(finding.share)]
        cells += [percent(finding.refusals)] if asked else []
        _add(table, [*cells, finding.verdict], "bold" if finding.verdict == "not slowed" else "")
    return table


def runs_table(report: AttackReport) -> Table:
    """One line for each run; the best of each attack is bold."""
    table = _table(report, "run", "η", "start", "best", "final", "steps", "|g|", "params")
    table.add_column("outcome")
    for attack in report.attacks:
        for run in attack.runs:
            strongest = run.spec.learning_rate == attack.best_learning_rate
            _add(table, _run_cells(report, attack, run), "bold" if strongest else "")
        table.add_section()
    return table


def _attack_cells(report: AttackReport, finding: Finding) -> tuple[str, ...]:
    return (
        _name(finding),
        rate(finding.learning_rate),
        number(finding.best),
        percent(finding.share),
        percent(finding.share_of_best),
        steps_words(report, finding.attack.best_run),
        finding.verdict,
    )


def _name(finding: Finding) -> str:
    return finding.attack.label.removeprefix("hardened, ").removeprefix("hardened · ")


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


def _table(report: AttackReport, first: str, *headings: str) -> Table:
    lines = [
        f"loss: held-out, the lowest. steps: until {percent(CONTROL_SHARE)} of the control's best progress is made. "
        + ("|g|: gradient norm at step 1. params: model parameters over the control's." if "|g|" in headings else ""),
        *growth_words(report),
    ]
    table = Table(caption=Text("\n".join(line.strip() for line in lines)), caption_justify="left", pad_edge=False)
    table.add_column(first)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _add(table: Table, cells: Iterable[str], style: str) -> None:
    table.add_row(*(Text(cell, style=style) for cell in cells))
