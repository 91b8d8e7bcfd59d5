"""What an attack trains on, cut and split once, for the control and every attack alike.

A budget of S steps of B sequences never sees more than S·B of them, so no more are prepared, however large the data
set is. Every tenth row is held out: a row is a document, and nothing of it is in both halves.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from transformers import AutoConfig, AutoImageProcessor, PreTrainedTokenizerBase

from specdef_cli.attack.data.labelled import (
    MODES,
    Head,
    PixelTransform,
    image_data,
    text_classification_data,
)
from specdef_cli.attack.data.language import ENCODERS, language_data
from specdef_cli.attack.data.rows import AttackData
from specdef_cli.attack.one_run import Task
from specdef_cli.attack.options import AttackOptions
from specdef_cli.errors import SpecDefError, first_line
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
    if task not in ENCODERS:
        return text_classification_data(options, preprocessor, head)
    return language_data(options, task, preprocessor)


_DEFAULT_SIZE = 224


def load_pixel_transform(model: OpenedModel) -> PixelTransform:
    """The transform of a checkpoint: its image processor's, else one that fits its configuration."""
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
    size: Any = getattr(config, "image_size", None) or _DEFAULT_SIZE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return PixelTransform(channels, height, width, processor)
