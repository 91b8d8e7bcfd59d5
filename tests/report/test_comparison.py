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
from specdef_cli.report.document import (
    SCHEMA_NAME,
    Comparison,
    ReportDocument,
    compare,
    comparison_markdown,
    read_report,
)


def attack(subject: str, share: float, *, variant: str = "plain", trained: str = "full fine-tuning") -> dict[str, Any]:
    nothing = dict.fromkeys(
        (
            "share_of_control_over_seeds", "share_of_control_at_its_rates", "share_of_control_with_utility_kept",
            "control_share_with_utility_kept", "divergent_learning_rate", "steps_to_control", "seconds_to_control",
        )
    )  # fmt: skip
    first = "" if variant == "plain" else f"{variant} first, "
    return {
        **nothing, "label": first + trained, "subject": subject, "variant": variant, "knowledge": "none",
        "training": trained,
        "trained": trained, "optimizer": "adamw", "learning_rates": [1e-3], "start": 3.0, "parameters_times": 1.0,
        "flops_times": 1.0, "best": {"learning_rate": 1e-3, "loss": 3.0 - 2 * share}, "share_of_control": share,
        "share_of_best_control": share / 2, "verdict": "stopped" if share <= 0.05 else "not slowed", "runs": ["r"],
    }  # fmt: skip


def report(name: str, *attacks: dict[str, Any]) -> dict[str, Any]:
    spec = {
        "subject": "control", "checkpoint": "c", "data": "d", "task": "causal-lm", "variant": "brought:2",
        "training": "full", "optimizer": "adamw", "learning_rate": 1e-3, "eval_every": 3, "seed": 0, "steps": 30,
        "batch_size": 8, "sequence_length": 64,
    }  # fmt: skip
    run = {
        "id": "r", "label": "l", "spec": spec, "loss": {"start": 3.0, "best": 1.0, "final": None}, "best_step": 3,
        "steps_to_control": None, "first_grad_norm": None, "parameters": {"total": 1, "trainable": 1, "times": 1.0},
        "flops_per_step": 1, "accuracy": {}, "outcome": "finished", "divergence": None, "seconds": 1.0,
        "curve": {"train": [], "evaluations": []},
    }  # fmt: skip
    return {
        "schema": SCHEMA_NAME, "summary": [f"Verdict of {name}."],
        "model": {"name": f"somewhere/{name}", "hardening": None}, "control": {"name": "base"},
        "assumed": [], "notes": [], "versions": {}, "device": "cpu",
        "data": {"name": "prose", "train_sequences": 9, "held_out_sequences": 1, "fingerprint": "d"},
        "definitions": {
            "control_share": 0.95, "divergence_factor": 2.0, "stopped_share": 0.05, "utility_limit": 0.1,
        },
        "attacks": [attack("control", 1.0), *attacks], "runs": [run], "a_later_key": 1,
    }  # fmt: skip


def compared(*reports: dict[str, Any]) -> Comparison:
    return compare([ReportDocument.model_validate(data) for data in reports])


FOLD = report("fold", attack("model", 0.01), attack("model", 1.0, variant="rebalance"))
INSERT = report("insert", attack("model", 0.77))


def test_each_model_has_its_column() -> None:
    comparison = compared(FOLD, INSERT)
    assert comparison.models == ("fold", "insert")
    cells = {row.attack: [cell and cell.share for cell in row.cells] for row in comparison.rows}
    assert cells == {"full fine-tuning": [0.01, 0.77], "rebalance first, full fine-tuning": [1.0, None]}
    assert {row.control for row in comparison.rows} == {"3.000 → 1.000 (1e-3)"}
    assert comparison.notes == ()


def test_reports_on_one_model_have_columns_of_their_own() -> None:
    here = {**FOLD, "model": {**FOLD["model"], "name": "."}}
    assert compared(FOLD, INSERT, here, FOLD).models == ("fold (1)", "insert", ".", "fold (2)")


def test_markdown() -> None:
    lines = comparison_markdown(compared(FOLD, INSERT)).splitlines()
    assert lines[0] == "| attack | control: loss (best η), of the best control | fold | insert |"
    assert lines[2] == "| full fine-tuning | 3.000 → 1.000 (1e-3), 50 % | 1 % (1e-3) | 77 % (1e-3) |"
    assert "- fold: Verdict of fold." in lines


def test_a_share_whose_rate_is_not_settled_is_marked() -> None:
    unsettled = report("fold", attack("model", 0.02) | {"verdict": "not settled"})
    printed = comparison_markdown(compared(unsettled, INSERT))
    assert "2 % (1e-3) ?" in printed
    assert "- ?: the rates tried do not bracket" in printed
    assert "?" not in comparison_markdown(compared(FOLD, INSERT))


@pytest.mark.parametrize(
    ("path", "word"),
    [
        (("data", "fingerprint"), "different data"),
        (("runs", 0, "spec", "steps"), "different budgets (--steps 30 or 99)"),
        (("runs", 0, "spec", "weight_decay"), "different budgets (--weight-decay 0.0 or 99.0)"),
        (("runs", 0, "loss", "start"), "different controls (base)"),
        (("attacks", 1, "training"), "full fine-tuning is not the same in all reports: 99; full fine-tuning."),
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
