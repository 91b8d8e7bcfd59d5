"""The coverage matrix: what is trained × with which optimizer, by attackers who know only recipes.

A defence is as good as its worst cell. Each cell is the best over learning rates, as a share of what the same training
with the same optimizer reached on the control.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from specdef_cli.report.findings import Finding, trained_words

MAX_COLUMNS = 8
"""Columns that a page of 1,300 pixels shows side by side."""


@dataclass(frozen=True)
class CoverageMatrix:
    """Findings by what is trained and by optimizer.

    Attributes:
        rows: What is trained, after what was done to the model, in the order of the report.
        columns: Names of optimizers, likewise.
        cells: By (row, column); combinations that were not attacked are absent.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[str, str], Finding]

    @property
    def parts(self) -> tuple[CoverageMatrix, ...]:
        """Itself; where it is wider than :data:`MAX_COLUMNS`, neighbouring columns that have the same rows."""
        if len(self.columns) <= MAX_COLUMNS:
            return (self,)

        def attacked(column: str) -> tuple[str, ...]:
            return tuple(row for row in self.rows if (row, column) in self.cells)

        parts = []
        for rows, group in groupby(self.columns, attacked):
            columns = tuple(group)
            for start in range(0, len(columns), MAX_COLUMNS):
                parts.append(CoverageMatrix(rows, columns[start : start + MAX_COLUMNS], self.cells))
        return tuple(parts)


def coverage_matrix(found: Sequence[Finding]) -> CoverageMatrix | None:
    """The matrix of a report's findings; ``None`` where there is one cell or none."""
    plain = [finding for finding in found if finding.attack.subject == "model" and finding.attack.knowledge == "none"]
    cells = {(trained_words(finding.attack), finding.attack.optimizer): finding for finding in plain}
    if len(cells) < 2:
        return None
    rows, columns = (tuple(dict.fromkeys(key[axis] for key in cells)) for axis in (0, 1))
    return CoverageMatrix(rows, columns, cells)
