"""The four files of a report, each replaced whole."""

from __future__ import annotations

from pathlib import Path

from specdef_cli.attack.results import AttackReport
from specdef_cli.checkpoint.durable import write_durably
from specdef_cli.report.html import report_html
from specdef_cli.report.plot import curves_png
from specdef_cli.report.serialize import curves_csv, report_json
from specdef_cli.runtime.processes import process_state


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
