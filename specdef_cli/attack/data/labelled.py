"""Labelled examples of any kind: rows divided into halves, and labels as the model's loss takes them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from specdef_cli.attack.data.attack_data import check_size, is_held_out, repeated_rows, whole_batches
from specdef_cli.attack.data.labels import Head, Labels, labels_of
from specdef_cli.attack.data.rows import column_of, rows
from specdef_cli.attack.options import AttackOptions
from specdef_cli.errors import SpecDefError

Example = dict[str, Any]


class Examples(Dataset[Example]):
    """Examples with what the loss takes under ``label``.

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
        train, held_out: Examples; ``label`` is what the loss takes.
        fingerprint: Sixteen hexadecimal digits of both.
        labels: How the column of labels was read.
        resize_head: Whether the checkpoint's own head has another number of outputs.
        remarks: What a reader of the report should know of them.
    """

    train: list[Example]
    held_out: list[Example]
    fingerprint: str
    labels: Labels
    resize_head: bool
    remarks: tuple[str, ...] = ()


def labelled_halves(
    options: AttackOptions, what: str, columns: tuple[str, ...], encode: Callable[..., Example | None], head: Head
) -> LabelledHalves:
    """Read as many rows as a run needs, in a random order.

    Args:
        options: Which data, and how much of it.
        what: What is counted, in the plural: texts, images.
        columns: What is classified.
        encode: Makes an example of those columns' values; ``None`` where there is nothing in them.
        head: The checkpoint's own.

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
    found: list[Any] = []
    kept = empty = 0
    for row in rows(options, shuffle=True, classes=head.names):
        *values, label = (column_of(row, name, options.dataset) for name in (*columns, options.label_column))
        half, enough = (held_out, options.eval_sequences) if is_held_out(kept) else (train, wanted)
        if len(half) < enough:
            example = encode(*values)
            if example is None:
                empty += 1
                continue
            half.append({**example, "label": label})
        elif len(train) >= wanted and len(held_out) >= options.eval_sequences:
            break
        kept += 1
        found.append(label)
    if not held_out and len(train) > 1:
        train, held_out = train[:-1], train[-1:]
    check_size(options.dataset, what, len(train), len(held_out), options)
    train = whole_batches(train, options.batch_size)
    labels = labels_of(found, head, options.label_column, options.dataset)
    halves = [
        [{**example, "label": labels.encoded(example["label"])} for example in half] for half in (train, held_out)
    ]
    digest = hashlib.sha256()
    for half in halves:
        for example in half:
            digest.update(repr(example).encode())
        digest.update(b"|")
    left_out = [f"Of {kept + empty} rows read, {empty} without {what[:-1]} left out."] if empty else []
    remarks = (*left_out, *filter(None, [labels.remark]), *repeated_rows(*halves))
    return LabelledHalves(halves[0], halves[1], digest.hexdigest()[:16], labels, labels.outputs != head.labels, remarks)
