"""Accuracy through lm-eval, on a task of our own whose answer is known by construction."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from specdef_cli import AttackOptions, attack
from specdef_cli.attack.train import task_accuracy
from specdef_cli.errors import SpecDefError
from specdef_cli.model import load_model, load_tokenizer
from specdef_cli.report.document import report_dict

TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager

TASK = """
task: favourite_letter
dataset_path: json
dataset_kwargs:
  data_files: {data}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture(autouse=True)
def no_other_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval reads more than ten thousand files for the index of its own."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Which of two letters comes next; the answer is the first choice in three of four questions."""
    rows = [{"question": f"{number}:", "choices": [" a", " b"], "answer": int(number % 4 == 3)} for number in range(8)]
    data = tmp_path / "letters.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "favourite_letter.yaml").write_text(TASK.format(data=data))
    return tmp_path


def test_a_model_that_always_says_a_is_right_three_times_of_four(base: Path, tasks: Path) -> None:
    model, tokenizer = load_model(base), load_tokenizer(base)
    letters = {letter: tokenizer(letter)["input_ids"][-1] for letter in ("a", "b")}
    # A head that puts one token above all others, whatever the hidden state: its row is along it, twice.
    for favourite, expected in (("a", 0.75), ("b", 0.25)):
        model.lm_head.weight.data.zero_()
        model.lm_head.register_forward_hook(
            lambda module, inputs, logits, token=letters[favourite]: (
                torch.nn.functional.one_hot(torch.full(logits.shape[:-1], token), logits.shape[-1]).float() * 20
            )
        )
        found = task_accuracy(model, tokenizer, ("favourite_letter",), task_directory=tasks)
        assert found == {"favourite_letter": expected}


def test_accuracy_is_in_the_report(base: Path, tasks: Path, tmp_path: Path) -> None:
    options = AttackOptions(
        model=base, control=base, out=tmp_path / "out", trainings=("full",), learning_rates=(1e-3,), steps=1,
        batch_size=2, sequence_length=8, eval_sequences=2, retained="none", eval_tasks=("favourite_letter",),
        eval_task_path=tasks,
    )  # fmt: skip
    for run in report_dict(attack(options))["runs"]:
        assert 0 <= run["accuracy"]["favourite_letter"] <= 1
    with pytest.raises(SpecDefError, match="no task 'guessing'"):
        attack(replace(options, eval_tasks=("guessing",)))
