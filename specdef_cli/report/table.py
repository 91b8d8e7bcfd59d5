"""The report in the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from specdef_cli.attack.results import CONTROL_SHARE, AttackReport
from specdef_cli.report.findings import growth_words, number, outcome_words, rate, steps_words


def summary_table(report: AttackReport) -> Table:
    """One row for each run; the best of each attack is bold. Cells are :class:`Text`, so nothing in a name is taken
    for markup.
    """
    table = Table(
        caption=Text(
            "\n".join(
                [
                    "loss: held-out. steps to control: until "
                    f"{CONTROL_SHARE:.0%} of the control's best progress is made. |g|: gradient norm at step 1. "
                    "params: model parameters over the control's.",
                    *growth_words(report),
                ]
            )
        ),
        caption_justify="left",
    )
    table.add_column("run", overflow="fold")
    for heading in ("η", "start", "best", "final", "steps to control", "|g|", "params"):
        table.add_column(heading, justify="right", no_wrap=heading != "steps to control")
    table.add_column("outcome")
    for attack in report.attacks:
        for run in attack.runs:
            strongest = run.spec.learning_rate == attack.best_learning_rate
            cells = (
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
            table.add_row(*(Text(cell, style="bold" if strongest else "") for cell in cells))
        table.add_section()
    return table
