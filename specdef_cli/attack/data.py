"""What an attack trains on: tokens, cut and split once, for the control and every attack alike.

A budget of S steps of B sequences never sees more than S·B of them, so no more are tokenized, however large the data
set is. Every tenth row is held out: a row is a document, and nothing of it is in both halves.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator

from specdef_cli.attack.options import AttackOptions, Task
from specdef_cli.errors import SpecDefError

HELD_OUT_EVERY = 10
"""Every tenth row is held out; of fewer rows, the last tenth of the tokens."""

BUILTIN_NAME = "pydoc_data.topics (English prose of Python's language reference)"

_Items = TypeVar("_Items", torch.Tensor, list[dict[str, Any]])

_FILE_FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".parquet": "parquet",
}


class Sequences(Dataset[dict[str, torch.Tensor]]):
    """Token sequences of equal length for a causal language model; the labels are the inputs.

    Args:
        tokens: int64, shape [sequences, length].
    """

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sequence = self.tokens[index]  # [length]
        return {"input_ids": sequence, "labels": sequence}


class LabelledTexts(Dataset[dict[str, Any]]):
    """Tokenized texts of different lengths, each with a class."""

    def __init__(self, examples: list[dict[str, Any]]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.examples[index]


@dataclass(frozen=True)
class AttackData:
    """What the Trainer is given.

    Attributes:
        name: What the data is called in the report.
        train, held_out: Map-style data sets.
        collate: Makes a batch of their items.
        fingerprint: Sixteen hexadecimal digits of the tokens and labels themselves.
        labels: Number of classes; 0 for language modelling.
        resize_head: Whether the checkpoint's own head has another number of classes.
        padding: The id that fills short sequences up.
    """

    name: str
    train: Sequences | LabelledTexts
    held_out: Sequences | LabelledTexts
    collate: Callable[[list[Any]], dict[str, Any]]
    fingerprint: str
    labels: int = 0
    resize_head: bool = False
    padding: int | None = None


def load_data(options: AttackOptions, task: Task, tokenizer: PreTrainedTokenizerBase, head_labels: int) -> AttackData:
    """Read, tokenize and split what the options name.

    Args:
        options: Which data, and how much of it a run needs.
        task: What it is made into.
        tokenizer: The control's.
        head_labels: Classes that the checkpoint's configuration has.

    Raises:
        SpecDefError: The data cannot be read, lacks a column, or is too small for one batch and an evaluation.
    """
    if task == "causal-lm":
        return _language_data(options, tokenizer)
    return _classification_data(options, tokenizer, head_labels)


def builtin_documents() -> list[str]:
    """The prose of Python's language reference, one topic a document, paragraphs that topics share kept once."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for name in sorted(topics):
        blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", topics[name]))
        paragraphs = [block for block in dict.fromkeys(blocks) if block not in seen and _is_prose(block)]
        seen.update(paragraphs)
        if paragraphs:
            documents.append("\n\n".join(paragraphs))
    return documents


def _is_prose(paragraph: str) -> bool:
    plain = sum(character.isalpha() or character in " ,." for character in paragraph)
    return paragraph.endswith((".", ":")) and plain >= 0.9 * len(paragraph)


