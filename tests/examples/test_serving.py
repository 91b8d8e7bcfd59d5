"""The script that measures folds by profile: its names, its order of work, and what it says of what is missing."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

REPRODUCE = Path(__file__).parents[2] / "examples/reproduce"


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(REPRODUCE)
    return importlib.import_module("serving")


def test_a_model_is_called_by_its_directory(serving: Any) -> None:
    assert serving.model_name(Path("examples/tiny_llama/model")) == "tiny-llama"
    assert serving.model_name(Path("models/smollm2-135m-instruct")) == "smollm2-135m-instruct"


def test_a_small_model_has_a_budget_of_its_own(serving: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    assert serving.is_small(tmp_path)
    assert serving.attacks([tmp_path / "absent.json"], ["quantizable"]) == "Attacks: not measured yet."


def test_every_format_is_one_that_the_tools_table_measures(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPRODUCE.parent / "real")
    assert set(serving.FORMATS) <= importlib.import_module("consumer_rows").ROWS.keys()
