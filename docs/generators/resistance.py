"""How far attacks get on models of all kinds, in one table: from reports of ``specdef attack``, on standard output.

    resistance.py models/attacks --models tiny-llama deep-60 --ways fold scale

reads ``models/attacks/tiny-llama-fold/report.json`` and so on; what is not there yet is a dash. Nothing is measured
here: ``make real-attack`` does that, and writes the best rates to docs/tables/attack-*.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from specdef_cli.attack.variants import VARIANTS
from specdef_cli.report import Finding, percent
from specdef_cli.report.document import Comparison, compare, read_report

SEPARATOR = " / "


def read_comparisons(
    attacks: Path, models: Sequence[str], ways: Sequence[str]
) -> dict[str, tuple[list[str], Comparison]]:
    """By model, which ways of hardening were attacked, and their reports side by side."""
    found = {}
    for model in models:
        there = [way for way in ways if (attacks / f"{model}-{way}" / "report.json").is_file()]
        if there:
            found[model] = there, compare([read_report(attacks / f"{model}-{way}" / "report.json") for way in there])
    return found


def resistance_table(compared: Mapping[str, tuple[Sequence[str], Comparison]], ways: Sequence[str]) -> str:
    """One row an attack, one column a model; a cell has a share for each way of hardening.

    Args:
        compared: By model, the ways in the order of the comparison's columns.
        ways: In the order of a cell.
    """
    cells: dict[str, dict[str, dict[str, Finding]]] = {}
    for model, (there, comparison) in compared.items():
        for row in comparison.rows:
            by_way = {way: cell for way, cell in zip(there, row.cells, strict=True) if cell is not None}
            cells.setdefault(_shortened(row.attack), {}).setdefault(model, {}).update(by_way)
    lines = [f"| trained, with AdamW | {' | '.join(compared)} |", "|---" * (len(compared) + 1) + "|"]
    for attack, by_model in cells.items():
        columns = [
            SEPARATOR.join(_share(by_model[model].get(way)) for way in ways) if model in by_model else "–"
            for model in compared
        ]
        lines.append(f"| {attack} | {' | '.join(columns)} |")
    named = SEPARATOR.join(ways)
    note = f"Each cell: {named}. **?**: the rates tried do not bracket the best one. –: not reached in the time."
    return "\n".join([*lines, "", note]) + "\n"


def _shortened(attack: str) -> str:
    """Its name, the same one for what undoes a fold, scales or factors."""
    first, colon, trained = attack.removesuffix(", adamw").rpartition(": ")
    undone = first in VARIANTS and VARIANTS[first].informed is not None
    return f"{'undone first' if undone else first}{colon}{trained}"


def _share(cell: Finding | None) -> str:
    if cell is None:
        return "–"
    return percent(cell.share) + (" **?**" if cell.verdict == "not settled" else "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attacks", type=Path, help="the directory that holds MODEL-WAY/report.json")
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--ways", nargs="+", required=True)
    given = parser.parse_args()
    print(resistance_table(read_comparisons(given.attacks, given.models, given.ways), given.ways), end="")
