"""What users' tools make of hardened models, in a few rows: from docs/tables/consumers-*.md, on standard output.

A cell of the summary counts the verdicts of all language models' tables over several rows; nothing is measured here.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TABLES = Path(__file__).parents[1] / "tables"
LANGUAGE_MODELS = "nats a token"
"""What the first line of a language model's table says; an encoder's has other rows."""

SAID = "What `harden` says that each does not survive:"
VERDICTS = ("kept", "degraded", "broken, silently", "refused", "skipped")

GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "float32, bfloat16, a static cache, long and padded inputs": (
        "transformers", ("float32", "bfloat16", "static cache", "long input", "left-padded batch"),
    ),
    "float16": ("transformers", ("float16",)),
    "LLM.int8, NF4, FP4, double NF4": ("bitsandbytes", ()),
    "float8, int8, int4 weights": ("torchao", ()),
    "F32 and BF16 files, as it comes (a float16 cache)": ("llama.cpp", ("F32", "F32, no flash attention", "BF16")),
    "F32 files, a float32 cache": (
        "llama.cpp", ("F32, float32 cache", "F32, float32 cache, no flash attention"),
    ),
    "F16, 8- and 4-bit files": (
        "llama.cpp",
        ("F16", "F16, written by the converter", "Q8_0", "Q8_0, written by the converter", "Q4_0", "Q4_K_M"),
    ),
    "an adapter carried over, attached and merged": (
        "PEFT", ("LoRA carried over, attached", "LoRA carried over, merged"),
    ),
    "trained with LoRA's or SFT's defaults": ("PEFT, TRL", ()),
    "evaluated": ("lm-eval", ()),
    "merged linearly with the base": ("mergekit", ()),
}  # fmt: skip
"""Rows of the summary: the tool, and the rows of the tables; none means all of that tool's that no other row names."""


@dataclass(frozen=True)
class ConsumerTable:
    """A table as ``examples/real/consumers.py`` writes it.

    Attributes:
        model: The base's name.
        language_model: Whether it is one.
        verdicts: By tool and row, then by the way of hardening. What the base itself does not survive is left out.
        lost: What ``harden`` says that a way does not survive, by the way.
    """

    model: str
    language_model: bool
    verdicts: dict[tuple[str, str], dict[str, str]]
    lost: dict[str, tuple[str, ...]]


def read_table(text: str) -> ConsumerTable:
    """Read a table.

    Raises:
        ValueError: It is not one.
    """
    lines = text.splitlines()
    model, _, measure = lines[0].partition(": ")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    if not table or table[0][:3] != ["tool", "what", "base"] or SAID not in lines:
        raise ValueError(f"{lines[0]!r} does not begin a table of examples/real/consumers.py")
    ways = table[0][3:]
    verdicts = {(row[0], row[1]): dict(zip(ways, map(_verdict, row[3:]), strict=True)) for row in table[2:]}
    lost = {}
    for line in lines[lines.index(SAID) + 2 :]:
        if not line.startswith("- "):
            break
        way, _, formats = line.removeprefix("- ").partition(": ")
        lost[way] = () if formats == "nothing" else tuple(formats.split("; "))
    return ConsumerTable(model, LANGUAGE_MODELS in measure, verdicts, lost)


def _verdict(cell: str) -> str:
    return next(word for word in VERDICTS if cell.startswith(word))


def summary(tables: Iterable[ConsumerTable]) -> str:
    """The summary as Markdown: groups of rows against ways of hardening, over all language models."""
    read = [table for table in tables if table.language_model]
    ways = list(dict.fromkeys(way for table in read for way in table.lost))
    named = {(tool, row) for tool, rows in GROUPS.values() for row in rows}
    lines = [f"| tool | what | {' | '.join(ways)} |", "|---|---|" + "---|" * len(ways)]
    for title, (tools, rows) in GROUPS.items():
        wanted = [
            key
            for key in dict.fromkeys(key for table in read for key in table.verdicts)
            if key[0] in tools.split(", ") and (key[1] in rows if rows else key not in named)
        ]
        cells = [_cell(read, way, wanted) for way in ways]
        lines.append(f"| {tools} | {title} | {' | '.join(cells)} |")
    models = ", ".join(table.model for table in read)
    missing = [f"{way} has no column for {table.model}" for way in ways for table in read if way not in table.lost]
    notes = [f"Counted over {models}, by the tools themselves.", *(f"{note}." for note in missing)]
    return "\n".join([*lines, "", " ".join(notes)])


def _cell(tables: list[ConsumerTable], way: str, rows: list[tuple[str, str]]) -> str:
    with_it = [table for table in tables if way in table.lost]
    found = Counter(table.verdicts[row][way] for table in with_it for row in rows if row in table.verdicts)
    counts = [(found[verdict], verdict) for verdict in VERDICTS if verdict in found]
    if len(counts) == 1:
        return counts[0][1]
    return "; ".join(f"{count} {verdict}" for count, verdict in counts) or "not measured"


if __name__ == "__main__":
    sys.stdout.write(
        summary(read_table(path.read_text(encoding="utf-8")) for path in sorted(TABLES.glob("consumers-*.md"))) + "\n"
    )
