"""Tables of the pages: counted from what was measured, in agreement with ``harden``, a dash for what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from specdef_cli.hardening import card
from tests.commands import REPOSITORY
from tests.consumer_tables import TABLES, generator, measured_tables

consumers = generator("tools")

FIRST = """\
one: nats a token, 8 tokens.

| tool | what | base | fold | scale |
|---|---|---|---|---|
| transformers | float32 | 3.4 | kept: 3.4 | kept: 3.4 |
| transformers | bfloat16 | 3.4 | degraded: 3.5 | kept: 3.4 |
| transformers | float16 | 3.4 | broken, silently: not finite | kept: 3.4 |
| llama.cpp | Q4_0 | 3.4 | refused | refused |

What `harden` says that each does not survive:

- fold: float16 weights; float8
- scale: nothing

Refused, or not measured:

- llama.cpp, Q4_0, fold: no
"""
SECOND = """\
two: nats a token, 8 tokens.

| tool | what | base | fold |
|---|---|---|---|
| transformers | float32 | 2.4 | kept: 2.4 |
| transformers | float16 | 2.4 | kept: 2.4 |

What `harden` says that each does not survive:

- fold: nothing
"""


def test_the_summary_counts_every_verdict_of_every_model() -> None:
    tables = [consumers.read_table(text) for text in (FIRST, SECOND)]
    assert tables[0].lost == {"fold": ("float16 weights", "float8"), "scale": ()}
    assert tables[0].verdicts["transformers", "float16"] == {"fold": "broken, silently", "scale": "kept"}
    rows = [line for line in consumers.summary(tables).splitlines() if line.startswith("| transformers")]
    assert [[cell.strip() for cell in row.strip("|").split("|")][2:] for row in rows] == [
        ["2 kept; 1 degraded", "kept"],
        ["1 kept; 1 broken, silently", "kept"],
    ]
    assert "scale has no column for two." in consumers.summary(tables)


def test_the_summary_is_that_of_the_tables_beside_it() -> None:
    found = consumers.summary(consumers.read_table(path.read_text(encoding="utf-8")) for path in measured_tables())
    assert (TABLES / "consumers.md").read_text(encoding="utf-8") == f"{found}\n", "`make real-consumers` writes it"


TRAINED = {
    ("PEFT", "LoRA attached, trained, merged, reloaded"),
    ("TRL", "SFTTrainer with its defaults, after 5 steps"),
}
"""Rows that train: to break there is what hardening is for."""

WITH_CODE = {"scale", "factors"}
"""Ways whose models bring code to load, as `harden` says: a tool that runs none refuses them in any format."""


def names(row: tuple[str, str], lost: tuple[str, ...]) -> str:
    """The format that ``harden`` would name a row by, where it names these."""
    tool, what = row
    if tool == "mergekit":
        return card.MERGES
    if what.startswith(("float16", "F16")):
        return card.FLOAT16
    if what.endswith("double quantization") and card.BLOCKS not in lost:
        return card.DOUBLE
    if tool == "bitsandbytes" or what.startswith(("Q", "int8", "int4")):
        return card.BLOCKS
    if what.startswith("float8"):
        return card.FLOAT8
    if tool == "llama.cpp" and not what.endswith("float32 cache, no flash attention"):
        return card.CACHE
    return ""


@pytest.mark.parametrize("path", measured_tables(), ids=lambda path: path.stem)
def test_harden_names_what_the_tools_did_not_keep(path: Path) -> None:
    """Of every way and row: kept, or among what ``harden`` and the card say that it does not survive."""
    table = consumers.read_table(path.read_text(encoding="utf-8"))
    for row, verdicts in table.verdicts.items():
        for way, verdict in verdicts.items():
            if way in WITH_CODE and verdict == "refused":
                assert any(tool in card.SCALED_LOADERS for tool in row[0].split(", ")), (path.stem, row, way)
            elif row not in TRAINED and verdict != "kept":
                assert names(row, table.lost[way]) in table.lost[way], (path.stem, row, way, verdict)


@pytest.mark.parametrize("path", measured_tables(), ids=lambda path: path.stem)
def test_harden_names_nothing_that_the_tools_kept(path: Path) -> None:
    table = consumers.read_table(path.read_text(encoding="utf-8"))
    for way, lost in table.lost.items():
        for name in lost:
            verdicts = {verdicts[way] for row, verdicts in table.verdicts.items() if names(row, lost) == name}
            assert not verdicts or verdicts != {"kept"}, (path.stem, way, name)


SMALL = """\
| attack | control | small-fold | small-scale |
|---|---|---|---|
| full fine-tuning | 2 → 1 (1e-3) | 1 % (1e-9) | 3 % (1e-9) ? |
| HiRA | 2 → 1 (1e-3) | 100 % (1e-3) | – |
| undone first (unscaled), full fine-tuning | 2 → 1 (1e-3) | – | 90 % (1e-3) |

| hardened | size |
|---|---|
| small-fold | +0.0 MB |
"""
DEEP = """\
| attack | control | deep-scale | deep-fold |
|---|---|---|---|
| full fine-tuning | 2 → 1 (1e-3) | 4 % (1e-9) | 2 % (1e-9) ? |
"""


def test_cells_hold_one_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "docs/generators")
    resistance = generator("resistance")
    texts = {"a small one": SMALL, "a deep one": DEEP}
    assert resistance.method_table(texts, "fold").splitlines() == [
        "| `fold` | a small one | a deep one |",
        "| --- | --- | --- |",
        "| HiRA | 100 % | – |",
        "| full fine-tuning | 1 % | 2 % ? |",
    ]
    assert "| undone first, full fine-tuning | 90 % | – |" in resistance.method_table(texts, "scale")
    assert resistance.readme_table(SMALL).splitlines()[2:] == [
        "| HiRA | 100 % | – |",
        "| undone first, full fine-tuning | – | 90 % |",
        "| full fine-tuning | 1 % | 3 % ? |",
    ]


def test_the_tables_are_those_of_the_tables_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "docs/generators")
    for path, text in generator("resistance").written().items():
        assert path.read_text(encoding="utf-8") == text, "`make pictures` writes it"
