"""Several reports side by side: one row an attack, one column a model. The table that a publisher decides by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from specdef_cli.report.document import ReportDocument
from specdef_cli.report.findings import Finding, number, percent, rate


@dataclass(frozen=True)
class Cell:
    """One attack on one model at its best learning rate."""

    share: float | None  # progress over its own control's; None where that control made none
    share_of_best: float | None  # progress over the most that any control of that report made
    learning_rate: float  # the best of those tried
    loss: float | None  # the lowest held-out loss (nats)
    verdict: str  # stopped, not settled, slowed, not slowed or unknown

    @property
    def text(self) -> str:
        """``77 % (3e-7)``: share of its own control's progress, and the rate; ``?`` where that is not settled."""
        if self.share is None:
            return "–"
        if self.learning_rate == 0:  # an edit, which is not trained
            return f"{percent(self.share)}, {self.verdict}"
        doubt = " ?" if self.verdict == "not settled" else ""
        return f"{percent(self.share)} ({rate(self.learning_rate)}){doubt}"


@dataclass(frozen=True)
class ComparedAttack:
    """One row."""

    attack: str  # what was done first, trained, and with which optimizer
    control: str  # how far the undefended control came by the same training, with its rate
    control_share: float | None  # what that control made of the best control's progress
    cells: tuple[Cell | None, ...]  # one for each model; None where a report lacks the attack


@dataclass(frozen=True)
class Comparison:
    """Reports side by side."""

    models: tuple[str, ...]  # names of the models, as directories end
    verdicts: tuple[str, ...]  # the first line of each report's summary
    rows: tuple[ComparedAttack, ...]  # in the order in which the attacks first appear
    notes: tuple[str, ...]  # what a mark means, and why the columns may not be compared, one sentence each


def compare(reports: Sequence[ReportDocument]) -> Comparison:
    """Put reports side by side.

    Args:
        reports: Their contents (:func:`specdef_cli.report.document.read_report`), one for each model.
    """
    controls: dict[str, Finding] = {}
    columns: list[dict[str, Finding]] = []
    for report in reports:
        column = {}
        for attack in report.attacks:
            if attack.subject == "control":
                controls.setdefault(_recipe(attack), attack)
            else:
                first = "" if attack.variant == "plain" or attack.edit is not None else f"{attack.variant}: "
                column[first + _recipe(attack)] = attack
        columns.append(column)
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column):
        attacks = [column.get(name) for column in columns]
        control = controls.get(next(_recipe(attack) for attack in attacks if attack is not None))
        rows.append(
            ComparedAttack(
                attack=name,
                control=_learned(control) if control else "–",
                control_share=control.share_of_best if control else None,
                cells=tuple(None if attack is None else _cell(attack) for attack in attacks),
            )
        )
    return Comparison(
        models=tuple(Path(report.model.name).name for report in reports),
        verdicts=tuple(report.summary[0] for report in reports),
        rows=tuple(rows),
        notes=_notes(reports),
    )


def comparison_markdown(comparison: Comparison) -> str:
    """The comparison as a table for a model card or a page."""
    head = ["attack", "control: loss (best η), of the best control", *comparison.models]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in comparison.rows:
        cells = ["–" if cell is None else cell.text for cell in row.cells]
        lines.append(f"| {' | '.join([row.attack, f'{row.control}, {percent(row.control_share)}', *cells])} |")
    lines += [""] + [f"- {model}: {text}" for model, text in zip(comparison.models, comparison.verdicts, strict=True)]
    return "\n".join([*lines, *(f"- {note}" for note in comparison.notes)]) + "\n"


def _recipe(attack: Finding) -> str:
    if attack.edit is not None:
        return attack.variant
    return f"{attack.trained}, {attack.optimizer}"


def _learned(control: Finding) -> str:
    if control.edit is not None:
        return f"{percent(control.edit.left)} of the direction left, KL {number(control.edit.kl)}"
    return f"{number(control.start)} → {number(control.best)} ({rate(control.learning_rate)})"


def _cell(attack: Finding) -> Cell:
    return Cell(
        share=attack.share,
        share_of_best=attack.share_of_best,
        learning_rate=attack.learning_rate,
        loss=attack.best,
        verdict=attack.verdict,
    )


def _notes(reports: Sequence[ReportDocument]) -> tuple[str, ...]:
    """What a cell's mark means, and what reports must share to be comparable: the data and the budget."""
    notes = []
    if any(attack.verdict == "not settled" for report in reports for attack in report.attacks):
        notes.append("?: the rates tried do not bracket the best one, so that more may be reached than stands there.")
    if len({report.data.fingerprint for report in reports}) > 1:
        notes.append("The reports were made on different data; their columns cannot be compared.")
    budgets = {
        (run.spec.steps, run.spec.batch_size, run.spec.sequence_length) for report in reports for run in report.runs
    }
    if len(budgets) > 1:
        told = "; ".join(f"{steps} steps of {batch} × {length} tokens" for steps, batch, length in sorted(budgets))
        notes.append(f"The reports had different budgets ({told}); their columns cannot be compared.")
    return tuple(notes)
