"""The four files of a report, each replaced whole."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from specdef_cli.attack.results import AttackReport
from specdef_cli.checkpoint.files import write_durably
from specdef_cli.model.loading import process_state
from specdef_cli.report.document import report_json
from specdef_cli.report.html import report_html
from specdef_cli.report.plot import curves_png

CURVE_COLUMNS = (
    "run", "label", "subject", "variant", "trained", "optimizer", "learning_rate", "seed",
    "step", "train_loss", "grad_norm", "eval_loss", "retained_loss", "seconds",
)  # fmt: skip


def curves_csv(report: AttackReport) -> str:
    """The text of ``curves.csv``: one row for each step of each run that has a value; step 0 is before the first
    update.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CURVE_COLUMNS)
    for run in report.runs:
        spec = run.spec
        train = {point.step: point for point in run.train}
        evaluations = {point.step: point for point in run.evaluations}
        for step in sorted(train.keys() | evaluations.keys()):
            trained, evaluated = train.get(step), evaluations.get(step)
            writer.writerow(
                [
                    spec.run_id, spec.label, spec.subject, spec.variant, spec.training.label, spec.optimizer,
                    spec.learning_rate, spec.seed, step, trained and trained.loss, trained and trained.grad_norm,
                    evaluated and evaluated.loss, evaluated and evaluated.retained,
                    evaluated and round(evaluated.seconds, 3),
                ]
            )  # fmt: skip
    return text.getvalue()


def write_report(report: AttackReport, out: str | Path) -> tuple[Path, ...]:
    """Write ``report.html``, ``report.json``, ``curves.csv`` and ``curves.png`` into ``out``.

    Only the main process of an ``accelerate launch`` writes; the others return the same paths.

    Raises:
        OSError: ``out`` cannot be written.
    """
    paths = tuple(Path(out) / name for name in ("report.html", "report.json", "curves.csv", "curves.png"))
    if process_state().is_main_process:
        image = curves_png(report)
        contents: tuple[str | bytes, ...] = (
            report_html(report, image),
            report_json(report),
            curves_csv(report),
            image,
        )
        for path, content in zip(paths, contents, strict=True):
            write_durably(path, content)
    return paths
