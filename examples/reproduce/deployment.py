"""What of the tiny Llama's life after release still works after hardening, for several ways of hardening it.

Puts base and hardened checkpoints through every format, and prints the losses (nats a byte, on the held-out half of the
base text) as one Markdown table. Takes some minutes on one core.

    python examples/reproduce/deployment.py BASE HARDENED [HARDENED …]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from setting import base_text

from specdef_cli.certify.formats import FORMATS, FormatFigure, measure_formats
from specdef_cli.model.inputs import token_batch
from specdef_cli.model.opened import open_model


def cell(figure: FormatFigure) -> str:
    """The hardened loss and what became of it."""
    if figure.status == "skipped":
        return f"skipped: {figure.note}"
    if figure.status == "refused":
        return f"refused: {figure.note}"
    return f"{figure.verdict} ({'no finite loss' if figure.hardened is None else f'{figure.hardened:.3f}'})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("base", type=Path)
    parser.add_argument("hardened", type=Path, nargs="+", help="hardened directories; a column each")
    arguments = parser.parse_args()
    _, held_out = base_text()
    tokens = token_batch(arguments.base, held_out, sequences=16, length=256)
    columns = {
        directory.name: measure_formats(open_model(arguments.base), open_model(directory), tokens, list(FORMATS))
        for directory in arguments.hardened
    }
    print(f"| format | base | {' | '.join(columns)} | note |")
    print("|---|---|" + "---|" * (len(columns) + 1))
    for row in zip(*columns.values(), strict=True):
        base = "" if row[0].base is None else f"{row[0].base:.3f}"
        notes = "; ".join(dict.fromkeys(figure.note for figure in row if figure.note and figure.status != "skipped"))
        cells = " | ".join(cell(figure) for figure in row)
        print(f"| {row[0].tool}, {FORMATS[row[0].format].description} | {base} | {cells} | {notes} |")


if __name__ == "__main__":
    main()
