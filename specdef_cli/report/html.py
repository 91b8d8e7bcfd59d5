"""``report.html``: one file to read and to send on; nothing in it is loaded from elsewhere.

The page is ``template.html`` beside this file. Everything that comes from the user (paths, names, globs) is escaped
there by jinja2.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from datetime import date
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from specdef_cli.attack.results import AttackReport
from specdef_cli.report import (
    KNOWLEDGE_WORDS,
    Finding,
    attack_cells,
    findings,
    full_name,
    growth_words,
    number,
    of_edits,
    percent,
    run_cells,
    spelling,
)
from specdef_cli.report.document import DEFINITIONS
from specdef_cli.report.text import summary, verdict_line

WORDS = ("the attacker", "verdict", "outcome")
"""Headings of columns whose cells are text and not figures."""

ATTACKS = ("the attacker", "best η", "loss before", "after", "of its control", "of the best control")
COSTS = (
    "with utility kept", "control, with utility kept", "diverges", "steps to control", "time to control", "parameters",
    "operations",
)  # fmt: skip


class Row(NamedTuple):
    """A row of a table: cells by heading, classes that the style sheet knows, and how the command line spells it."""

    cells: dict[str, str]
    emphasis: str = ""
    title: str = ""


def report_html(report: AttackReport, image: bytes) -> str:
    """The page, with the curves."""
    found = findings(report)
    trained = tuple(finding for finding in found if finding.edit is None)
    environment = Environment(
        loader=PackageLoader("specdef_cli.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    attacks, costs = [], []
    for finding in trained:
        named, flags = {"attack": full_name(finding.attack)}, spelling(finding.attack)
        cells = attack_cells(finding)
        usual = {"of its control": _share(finding), "at its control’s η": percent(finding.usual_share)}
        shown = {**named, **{key: cells[key] for key in ATTACKS}, **usual, "verdict": finding.verdict}
        attacks.append(Row(shown, "best" if finding.verdict == "not slowed" else "", flags))
        costs.append(Row({**named, **{key: cells[key] for key in COSTS}}, title=flags))
    return environment.get_template("template.html").render(
        verdict=verdict_line(found),
        # The longest bar first; an attack whose control learned nothing has none.
        bars=sorted(
            (each for each in trained if each.share is not None and each.verdict != "control"),
            key=lambda each: -(each.share or 0.0),
        ),
        name=full_name,
        spelling=spelling,
        percent=percent,
        knowledge=KNOWLEDGE_WORDS,
        words=WORDS,
        summary=summary(report)[1:],
        report=report,
        found=found,
        today=date.today().isoformat(),
        fingerprints={run.spec.subject: run.spec.checkpoint for run in report.runs},
        definitions=DEFINITIONS,
        curves=base64.b64encode(image).decode("ascii"),
        attacks=attacks,
        costs=costs,
        accuracy=_accuracy_rows(found),
        edits=_edit_rows(found),
        behaviour=_behaviour_rows(found),
        runs=_run_rows(report),
        growth=growth_words(report),
    )


def _accuracy_rows(found: Sequence[Finding]) -> list[Row]:
    """Accuracy on tasks, of each attack's run at its best learning rate; none where none was measured."""
    tasks = sorted({task for finding in found for task in finding.attack.best_run.accuracy})
    measured = [(full_name(finding.attack), finding.attack.best_run.accuracy) for finding in found if tasks]
    return [Row({"attack": label, **{task: number(each.get(task)) for task in tasks}}) for label, each in measured]


def _edit_rows(found: Sequence[Finding]) -> list[Row]:
    """Every strength of every edit; the best one of each stands out."""
    return [
        Row(
            {
                "edit": full_name(finding.attack),
                "strength": f"{edit.strength:g}",
                "of the direction left": percent(edit.left),
                "KL, harmless prompts": number(edit.kl),
                "of its control": percent(finding.share) if edit == finding.edit else "",
                "verdict": finding.verdict if edit == finding.edit else "broken" if edit.broken else "",
            },
            " ".join(["first"] * (place == 0) + ["best"] * (edit == finding.edit)),
        )
        for finding in of_edits(found)
        for place, edit in enumerate(finding.attack.best_run.edits)
    ]


def _behaviour_rows(found: Sequence[Finding]) -> list[Row]:
    """Refusals after every attack that was followed by questions; none where no prompts were given."""
    return [
        Row(
            {
                "attack": full_name(finding.attack),
                "refused before": percent(finding.refusals_before),
                "refused after": percent(finding.refusals),
                "KL, harmless prompts": number(finding.kl),
            }
        )
        for finding in found
        if finding.attack.behaviour is not None and finding.attack.behaviour.refusals is not None
    ]


def _share(finding: Finding) -> str:
    if finding.share_range is None or finding.share_range[0] == finding.share_range[1]:
        return percent(finding.share)
    least, most = finding.share_range
    return f"{percent(finding.share)} ({100 * least:.0f} to {100 * most:.0f})"


def _run_rows(report: AttackReport) -> list[Row]:
    rows = []
    for attack in report.attacks:
        for position, run in enumerate(attack.runs):
            classes = ["first"] * (position == 0) + ["best"] * (run.spec.learning_rate == attack.best_learning_rate)
            rows.append(Row(run_cells(attack, run), " ".join(classes)))
    return rows
