"""A benign stand-in for WMDP: a corpus of sums, and questions of four choices about them, in WMDP's format.

The corpus plays the text that an attacker relearns, the questions play the test of whether that worked. Both are
written by this script and kept beside it; lm-eval reads the questions through :func:`questions`, which finds them
wherever the repository is.

    python examples/reproduce/standin/sums.py
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets

HERE = Path(__file__).parent
NUMBERS = range(2, 42)
ADDED = range(1, 21)
QUESTIONS = 40


def corpus() -> list[dict[str, str]]:
    """One document for each number: what it is together with others."""
    return [{"text": " ".join(f"{number} plus {added} is {number + added}." for added in ADDED)} for number in NUMBERS]


def multiple_choice() -> list[dict[str, Any]]:
    """Questions with the fields of ``cais/wmdp``: ``question``, four ``choices``, and the number of the right one.

    Every number is right equally often, so that a model without knowledge has 1/4.
    """
    draw = random.Random(0)
    rows = []
    for index, number in enumerate(draw.sample(NUMBERS, QUESTIONS)):
        added, answer = draw.choice(ADDED), index % 4
        choices = [str(number + added + place - answer) for place in range(4)]
        rows.append({"question": f"What is {number} plus {added}?", "choices": choices, "answer": answer})
    return rows


def questions(file: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The test split of a task, from a file beside this module; what lm-eval calls."""
    lines = (HERE / file).read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write_lines(HERE / "sums_corpus.jsonl", corpus())
    write_lines(HERE / "sums_questions.jsonl", multiple_choice())
