"""What a format costs against what resistance is left: folds between the profiles quantizable and gguf, as one table.

    python examples/reproduce/frontier.py MODEL --minutes 30

Each fold differs from its profile in one number: the exponent that every pair gets (quantizable), or what blocks of
activations may lose in a pair (gguf). Finished cells and runs are kept in ``--work``.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from unittest.mock import patch

from serving import attack, formats, hardened, left, model_name
from setting import markdown

from specdef_cli.hardening import expendable
from specdef_cli.report.document import compare, read_report

CONSTANTS = {"quantizable": "EXPONENT", "gguf": "BLOCK_LOSS"}
FOLDS: tuple[tuple[str, float], ...] = (
    *(("gguf", loss) for loss in (1 / 4_000, 1 / 750, 1 / 150, 1 / 30)),
    *(("quantizable", exponent) for exponent in (8, 10, 12)),
)
"""Profile, and its number; the first and the last are the profiles themselves."""
FORMATS = ("q8_0", "q4_k_m")


def main() -> None:
    """Measure what is missing, as far as the time goes, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="directory of a base")
    parser.add_argument("--minutes", type=float, default=30, help="of measuring")
    parser.add_argument("--work", type=Path, default=Path("models/serving"))
    given = parser.parse_args()
    end = time.monotonic() + 60 * given.minutes
    rows = []
    for profile, number in FOLDS:
        constant = CONSTANTS[profile]
        suffix = "" if number == getattr(expendable, constant) else f"-{number:.2g}"
        with patch.object(expendable, constant, number):
            fold = hardened(given.model, profile, given.work / f"{model_name(given.model)}-{profile}{suffix}")
        report = given.work / "attacks" / fold.name / "report.json"
        if not report.is_file() and left(end) > 0:
            attack(given.model, fold, given.work, left(end), "--variant plain --training full")
        progress = full_fine_tuning(report) if report.is_file() else "not measured"
        rows.append((profile, f"{number:.2g}", *nats(given.model, fold, given.work, left(end)), progress))
    print(markdown(["profile", "exponent or loss", "base → Q8_0", "base → Q4_K_M", "full fine-tuning"], rows))


def full_fine_tuning(report: Path) -> str:
    """How much of the base's progress full fine-tuning makes."""
    (row,) = (row for row in compare([read_report(report)]).rows if row.attack == "full fine-tuning")
    (cell,) = row.cells
    return "not measured" if cell is None else cell.cell


def nats(base: Path, fold: Path, work: Path, minutes: float) -> list[str]:
    """Loss of the base → of the fold in each format, by the tools."""
    table = formats(base, [fold], work, minutes, FORMATS)
    losses = re.findall(r"^\| llama\.cpp \| \w+ \| ([\d.]+) \| .*?([\d.]+|not finite) \|$", table, re.MULTILINE)
    return [" → ".join(pair) for pair in losses] or ["not measured"] * len(FORMATS)


if __name__ == "__main__":
    main()
