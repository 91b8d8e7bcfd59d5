"""Labelled texts and images, and what their labels are.

Labels are classes, several classes at a time, or numbers: what transformers calls a classifier's ``problem_type``, by
which its models choose their loss. Images are kept as they are stored, and decoded when a batch needs them.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    BaseImageProcessor,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    ViTImageProcessorPil,
    default_data_collator,
)

from specdef_cli.attack.data.forms import WITHOUT_TEXT
from specdef_cli.attack.data.rows import as_text, class_numbers, column_of, padding_of, rows
from specdef_cli.attack.data.split import AttackData, divide
from specdef_cli.attack.options import AttackOptions
from specdef_cli.attack.target import Head, Problem
from specdef_cli.errors import SpecDefError, first_line
from specdef_cli.model.opened import OpenedModel

MAX_CLASSES = 1_000_000
"""A larger number in the column of labels is no class, and a head of that size would not fit into memory."""


_UNNAMED = re.compile(r"LABEL_\d+")
"""What transformers calls the classes of a head that nobody named."""


@dataclass(frozen=True)
class Labels:
    problem: Problem
    outputs: int  # of the model's head. A checkpoint whose head has room for every class keeps its head.
    classes: dict[Any, int]
    """From a label to the number of its class; empty where labels are numbers for the outputs themselves."""
    remark: str = ""

    def encoded(self, label: Any) -> int | list[float]:
        """Convert a label to what the loss takes: a class, or a number for each output of the head."""
        if self.problem == "single_label_classification":
            return self.classes[label]
        values = label if isinstance(label, list) else [label]
        if not self.classes:
            return [*map(float, values), *[0.0] * (self.outputs - len(values))]
        present = {self.classes[value] for value in values}
        return [float(number in present) for number in range(self.outputs)]


def labels_of(found: Iterable[Any], head: Head, column: str, dataset: str) -> Labels:
    """What the labels of a data set are.

    Numbers with a fraction are to be predicted themselves (regression), and so are whole ones where the head has one
    output; lists hold several classes at a time, as their numbers, their names, or a 0 or 1 for each class.
    """
    labels = _read(list(found), head, column, dataset)
    if not head.labels or labels.outputs == head.labels:
        return labels
    needs = f"The checkpoint's head has {head.labels} outputs, and {dataset} needs {labels.outputs}: it is made anew."
    return replace(labels, remark=needs)


def _read(labels: list[Any], head: Head, column: str, dataset: str) -> Labels:
    lists = [label for label in labels if isinstance(label, list)]
    flat = [value for label in labels for value in (label if isinstance(label, list) else [label])]
    numbers = bool(flat) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in flat)
    none = any(value is None or isinstance(value, list | dict) for value in flat)
    if none or (lists and len(lists) < len(labels)) or (numbers and not all(map(math.isfinite, flat))):
        raise SpecDefError(
            f"column {column!r} of {dataset} does not hold classes",
            "Name a column of whole numbers, names, lists of them, or numbers to predict with --label-column.",
        )
    if lists and not flat:
        raise SpecDefError(
            f"no row of {dataset} has a label in column {column!r}", "Name the column of labels with --label-column."
        )
    widths = {len(label) for label in lists} or {1}
    alike = len(widths) == 1
    fractions = numbers and any(value != int(value) for value in flat)
    if alike and (fractions or (numbers and (head.problem == "regression" or (head.labels == 1 and not lists)))):
        return Labels("regression", widths.pop(), {})
    several = bool(lists) or head.problem == "multi_label_classification"
    if lists and numbers and alike and max(widths) > 1 and set(flat) <= {0, 1}:
        return Labels("multi_label_classification", max(*widths, head.labels), {})
    if numbers:
        flat = [int(value) for value in flat]
    by_head = class_numbers(flat, head.names)
    numbers = numbers or all(isinstance(value, str) and value.strip().isdecimal() for value in flat)
    classes = by_head or _numbered(flat, numbers, column, dataset)
    count = max(classes.values()) + 1
    outputs = head.labels if head.labels >= count and head.labels > 1 else count
    remark = ""
    if not by_head and not numbers and not all(map(_UNNAMED.fullmatch, head.names)):
        remark = (
            f"The checkpoint's classes have other names ({', '.join(head.names)}), so those of {dataset} were numbered "
            "in alphabetical order. Name them as the checkpoint does if its head is to be kept."
        )
    kind: Problem = "multi_label_classification" if several else "single_label_classification"
    return Labels(kind, outputs, classes, remark)


def _numbered(labels: list[Any], numbers: bool, column: str, dataset: str) -> dict[Any, int]:
    """Class numbers: labels that are numbers stand for themselves, others are numbered in sorted order."""
    if numbers:
        classes = {label: int(label) for label in labels} or {0: 0}
        if min(classes.values()) < 0:
            raise SpecDefError(
                f"{dataset} has the label {min(classes.values())}; classes count from 0",
                "Use a labelled split (test splits often hide their labels as -1).",
            )
        if max(classes.values()) >= MAX_CLASSES:
            raise SpecDefError(
                f"{dataset} has the label {max(classes.values())}, which is too large for a class; they count from 0",
                "Name a column of classes with --label-column, or number them from 0.",
            )
        return classes
    return {label: number for number, label in enumerate(sorted(set(labels), key=str))}


Example = dict[str, Any]


def labelled_data(
    options: AttackOptions,
    what: str,
    columns: tuple[str, ...],
    encode: Callable[..., Example | None],
    head: Head,
    collate: Callable[[list[Any]], dict[str, Any]],
    *,
    prepared: Callable[[list[Example]], Any] = list,
) -> AttackData:
    """Read as many rows as a run needs, in a random order.

    Args:
        encode: Makes an example of those columns' values; ``None`` where there is nothing in them.
        prepared: From examples, whose ``label`` is what the loss takes, to what batches are made of.
    """
    dataset, label_column = options.dataset, options.label_column
    if dataset is None:
        raise SpecDefError(
            f"an attack on a classifier needs labelled {what}, and no data set is given",
            f"Give --dataset with a column of {what} and one of labels (--{what[:-1]}-column, --label-column).",
        )

    def examples() -> Iterator[Example | str]:
        for row in rows(options, shuffle=True, classes=head.names):
            *values, label = (column_of(row, name, dataset) for name in (*columns, label_column))
            example = encode(*values)
            yield WITHOUT_TEXT if example is None else {**example, "label": label}

    train, held_out, remarks = divide(options, dataset, what, examples())
    labels = labels_of((example["label"] for example in (*train, *held_out)), head, label_column, dataset)
    digest = hashlib.sha256()
    for half in (train, held_out):
        for example in half:
            example["label"] = labels.encoded(example["label"])
            digest.update(repr(example).encode())
        digest.update(b"|")
    return AttackData(
        name=dataset,
        train=prepared(train),
        held_out=prepared(held_out),
        collate=collate,
        fingerprint=digest.hexdigest()[:16],
        labels=labels.outputs,
        problem=labels.problem,
        resize_head=labels.outputs != head.labels,
        remarks=(*remarks, *filter(None, [labels.remark])),
    )


def text_classification_data(options: AttackOptions, tokenizer: PreTrainedTokenizerBase, head: Head) -> AttackData:
    """Tokenized texts of the named data set, or pairs of them, cut off at the sequence length."""
    columns = (options.text_column or "text", *filter(None, [options.text_pair_column]))
    encode = partial(_tokenized, tokenizer, options.sequence_length, columns, str(options.dataset))
    data = labelled_data(options, "texts", columns, encode, head, DataCollatorWithPadding(tokenizer))
    padding = padding_of(tokenizer)
    if padding is None:
        raise SpecDefError(
            "the tokenizer has neither padding nor an end of text, so texts of different lengths make no batch",
            'Add a line "pad_token": "…" with one of its tokens to tokenizer_config.json.',
        )
    return replace(data, padding=padding)


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, length: int, columns: tuple[str, ...], dataset: str, *values: object
) -> Example | None:
    texts = [as_text(value, name, dataset) for value, name in zip(values, columns, strict=True)]
    if not any(text.strip() for text in texts):
        return None
    return dict(tokenizer(*texts, truncation=True, max_length=length))


MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class PixelTransform:
    """Turns an image into a model's input."""

    channels: int  # 1 or 3
    processor: BaseImageProcessor

    @classmethod
    def plain(cls, channels: int, height: int, width: int) -> PixelTransform:
        """Resize, and map pixels to [−1, 1]."""
        half = [0.5] * channels
        size = {"height": height, "width": width}
        return cls(channels, ViTImageProcessorPil(size=size, image_mean=half, image_std=half))

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return float32 of shape [channels, height, width]."""
        return self.processor(images=image.convert(MODES[self.channels]), return_tensors="pt")["pixel_values"][0]


@dataclass(frozen=True)
class Pixels:
    """Images, which are decoded when a batch needs them."""

    examples: list[Example]
    transform: PixelTransform

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int, /) -> Example:
        example = self.examples[index]
        return {"pixel_values": self.transform(Image.open(io.BytesIO(example["image"]))), "labels": example["label"]}


def image_data(options: AttackOptions, transform: PixelTransform, head: Head) -> AttackData:
    """Images of the named data set: a directory of a folder for each class, a parquet file, a Hub id."""
    encode, prepared = partial(_stored, options=options), partial(Pixels, transform=transform)
    columns = (options.image_column,)
    return labelled_data(options, "images", columns, encode, head, default_data_collator, prepared=prepared)


def _stored(value: Any, options: AttackOptions) -> Example:
    """Read the bytes of an image that `datasets` hands out undecoded."""
    stored = value if isinstance(value, dict) else {}
    content = stored.get("bytes")
    try:
        if content is None and stored.get("path"):
            content = Path(stored["path"]).read_bytes()
        if content is None:
            raise UnidentifiedImageError
        Image.open(io.BytesIO(content)).verify()
    except (OSError, SyntaxError) as error:  # what Pillow says of broken files; UnidentifiedImageError is an OSError
        raise SpecDefError(
            f"column {options.image_column!r} of {options.dataset} does not hold images that can be read",
            "Name a column of images (PNG, JPEG, …) with --image-column.",
        ) from error
    return {"image": content}


_DEFAULT_SIZE = 224


def load_pixel_transform(model: OpenedModel) -> PixelTransform:
    """Load a checkpoint's image processor, or make one that fits its configuration."""
    directory, processor = model.directory, None
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=model.trust_remote_code)
        if (directory / "preprocessor_config.json").is_file():
            processor = AutoImageProcessor.from_pretrained(directory, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise SpecDefError(
            f"how {directory} reads images cannot be found out: {first_line(error)}",
            "Give a directory with an image classifier's config.json and, where it has one, its image processor.",
        ) from error
    channels = int(getattr(config, "num_channels", 3))
    if channels not in MODES:
        raise SpecDefError(
            f"{directory} takes images of {channels} channels", "Give a model of grey (1) or colour (3) images."
        )
    if processor is not None:
        return PixelTransform(channels, processor)
    size: Any = getattr(config, "image_size", None) or _DEFAULT_SIZE
    return PixelTransform.plain(channels, *(size if isinstance(size, list | tuple) else (size, size)))
