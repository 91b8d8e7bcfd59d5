"""The attack table of a model card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specdef_cli.certify.card import (
    AttackFigure,
    Resistance,
    attack_section,
    attack_table,
    read_resistance,
    with_section,
)
from specdef_cli.errors import SpecDefError
from tests.report.test_comparison import FOLD

CARD = "# A model\n\n### Attacks\n\nThe base's own words.\n\n## SpecDef\n\nWhat was changed.\n"


def figure(label: str, share: float | None, best: float | None, verdict: str) -> AttackFigure:
    return AttackFigure(label, "none", 1e-3, share, best, verdict)


RESISTANCE = Resistance(
    model="hardened",
    data="prose",
    budget="30 steps",
    attacks=(
        figure("embeddings", 1.0, 0.4, "not slowed"),
        figure("odd", None, None, "unknown"),
        figure("hira", 0.96, 0.91, "not slowed"),
        figure("full fine-tuning on *norm*", 0.95, 0.1, "not slowed"),
    ),
)


def test_the_attack_that_got_furthest_stands_first() -> None:
    rows = attack_table(RESISTANCE.attacks)[2:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| hira",
        "| embeddings",
        r"| full fine-tuning on \*norm\*",
        "| odd",
    ]
    assert "| 96 % | 91 % |" in rows[0]
    assert "| – | – |" in rows[-1]


def test_a_section_takes_the_place_of_its_own_kind_alone() -> None:
    section = attack_section(RESISTANCE)
    once = with_section(CARD, section)
    assert once.startswith(CARD.rstrip())
    assert once.count("### Attacks") == 2  # the base has one
    assert (
        r"Got through (at least 95 % of the control's progress): embeddings; hira; full fine-tuning on \*norm\*."
        in once
    )
    assert with_section(once, section) == once
    with_both = with_section(once, "### Certificate\n\n- function: holds.")
    assert with_both.index("hira") < with_both.index("### Certificate")
    newer = with_section(with_both, section.replace("30 steps", "60 steps"))
    assert "30 steps" not in newer
    assert newer.index("60 steps") < newer.index("### Certificate")
    assert newer.count("- function: holds.") == 1
    assert "The base's own words." in newer


def test_a_report_without_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(FOLD))
    assert read_resistance(tmp_path).model == "somewhere/fold"
    gone = {**FOLD, "model": {"name": "/home/someone/secret/fold", "hardening": None}}
    gone["data"] = {**gone["data"], "name": "../someone/notes.jsonl"}
    (tmp_path / "report.json").write_text(json.dumps(gone))
    assert (read_resistance(tmp_path).model, read_resistance(tmp_path).data) == ("fold", "notes.jsonl")
    (tmp_path / "report.json").write_text(json.dumps({**FOLD, "runs": []}))
    with pytest.raises(SpecDefError, match="an attack report without runs"):
        read_resistance(tmp_path)
