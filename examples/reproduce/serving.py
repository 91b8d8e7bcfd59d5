"""Formats × profile and attacks × profile of folds, by the real tools: docs/tables/serving.md.

    python examples/reproduce/serving.py MODEL [MODEL …] --profiles float16-cache quantizable --minutes 9

Finished cells and runs are kept in ``--work``: what was cut off goes on where it was. What is missing says so.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from specdef_cli.checkpoint.files import write_durably
from specdef_cli.hardening.options import Fold, HardenOptions
from specdef_cli.hardening.run import harden
from specdef_cli.report.document import compare, read_report

HERE = Path(__file__).parent
FORMATS = (
    *("float32", "bfloat16", "float16", "static-cache", "llm-int8", "nf4", "fp4", "nf4-double"),
    *("torchao-float8", "torchao-int8", "torchao-int4", "gguf-f32", "gguf-bf16", "gguf-f16"),
    *("q8_0", "q6_k", "q5_k_m", "q4_0", "q4_1", "q4_k_m", "lora", "lora-merged"),
)
SMALL = 10_000_000
"""Bytes of a checkpoint that is trained for 30 steps of 8×64 tokens; a larger one takes 10 of 4×96."""


def main() -> None:
    """Measure what is missing, as far as the time goes, and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", type=Path, nargs="+", help="directories of bases")
    parser.add_argument("--profiles", nargs="+", default=["float16-cache", "quantizable"])
    parser.add_argument("--minutes", type=float, default=9, help="of measuring")
    parser.add_argument("--work", type=Path, default=Path("models/serving"))
    parser.add_argument("--only", choices=("formats", "attacks"), help="measure these alone; both are shown")
    parser.add_argument("--out", type=Path, help="a file for the tables, besides the output")
    given = parser.parse_args()
    end = time.monotonic() + 60 * given.minutes
    parts = []
    for base in given.models:
        name = model_name(base)
        folds = [hardened(base, profile, given.work / f"{name}-{profile}") for profile in given.profiles]
        parts += [f"### {name}", formats(base, folds, given.work, 0 if given.only == "attacks" else left(end))]
        for fold in folds:
            if given.only != "formats" and left(end) > 0:
                attack(base, fold, given.work, left(end))
        parts.append(attacks([given.work / "attacks" / fold.name / "report.json" for fold in folds], given.profiles))
    text = "\n\n".join(filter(None, parts)) + "\n"
    print(text)
    if given.out is not None:
        write_durably(given.out, text)


def model_name(base: Path) -> str:
    """What a model is called: its directory, or the one above where that is ``model``."""
    return base.name if base.name != "model" else base.parent.name.replace("_", "-")


def left(end: float) -> float:
    """Minutes until then."""
    return max(0.0, (end - time.monotonic()) / 60)


def hardened(base: Path, profile: str, out: Path) -> Path:
    """The fold of a base, made if it is not there."""
    if not out.is_dir():
        harden(HardenOptions(str(base), out, Fold(profile)))  # type: ignore[arg-type]
    return out


def formats(base: Path, folds: Sequence[Path], work: Path, minutes: float, rows: Sequence[str] = FORMATS) -> str:
    """The table of ``examples/real/consumers.py``: what users' tools make of the base and of its folds.

    Nobody quantizes a small one: its rows are shorter than a block, and llama.cpp does not know its tokenizer.
    """
    if is_small(base):
        return ""
    command = [sys.executable, HERE.parent / "real/consumers.py", *folds, "--base", base, "--rows", ",".join(rows)]
    kept = ["--cells", work / "cells", "--minutes", minutes]
    done = subprocess.run(list(map(str, [*command, *kept])), stdout=subprocess.PIPE, text=True, check=True)
    table = re.search(r"^\|.*(\n\|.*)+", done.stdout, re.MULTILINE)
    return table[0] if table else ""


def is_small(base: Path) -> bool:
    """Whether a model trains in seconds."""
    return sum(path.stat().st_size for path in base.glob("*.safetensors")) < SMALL


def attack(
    base: Path, fold: Path, work: Path, minutes: float, attacks: str = f"--suite {HERE / 'serving.toml'}"
) -> None:
    """Run attacks, ordinary recipes by default, on a fold and on its base, whose runs the folds share."""
    budget = (
        "--steps 30 --batch-size 8 --sequence-length 64"
        if is_small(base)
        else ("--steps 10 --batch-size 4 --sequence-length 96 --eval-sequences 24 --eval-every 5 --dtype mixed")
    )
    out = work / "attacks" / fold.name
    command = f"-m specdef_cli attack {fold} --control {base} {attacks} --out {out} {budget}"
    limit = f"--runs {work / 'runs'} --time-limit {max(1, round(minutes))}m --quiet"
    subprocess.run([sys.executable, *command.split(), *limit.split()], check=True)


def attacks(reports: Sequence[Path], profiles: Sequence[str]) -> str:
    """Shares of each recipe's own control at the best rate, a column a profile."""
    there = [(profile, path) for profile, path in zip(profiles, reports, strict=True) if path.is_file()]
    if not there:
        return "Attacks: not measured yet."
    compared = compare([read_report(path) for _, path in there])
    columns = " | ".join(profile for profile, _ in there)
    lines = [f"| attack | control | {columns} |", "|---|---|" + "---|" * len(there)]
    for row in compared.rows:
        lines.append(f"| {row.attack} | {row.control} | {' | '.join(row.texts[2:])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
