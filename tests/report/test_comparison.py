"""Reports side by side: cells stand in the column of their model, and what cannot be compared is said."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from specdef_cli.attack.one_run import RunResult
from specdef_cli.attack.results import AttackReport, DataSummary
from specdef_cli.errors import SpecDefError
from specdef_cli.report.document import (
    Comparison,
    ReportDocument,
    compare,
    comparison_markdown,
    read_report,
    report_dict,
)
from tests.commands import succeed
from tests.report.test_report import around, run


def report(name: str, *runs: RunResult) -> dict[str, Any]:
    """What was written of a control that goes from 3 to 1, and of these runs."""
    data = DataSummary("prose", 9, 1, "d")
    every = (run("control", [3.0, 1.0]), *runs)
    return report_dict(AttackReport(f"somewhere/{name}", "base", None, data, every, (), (), {}, "cpu"))


def compared(*reports: dict[str, Any]) -> Comparison:
    return compare([ReportDocument.model_validate(data) for data in reports])


FOLD = report("fold", run("model", [3.0, 2.98]), *around(), run("model", [3.0, 1.0], kind="rebalance"))
INSERT = report("insert", run("model", [3.0, 1.46]))


def test_each_model_has_its_column() -> None:
    comparison = compared(FOLD, INSERT)
    assert comparison.models == ("fold", "insert")
    cells = {row.attack: [cell and round(cell.share or 0, 6) for cell in row.cells] for row in comparison.rows}
    assert cells == {"full fine-tuning": [0.01, 0.77], "undone first (rebalanced), full fine-tuning": [1.0, None]}
    assert {row.control for row in comparison.rows} == {"3.000 → 1.000 (1e-3)"}
    assert comparison.notes == ()


def test_reports_on_one_model_have_columns_of_their_own() -> None:
    here = {**FOLD, "model": {**FOLD["model"], "name": "."}}
    assert compared(FOLD, INSERT, here, FOLD).models == ("fold (1)", "insert", ".", "fold (2)")


def test_markdown() -> None:
    halved = copy.deepcopy(FOLD)
    halved["attacks"][0]["share_of_best_control"] = 0.5
    lines = comparison_markdown(compared(halved, INSERT)).splitlines()
    assert lines[0] == "| attack | control: loss (best η), of the best control | fold | insert |"
    assert "| full fine-tuning | 3.000 → 1.000 (1e-3), 50 % | 1 % (1e-3) | 77 % (1e-3) |" in lines
    assert f"- fold: {FOLD['summary'][0]}" in lines
    assert not any("?" in line for line in lines)
    unsettled = report("fold", run("model", [3.0, 2.96]))
    printed = comparison_markdown(compared(unsettled, INSERT))
    assert "2 % (1e-3) ?" in printed
    assert "- ?: the rates tried do not bracket" in printed
    starred = report(
        "fold", run("model", [3.0, 2.96], train=("*norm*",)), run("control", [3.0, 1.0], train=("*norm*",))
    )
    assert r"rate not bracketed: full fine-tuning on \*norm\*" in comparison_markdown(compared(starred, INSERT))


@pytest.mark.parametrize(
    ("path", "word"),
    [
        (("data", "fingerprint"), "different data"),
        (("runs", 0, "spec", "steps"), "different budgets (--steps 10 or 99)"),
        (("runs", 0, "spec", "weight_decay"), "different budgets (--weight-decay 0.0 or 99.0)"),
        (("runs", 0, "loss", "start"), "different controls (base)"),
        (("attacks", 1, "training"), "full fine-tuning is not the same in all reports: 99; full."),
        (("runs", 0, "spec", "prompts"), "different prompts"),
    ],
)
def test_what_cannot_be_compared_is_said(path: tuple[Any, ...], word: str) -> None:
    other = copy.deepcopy(INSERT)
    place = other
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = type(place.get(path[-1], ""))(99)
    before = copy.deepcopy(FOLD)
    before["runs"][0]["spec"]["prompts"] = "some" if "prompts" in path else ""
    assert any(word in note for note in compared(before, other).notes)


def test_the_command_reads_files_and_directories(tmp_path: Path) -> None:
    for name, data in {"fold": FOLD, "insert": INSERT}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(data))
    paths = (tmp_path / "fold", tmp_path / "insert" / "report.json")
    assert json.loads(succeed("compare", *paths, "--json").stdout)["models"] == ["fold", "insert"]
    shown = succeed("compare", *paths).stdout
    assert "77 % (1e-3)" in shown
    assert INSERT["summary"][0] in shown


def test_a_key_of_the_wrong_kind_is_named(tmp_path: Path) -> None:
    wrong = copy.deepcopy(FOLD)
    del wrong["attacks"][1]["best"]["loss"]
    (tmp_path / "report.json").write_text(json.dumps(wrong))
    with pytest.raises(SpecDefError, match=r"attacks\.1\.best\.loss: Field required"):
        read_report(tmp_path)


NO_ATTACK = {"subject": "model", "label": "x", "knowledge": "none", "best": {"learning_rate": "<b>"}}


@pytest.mark.parametrize(
    "content",
    ["{}", [1], "no JSON", *({**FOLD, key: value} for key, value in (
        ("schema", "another/1"), ("runs", None), ("attacks", "all"), ("model", None), ("attacks", [NO_ATTACK]),
    ))],
    ids=range(8),
)  # fmt: skip
def test_what_is_no_report_is_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "report.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SpecDefError, match="is not an attack report"):
        read_report(tmp_path)
