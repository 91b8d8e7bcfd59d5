"""What a checkpoint is trained for, by its configuration, and the class of transformers that trains it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

from specdef_cli.attack.target import Head, Task
from specdef_cli.errors import SpecDefError
from specdef_cli.model.opened import OpenedModel
from specdef_cli.model.skeleton import is_causal_lm

_CLASSES: Mapping[Task, tuple[Any, Mapping[str, Any]]] = {
    "causal-lm": (transformers.AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "sequence-classification": (
        transformers.AutoModelForSequenceClassification, modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    ),
    "image-classification": (
        transformers.AutoModelForImageClassification, modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    ),
    "seq2seq-lm": (transformers.AutoModelForSeq2SeqLM, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "masked-lm": (transformers.AutoModelForMaskedLM, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
}  # fmt: skip
"""The class that loads a checkpoint for a task, and its architectures by type of model, in the order of preference."""

_READS_IMAGES = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
"""Models of text and images, which are trained on text as causal language models."""

_NONE = "Train it with a script of its own: no attack of this package is made for it."


def task_of(config: Mapping[str, Any], directory: Path, asked: Task | None) -> tuple[Task, Head]:
    """Find the task of a checkpoint, and its head."""
    labels = len(config["id2label"]) if "id2label" in config else int(config.get("num_labels", 2))
    named = config.get("label2id") or {name: number for number, name in (config.get("id2label") or {}).items()}
    head = Head(labels, config.get("problem_type"), {name: int(number) for name, number in named.items()})
    architecture = (config.get("architectures") or ["none named"])[0]
    if asked is not None:
        _require_possible(config, asked, directory)
        return asked, head
    for task, (_, names) in _CLASSES.items():
        if architecture in _flat(names):
            return task, head
    if architecture in _flat(_READS_IMAGES):
        return "causal-lm", head
    possible = _possible(config)
    raise SpecDefError(
        f"the architecture {architecture} is neither a language model nor a classifier of text or images",
        f"Say what to train it for, which adds a head: --task {' or '.join(possible)}." if possible else _NONE,
    )


def auto_class(task: Task, config: Mapping[str, Any]) -> Any:
    """The class of transformers that loads a checkpoint for a task."""
    architecture = (config.get("architectures") or [""])[0]
    if task == "causal-lm" and architecture in _flat(_READS_IMAGES) and not is_causal_lm(config):
        return transformers.AutoModelForImageTextToText
    return _CLASSES[task][0]


def _possible(config: Mapping[str, Any]) -> list[Task]:
    """The tasks that transformers has a class for, for this type of model, and that are not refused."""
    kind = config.get("model_type")
    found: list[Task] = [task for task, (_, names) in _CLASSES.items() if kind in names]
    if kind in _READS_IMAGES and "causal-lm" not in found:
        found.append("causal-lm")
    return [task for task in found if not (task == "causal-lm" and _attends_both_ways(config))]


def _require_possible(config: Mapping[str, Any], asked: Task, directory: Path) -> None:
    """Refuse a task that transformers has no class for (a model that brings its own code may have one), and to train an
    encoder to say the next token: it sees it, so that its loss falls and nothing is learned.
    """
    possible, kind = _possible(config), config.get("model_type")
    if asked == "causal-lm" and _attends_both_ways(config):
        raise SpecDefError(
            f"{directory} is an encoder ({kind}): tokens attend to those after them, and causal-lm trains it to copy",
            "Use --task masked-lm.",
        )
    if asked not in possible and "auto_map" not in config:
        raise SpecDefError(
            f"transformers has no class that trains {directory} ({kind}) for {asked}",
            f"Use --task {' or '.join(possible)}." if possible else _NONE,
        )


def _flat(names: Mapping[str, Any]) -> set[str]:
    return {name for entry in names.values() for name in ((entry,) if isinstance(entry, str) else entry)}


def _attends_both_ways(config: Mapping[str, Any]) -> bool:
    kind = config.get("model_type")
    return (
        kind in _CLASSES["masked-lm"][1]
        and kind not in _CLASSES["seq2seq-lm"][1]
        and not config.get("is_decoder", False)
    )


def task_of_both(model: OpenedModel, control: OpenedModel, asked: Task | None) -> tuple[Task, Head]:
    """Find the task and head of a control; a model of another task is refused."""
    found = task_of(control.checkpoint.config, control.directory, asked)
    first, second = ((each.checkpoint.config.get("architectures") or [""])[0] for each in (model, control))
    try:
        tasks = [task_of(each.checkpoint.config, each.directory, None)[0] for each in (model, control)]
    except SpecDefError:  # one of them says nothing of a task, and --task decides
        return found
    if first != second and tasks[0] != tasks[1]:
        raise SpecDefError(
            f"{model.found.name} is a {first} and its control {control.directory.name} a {second}: nothing trains both "
            "alike",
            "Name what it was made from with --control.",
        )
    return found
