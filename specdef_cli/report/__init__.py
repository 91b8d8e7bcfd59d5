"""An attack's results for people (terminal table, plot, HTML) and for programs (JSON, CSV)."""

from specdef_cli.report.document import report_dict
from specdef_cli.report.findings import Finding, findings
from specdef_cli.report.sentences import closing, summary
from specdef_cli.report.table import attacks_table, edits_table, runs_table
from specdef_cli.report.write import write_report

__all__ = [
    "Finding",
    "attacks_table",
    "closing",
    "edits_table",
    "findings",
    "report_dict",
    "runs_table",
    "summary",
    "write_report",
]
