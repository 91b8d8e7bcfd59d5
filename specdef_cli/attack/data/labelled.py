"""Labelled examples of any kind: rows divided into halves, labels numbered, and what becomes of the model's head."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from specdef_cli.attack.data.attack_data import check_size, is_held_out, whole_batches
from specdef_cli.attack.data.rows import field, rows
from specdef_cli.attack.options import AttackOptions
from specdef_cli.errors import SpecDefError

Example = dict[str, Any]

MOST_CLASSES = 1_000_000
"""A larger number in the column of labels is no class, and a head of that size would not fit into memory."""


class Examples(Dataset[Example]):
    """Examples with a class under ``label``.

    Args:
        examples: As they are kept in memory.
        prepare: From one of them to what a batch is made of; ``None`` where they are that already.
    """

    def __init__(self, examples: list[Example], prepare: Callable[[Example], Example] | None = None) -> None:
        self.examples = examples
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        example = self.examples[index]
        return example if self.prepare is None else self.prepare(example)


@dataclass(frozen=True)
class LabelledHalves:
    """What was read.

    Attributes:
        train, held_out: Examples; ``label`` is the number of a class.
        fingerprint: Sixteen hexadecimal digits of both.
        labels: Number of classes that the model's head gets.
        resize_head: Whether the checkpoint's own head has another number.
    """

    train: list[Example]
    held_out: list[Example]
    fingerprint: str
    labels: int
    resize_head: bool


def labelled_halves(
    options: AttackOptions, what: str, column: str, encode: Callable[[Any], Example], head_labels: int
) -> LabelledHalves:
    """Read as many rows as a run needs, in a random order.

    Args:
        options: Which data, and how much of it.
        what: What is counted, in the plural: texts, images.
        column: The column that is classified.
        encode: Makes an example of that column's value.
        head_labels: Classes that the checkpoint's configuration has.

    Raises:
        SpecDefError: No data set is named, it lacks a column, its labels are no classes, or it is too small.
    """
    if options.dataset is None:
        raise SpecDefError(
            f"an attack on a classifier needs labelled {what}, and no data set is given",
            f"Give --dataset with a column of {what} and one of labels (--{what[:-1]}-column, --label-column).",
        )
    wanted = options.steps * options.batch_size
    train: list[Example] = []
    held_out: list[Example] = []
    names: dict[Any, None] = {}
    for number, row in enumerate(rows(options, shuffle=True)):
        value, label = (field(row, name, options.dataset) for name in (column, options.label_column))
        names.setdefault(label)
        half, enough = (held_out, options.eval_sequences) if is_held_out(number) else (train, wanted)
        if len(half) < enough:
            half.append({**encode(value), "label": label})
        elif len(train) >= wanted and len(held_out) >= options.eval_sequences:
            break
    if not held_out and len(train) > 1:
        train, held_out = train[:-1], train[-1:]
    check_size(options.dataset, what, len(train), len(held_out), options)
    train = whole_batches(train, options.batch_size)
    classes = _classes(names, options)
    halves = [[{**example, "label": classes[example["label"]]} for example in half] for half in (train, held_out)]
    count = max(classes.values()) + 1
    # A checkpoint whose head has room for every class keeps its head.
    labels = head_labels if head_labels >= count and head_labels > 1 else count
    digest = hashlib.sha256()
    for half in halves:
        for example in half:
            digest.update(repr(example).encode())
        digest.update(b"|")
    return LabelledHalves(halves[0], halves[1], digest.hexdigest()[:16], labels, labels != head_labels)


def _classes(names: Iterable[Any], options: AttackOptions) -> dict[Any, int]:
    """Class numbers: labels that are numbers stand for themselves, others are numbered in sorted order."""
    labels = list(names)
    if all(isinstance(label, int) and not isinstance(label, bool) for label in labels):
        if min(labels) < 0:
            raise SpecDefError(
                f"{options.dataset} has the label {min(labels)}; classes count from 0",
                "Use a labelled split (test splits often hide their labels as -1).",
            )
        if max(labels) >= MOST_CLASSES:
            raise SpecDefError(
                f"{options.dataset} has the label {max(labels)}, which is too large for a class; they count from 0",
                "Name a column of classes with --label-column, or number them from 0.",
            )
        return {label: label for label in labels}
    if any(isinstance(label, float | list | dict) or label is None for label in labels):
        raise SpecDefError(
            f"column {options.label_column!r} of {options.dataset} does not hold classes",
            "Name a column of whole numbers or names with --label-column.",
        )
    return {label: number for number, label in enumerate(sorted(labels, key=str))}
