"""Put attack reports side by side: one row for what is trained and how, one column for each hardened model.

Prints Markdown: the attacker's progress as a share of the control's, at the best learning rate that was found. What no
inflated layer touches trains as if nothing had happened, so every group of parameters stands there alone.

    specdef attack fold --suite standard --out fold-attack
    python examples/reproduce/coverage.py fold-attack/report.json [MORE/report.json …]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def rows_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Attacks on the hardened model by what was done, trained and with which optimizer."""
    rows = {}
    for attack in report["attacks"]:
        if attack["subject"] == "model":
            variant = attack["variant"].replace(":", " ")
            prefix = "" if variant == "plain" else f"{variant}: "
            rows[f"{prefix}{attack['trained']}, {attack['optimizer']}"] = attack
    return rows


def controls_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Attacks on the control by what was trained and with which optimizer."""
    return {
        f"{attack['trained']}, {attack['optimizer']}": attack
        for attack in report["attacks"]
        if attack["subject"] == "control"
    }


def cell(attack: dict[str, Any] | None) -> str:
    """A share and the learning rate it was reached at, if any was good for something."""
    if attack is None or attack["share_of_control"] is None:
        return "–"
    if not attack["share_of_control"]:
        return "0.0%"
    return f"{attack['share_of_control']:.1%} ({attack['best']['learning_rate']:.0e})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("reports", type=Path, nargs="+", help="report.json of each hardened model")
    paths = parser.parse_args().reports
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    tables = [rows_of(report) for report in reports]
    controls: dict[str, dict[str, Any]] = {}
    for report in reports:
        controls |= controls_of(report)
    names = [Path(report["model"]["name"]).name for report in reports]
    print("| attack | control (best η) | " + " | ".join(names) + " |")
    print("|---|---|" + "---|" * len(names))
    for row in dict.fromkeys(row for table in tables for row in table):
        control = controls[row.rpartition(": ")[2]]
        learned = f"{control['start']:.3f} → {control['best']['loss']:.3f} ({control['best']['learning_rate']:.0e})"
        print(f"| {row} | {learned} | " + " | ".join(cell(table.get(row)) for table in tables) + " |")


if __name__ == "__main__":
    main()
