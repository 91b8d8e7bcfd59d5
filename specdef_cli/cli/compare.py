"""``specdef compare``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specdef_cli.cli.options import takes
from specdef_cli.cli.output import Output
from specdef_cli.option import option

if TYPE_CHECKING:
    from rich.console import Group

    from specdef_cli.report.document import Comparison


@dataclass(frozen=True)
class Flags:
    """Options of the command alone."""

    markdown: bool = option(False, "Print Markdown, for a page or a model card.", group="Output")


@takes()
def compare_command(
    reports: Annotated[
        list[Path], typer.Argument(metavar="REPORT…", help="report.json of each model, or the directory it is in.")
    ],
    flags: Flags,
    output: Output,
) -> None:
    """Put attack reports side by side: one row an attack, one column a model.

    Examples:

      specdef compare fold-attack scale-attack

      specdef compare fold-attack/report.json scale-attack/report.json --markdown
    """
    from specdef_cli.errors import require_extra

    require_extra("report", "reports")
    from specdef_cli.report.document import require_report

    for path in reports:
        require_report(path)
    from specdef_cli.report.document import compare, comparison_markdown, read_report

    comparison = compare([read_report(path) for path in reports])
    if flags.markdown and not output.as_json:
        print(comparison_markdown(comparison), end="")
        return
    output.data(comparison, comparison_table(comparison, notes=not output.quiet))


def comparison_table(comparison: Comparison, *, notes: bool = True) -> Group:
    """The comparison as the terminal shows it, with or without what there is to know about the reports."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from specdef_cli.report import percent

    table = Table(pad_edge=False)
    table.add_column("attack")
    table.add_column("control", justify="right")
    for model in comparison.models:
        table.add_column(model, justify="right", no_wrap=True)
    for row in comparison.rows:
        cells = [
            Text("–" if cell is None else cell.text, style="bold" if cell and cell.verdict == "not slowed" else "")
            for cell in row.cells
        ]
        table.add_row(Text(row.attack), Text(f"{row.control}, {percent(row.control_share)}"), *cells)
    lines = [f"{model}: {text}" for model, text in zip(comparison.models, comparison.verdicts, strict=True)]
    caption = (
        "control: held-out loss (best η), share of the best control's progress. Models: share of its own control's."
    )
    said = (*lines, *comparison.notes) if notes else lines
    return Group(table, Text(caption), *(Text(line) for line in said))
