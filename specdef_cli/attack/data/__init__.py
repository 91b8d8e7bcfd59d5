"""What an attack trains on, cut and split once, for the control and every attack alike.

A budget of S steps of B sequences never sees more than S·B of them, so no more are prepared, however large the data
set is. Every tenth row is held out: a row is a document, and nothing of it is in both halves.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from transformers import PreTrainedTokenizerBase

from specdef_cli.attack.data.forms import AttackData, Examples, Text, as_items
from specdef_cli.attack.data.labelled import (
    Head,
    PixelTransform,
    image_data,
    load_pixel_transform,
    text_classification_data,
)
from specdef_cli.attack.data.language import ENCODERS, CausalEncoder, language_data
from specdef_cli.attack.one_run import Task
from specdef_cli.attack.options import NO_RETAINED, AttackOptions
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


SEQUENCES_OF_A_FILE = 2
"""So that the text is of many files, however few sequences are evaluated."""


def retained_sequences(options: AttackOptions, tokenizer: PreTrainedTokenizerBase) -> Examples | None:
    """Sequences on which a language model's ability is measured as it is attacked; ``None`` where it is not wanted.

    A quarter as many as held-out ones: they cost time at every evaluation, and the limit of utility is a coarse one.
    """
    count = max(1, options.eval_sequences // 4)
    if options.retained == NO_RETAINED:
        return None
    if options.retained is not None:
        named = replace(
            options, dataset=options.retained, dataset_config=None, dataset_split=None, eval_sequences=count, steps=1
        )
        return load_data(named, "causal-lm", tokenizer).held_out
    sequences = []
    for text in standard_library():
        of_this_file = CausalEncoder(tokenizer, options.sequence_length)
        of_this_file.add(Text(text))
        sequences += of_this_file.examples[:SEQUENCES_OF_A_FILE]
        if len(sequences) >= count:
            break
    return as_items(sequences[:count]) if sequences else None


def standard_library() -> Iterator[str]:
    """The files of Python's standard library, one after the other."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")
