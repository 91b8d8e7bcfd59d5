"""Tables of shares over models and methods: one share a cell, a dash for what is missing, figures of docs/tables."""

from __future__ import annotations

import pytest

from tests.commands import REPOSITORY
from tests.consumer_tables import generator

SMALL = """\
| attack | control | small-fold | small-scale |
|---|---|---|---|
| full, adamw | 2 → 1 (1e-3) | 1 % (1e-9) | 3 % (1e-9) ? |
| HiRA, adamw | 2 → 1 (1e-3) | 100 % (1e-3) | – |
| unscale: full, adamw | 2 → 1 (1e-3) | – | 90 % (1e-3) |

| hardened | size |
|---|---|
| small-fold | +0.0 MB |
"""
DEEP = """\
| attack | control | deep-scale | deep-fold |
|---|---|---|---|
| full, adamw | 2 → 1 (1e-3) | 4 % (1e-9) | 2 % (1e-9) ? |
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
    assert "| undone first, then full | 90 % | – |" in resistance.method_table(texts, "scale")
    assert resistance.readme_table(SMALL).splitlines()[2:] == [
        "| HiRA | 100 % | – |",
        "| undone first, then full | – | 90 % |",
        "| full fine-tuning | 1 % | 3 % ? |",
    ]


def test_the_tables_are_those_of_the_tables_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "docs/generators")
    for path, text in generator("resistance").written().items():
        assert path.read_text(encoding="utf-8") == text, "`make pictures` writes it"