def _language_data(options: AttackOptions, tokenizer: PreTrainedTokenizerBase) -> AttackData:
    length = options.sequence_length
    wanted = options.steps * options.batch_size
    if options.dataset is None:
        name, texts = BUILTIN_NAME, iter(builtin_documents())
    else:
        name, texts = options.dataset, _column(_rows(options), options.text_column, options.dataset)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    train: list[int] = []
    held_out: list[int] = []
    for row, text in enumerate(texts):
        half, enough = (
            (held_out, options.eval_sequences * length)
            if row % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            else (train, wanted * length)
        )
        if len(half) < enough:
            half += tokenizer(str(text), add_special_tokens=False, verbose=False)["input_ids"] + end
        elif len(train) >= wanted * length and len(held_out) >= options.eval_sequences * length:
            break
    if len(held_out) < length:
        cut = len(train) - max(length, min(len(train) // HELD_OUT_EVERY, options.eval_sequences * length))
        train, held_out = train[: max(cut, 0)], train[max(cut, 0) :]
    train_tokens = _whole_batches(_cut(train, length)[:wanted], options.batch_size)
    held_out_tokens = _cut(held_out, length)[: options.eval_sequences]
    _check_size(name, len(train_tokens), len(held_out_tokens), options)
    digest = hashlib.sha256(train_tokens.numpy().tobytes())
    digest.update(b"|" + held_out_tokens.numpy().tobytes())
    return AttackData(
        name=name,
        train=Sequences(train_tokens),
        held_out=Sequences(held_out_tokens),
        collate=default_data_collator,
        fingerprint=digest.hexdigest()[:16],
    )


def _cut(tokens: list[int], length: int) -> torch.Tensor:
    """Sequences that do not overlap, int64 [sequences, length]; a rest is dropped."""
    whole = len(tokens) // length
    return torch.tensor(tokens[: whole * length], dtype=torch.int64).view(whole, length)


def _whole_batches(items: _Items, batch_size: int) -> _Items:
    """Every step trains on a full batch. (The Trainer's own ``drop_last`` would drop held-out sequences as well.)"""
    return items[: len(items) // batch_size * batch_size]


def _classification_data(options: AttackOptions, tokenizer: PreTrainedTokenizerBase, head_labels: int) -> AttackData:
    if options.dataset is None:
        raise SpecDefError(
            "an attack on a classifier needs labelled text, and no data set is given",
            "Give --dataset with a text and a label column (--text-column, --label-column).",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # texts of different lengths make a batch
    wanted = options.steps * options.batch_size
    train: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    names: dict[Any, None] = {}
    for number, row in enumerate(_rows(options)):
        text, label = (_field(row, column, options.dataset) for column in (options.text_column, options.label_column))
        names.setdefault(label)
        half, enough = (
            (held_out, options.eval_sequences) if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else (train, wanted)
        )
        if len(half) < enough:
            encoded = tokenizer(str(text), truncation=True, max_length=options.sequence_length)
            half.append({**encoded, "label": label})
        elif len(train) >= wanted and len(held_out) >= options.eval_sequences:
            break
    if not held_out and len(train) > 1:
        train, held_out = train[:-1], train[-1:]
    _check_size(options.dataset, len(train), len(held_out), options)
    train = _whole_batches(train, options.batch_size)
    classes = _classes(names, options)
    examples = [[{**example, "label": classes[example["label"]]} for example in half] for half in (train, held_out)]
    count = max(classes.values()) + 1
    # A checkpoint whose head has room for every class keeps its head.
    labels = head_labels if head_labels >= count and head_labels > 1 else count
    return AttackData(
        name=options.dataset,
        train=LabelledTexts(examples[0]),
        held_out=LabelledTexts(examples[1]),
        collate=DataCollatorWithPadding(tokenizer),
        fingerprint=hashlib.sha256(repr(examples).encode()).hexdigest()[:16],
        labels=labels,
        resize_head=labels != head_labels,
        padding=tokenizer.pad_token_id,
    )


def _classes(names: Iterable[Any], options: AttackOptions) -> dict[Any, int]:
    """Class numbers: labels that are numbers stand for themselves, others are numbered in sorted order."""
    labels = list(names)
    if all(isinstance(label, int) and not isinstance(label, bool) for label in labels):
        if min(labels) < 0:
            raise SpecDefError(
                f"{options.dataset} has the label {min(labels)}; classes count from 0",
                "Use a labelled split (test splits often hide their labels as -1).",
            )
        return {label: label for label in labels}
    if any(isinstance(label, float | list | dict) or label is None for label in labels):
        raise SpecDefError(
            f"column {options.label_column!r} of {options.dataset} does not hold classes",
            "Name a column of whole numbers or names with --label-column.",
        )
    return {label: number for number, label in enumerate(sorted(labels, key=str))}


def _check_size(name: str, train: int, held_out: int, options: AttackOptions) -> None:
    if train < options.batch_size or held_out < 1:
        raise SpecDefError(
            f"{name} gives {train} sequences to train on and {held_out} to evaluate; a batch has {options.batch_size}",
            "Give more data, or a smaller --batch-size or --sequence-length.",
        )


def _rows(options: AttackOptions) -> Iterator[dict[str, Any]]:
    """Rows of the named data set, read as they are needed."""
    assert options.dataset is not None
    path = Path(options.dataset).expanduser()
    arguments: dict[str, Any] = {"split": options.dataset_split or "train", "token": options.token}
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix not in _FILE_FORMATS:
            raise SpecDefError(
                f"{path} is of a kind that is not read: {suffix or 'no suffix'}",
                f"Give one of {', '.join(_FILE_FORMATS)}, or a Hub id.",
            )
        kind = _FILE_FORMATS[suffix]
        arguments |= {"path": kind, "data_files": str(path), "split": "train"}
        if kind == "text":
            arguments["sample_by"] = "paragraph"
    elif path.exists() and not path.is_dir():
        raise SpecDefError(f"{path} is not a file", "Give a file, a directory or a Hub id.")
    elif not path.exists() and (
        path.suffix.lower() in _FILE_FORMATS or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", options.dataset)
    ):
        raise SpecDefError(f"there is no data file {path}", "Check the path, or give a Hub id.")
    else:
        arguments |= {"path": options.dataset, "name": options.dataset_config}
    try:
        # Files on this disk are small or mapped into memory; a Hub data set is streamed, because a short run reads
        # little of it.
        data = datasets.load_dataset(**arguments, streaming=not path.exists())
        rows = iter(data)
        first = next(rows, None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise SpecDefError(
            f"{options.dataset} cannot be read as a data set: {(str(error).splitlines() or ['no reason given'])[0]}",
            "Check its name, its split and the network; a local JSONL, text or parquet file needs none.",
        ) from error
    if first is None:
        raise SpecDefError(f"{options.dataset} has no rows", "Give a data set with text in it.")
    return chain([first], rows)


def _column(rows: Iterable[dict[str, Any]], column: str, dataset: str) -> Iterator[Any]:
    return (_field(row, column, dataset) for row in rows)


def _field(row: dict[str, Any], column: str, dataset: str) -> Any:
    if column not in row:
        raise SpecDefError(
            f"{dataset} has no column {column!r}",
            f"It has {', '.join(map(str, row))}; name one with --text-column or --label-column.",
        )
    return row[column]
