"""What an attack trains on, cut and split once, for the control and every attack alike.

A budget of S steps of B sequences never sees more than S·B of them, so no more are prepared, however large the data
set is. Every tenth row is held out: a row is a document, and nothing of it is in both halves.
"""

from __future__ import annotations

from typing import TypeAlias

from transformers import PreTrainedTokenizerBase

from specdef_cli.attack.data.forms import AttackData
from specdef_cli.attack.data.labelled import (
    Head,
    PixelTransform,
    image_data,
    load_pixel_transform,
    text_classification_data,
)
from specdef_cli.attack.data.language import ENCODERS, language_data
from specdef_cli.attack.one_run import Task
from specdef_cli.attack.options import AttackOptions
from specdef_cli.errors import SpecDefError
from specdef_cli.model.opened import OpenedModel

Preprocessor: TypeAlias = PreTrainedTokenizerBase | PixelTransform
"""Makes tensors of a row: a tokenizer for text, a transform for images."""


def load_preprocessor(task: Task, model: OpenedModel) -> Preprocessor:
    """What a checkpoint reads its inputs with."""
    if task == "image-classification":
        return load_pixel_transform(model)
    tokenizer = model.tokenizer()
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise SpecDefError(
            f"{model.directory} has no tokenizer, and the attack trains on text",
            "Copy the tokenizer's files into the control's directory.",
        )
    return tokenizer


def load_data(options: AttackOptions, task: Task, preprocessor: Preprocessor, head: Head | None = None) -> AttackData:
    """Read, prepare and split what the options name.

    Args:
        preprocessor: The control's, from :func:`load_preprocessor`.
    """
    head = head or Head()
    if options.text_pair_column is not None and task != "sequence-classification":
        raise SpecDefError(
            f"--text-pair-column {options.text_pair_column} is of a classification of texts, and the task is {task}",
            "Leave it out, or give --task sequence-classification.",
        )
    if isinstance(preprocessor, PixelTransform):
        return image_data(options, preprocessor, head)
    if task in ENCODERS:
        return language_data(options, task, preprocessor)
    return text_classification_data(options, preprocessor, head)
