"""The table of shares over models of all kinds: ways in the order asked for, a dash for what is missing."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.report.test_comparison import attack, report

GENERATOR = Path(__file__).parents[2] / "docs/generators/resistance.py"


def test_cells_hold_a_share_for_each_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unsettled = attack("model", 0.02) | {"verdict": "not settled"}
    for name, attacks in {
        "small-fold": [attack("model", 0.01), attack("model", 1.0, trained="HiRA")],
        "small-scale": [attack("model", 0.03), attack("model", 0.9, variant="collapse")],
        "deep-fold": [unsettled],
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report(name, *attacks)), encoding="utf-8")
    given = [str(tmp_path), "--models", "small", "deep", "absent", "--ways", "fold", "scale"]
    monkeypatch.setattr(sys, "argv", ["resistance.py", *given])
    runpy.run_path(str(GENERATOR), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "| trained, with AdamW | small | deep |"
    assert printed[2:4] == ["| full | 1 % / 3 % | 2 % **?** / – |", "| HiRA | 100 % / – | – |"]
    assert printed[4] == "| undone first: full | – / 90 % | – |"
    assert printed[-1].startswith("Each cell: fold / scale.")
