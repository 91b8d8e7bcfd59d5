"""Labels of every shape, and tokenizers without padding, given to an attack on a classifier."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.attack.test_tasks import LABELS, classifier, write_rows
from tests.commands import assert_refused, call_cli
from tests.faults.small_attack import SMALL
from tests.hardening.mutations import REMOVED, edit_json


def attack(directory: Path, rows: Path, out: Path, *more: str) -> tuple[str | Path, ...]:
    return ("attack", directory, "--control", directory, "--dataset", rows, *SMALL, "--out", out, *more)


@pytest.mark.parametrize("shape", LABELS)
def test_labels_of_every_shape(shape: str, tmp_path: Path) -> None:
    label, kind, _ = LABELS[shape]
    model = classifier(tmp_path / "model", problem_type=kind)
    result = call_cli(*attack(model, write_rows(tmp_path / "rows.jsonl", label), tmp_path / "out", "--json"))
    assert result.code == 0, result.stderr
    runs = json.loads(result.stdout)["runs"]
    assert len(runs) == 3
    assert all(run["loss"]["start"] > 0 for run in runs)


@pytest.mark.parametrize("label", [None, {"a": 1}, []], ids=str)
def test_labels_that_are_none(label: object, tmp_path: Path) -> None:
    model = classifier(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", lambda number: label)
    assert_refused(call_cli(*attack(model, rows, tmp_path / "out")), "label")


def test_a_tokenizer_that_pads_with_nothing(tmp_path: Path) -> None:
    """Refused, and after what the hint says it is attacked."""
    model = classifier(tmp_path / "model")
    edit_json("tokenizer_config.json", pad_token=REMOVED, eos_token=REMOVED)(model)
    rows = write_rows(tmp_path / "rows.jsonl", lambda number: number % 3)
    assert_refused(call_cli(*attack(model, rows, tmp_path / "a")), '"pad_token"', "tokenizer_config.json")
    edit_json("tokenizer_config.json", pad_token="<pad>")(model)
    assert call_cli(*attack(model, rows, tmp_path / "b")).code == 0
