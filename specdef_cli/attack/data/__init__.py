"""What an attack trains on: text for a language model, labelled texts, or labelled images."""

from __future__ import annotations

from typing import TypeAlias

from transformers import PreTrainedTokenizerBase

from specdef_cli.attack.data.labels import PixelTransform, image_data, load_pixel_transform, text_classification_data
from specdef_cli.attack.data.language import ENCODERS, language_data
from specdef_cli.attack.data.split import AttackData
from specdef_cli.attack.options import NO_RETAINED, AttackOptions
from specdef_cli.attack.target import Head, Task
from specdef_cli.errors import SpecDefError
from specdef_cli.model.opened import OpenedModel
from specdef_cli.option import flag_of

Preprocessor: TypeAlias = PreTrainedTokenizerBase | PixelTransform
"""Makes tensors of a row: a tokenizer for text, a transform for images."""


def load_preprocessor(task: Task, model: OpenedModel) -> Preprocessor:
    """Load the tokenizer of a checkpoint, or its image transform."""
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
    """Read, prepare and split what the options name."""
    head = head or Head()
    if options.text_pair_column is not None and task != "sequence-classification":
        raise SpecDefError(
            f"--text-pair-column {options.text_pair_column} is of a classification of texts, and the task is {task}",
            "Leave it out, or give --task sequence-classification.",
        )
    for name in ("prompts", "retained", "eval_tasks"):
        if task != "causal-lm" and getattr(options, name) not in (None, (), NO_RETAINED):
            raise SpecDefError(
                f"{flag_of(AttackOptions, name)} is for models that say the next token, and the task is {task}",
                "Leave it out.",
            )
    if isinstance(preprocessor, PixelTransform):
        return image_data(options, preprocessor, head)
    if task not in ENCODERS:
        return text_classification_data(options, preprocessor, head)
    return language_data(options, task, preprocessor)
