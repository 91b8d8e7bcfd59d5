"""Reports side by side: cells stand in the column of their model, and what cannot be compared is said."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from specdef_cli.cli.app import app
from specdef_cli.errors import SpecDefError
from specdef_cli.report.comparison import compare, comparison_markdown, read_report
from specdef_cli.report.serialize import SCHEMA_NAME


def attack(subject: str, share: float, *, variant: str = "plain", trained: str = "full") -> dict[str, Any]:
    return {
        "subject": subject, "variant": variant, "trained": trained, "optimizer": "adamw", "start": 3.0,
        "best": {"learning_rate": 1e-3, "loss": 3.0 - 2 * share}, "share_of_control": share,
        "share_of_best_control": share / 2, "verdict": "stopped" if share <= 0.05 else "not slowed",
    }  # fmt: skip


def report(name: str, *attacks: dict[str, Any]) -> dict[str, Any]:
    spec = {"steps": 30, "batch_size": 8, "sequence_length": 64}
    return {
        "schema": SCHEMA_NAME, "summary": [f"Verdict of {name}."], "model": {"name": f"somewhere/{name}"},
        "data": {"fingerprint": "d"}, "attacks": [attack("control", 1.0), *attacks], "runs": [{"spec": spec}],
    }  # fmt: skip


FOLD = report("fold", attack("model", 0.01), attack("model", 1.0, variant="rebalance"))
INSERT = report("insert", attack("model", 0.77))


def test_each_model_has_its_column() -> None:
    comparison = compare([FOLD, INSERT])
    assert comparison.models == ("fold", "insert")
    cells = {row.attack: [cell and cell.share for cell in row.cells] for row in comparison.rows}
    assert cells == {"full, adamw": [0.01, 0.77], "rebalance: full, adamw": [1.0, None]}
    assert {row.control for row in comparison.rows} == {"3.000 → 1.000 (1e-3)"}
    assert comparison.notes == ()


def test_markdown() -> None:
    lines = comparison_markdown(compare([FOLD, INSERT])).splitlines()
    assert lines[0] == "| attack | control: loss (best η), of the best control | fold | insert |"
    assert lines[2] == "| full, adamw | 3.000 → 1.000 (1e-3), 50 % | 1 % (1e-3) | 77 % (1e-3) |"
    assert "- fold: Verdict of fold." in lines


@pytest.mark.parametrize(
    ("path", "word"), [(("data", "fingerprint"), "different data"), (("runs", 0, "spec", "steps"), "different budgets")]
)
def test_what_cannot_be_compared_is_said(path: tuple[Any, ...], word: str) -> None:
    other = copy.deepcopy(INSERT)
    place = other
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = 99
    assert any(word in note for note in compare([FOLD, other]).notes)


def test_the_command_reads_files_and_directories(tmp_path: Path) -> None:
    for data in (FOLD, INSERT):
        directory = tmp_path / Path(data["model"]["name"]).name
        directory.mkdir()
        (directory / "report.json").write_text(json.dumps(data))
    paths = [str(tmp_path / "fold"), str(tmp_path / "insert" / "report.json")]
    result = CliRunner().invoke(app, ["compare", *paths, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["models"] == ["fold", "insert"]
    shown = CliRunner().invoke(app, ["compare", *paths])
    assert "77 % (1e-3)" in shown.stdout
    assert "Verdict of insert." in shown.stdout


@pytest.mark.parametrize("content", ["{}", "[1]", "no JSON", json.dumps({"schema": "another/1"})])
def test_what_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(SpecDefError, match="is not an attack report"):
        read_report(tmp_path)
